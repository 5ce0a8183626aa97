"""Cancels calls on which nothing moves: time limits that watch progress, not wall clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

TICK = 1.0
"""Seconds; a sleep of the machine is noticed so long after it."""

STOOD_STILL = 5.0
"""Seconds by which the watchdog itself may be late before it counts them for nobody: the process was stopped."""

_BOOT_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


def slept() -> float:
    """Seconds that the machine has spent asleep, from an arbitrary start. Differences are exact on Linux; elsewhere
    they are those of the wall clock, which may be set."""
    if _BOOT_CLOCK is not None:
        return time.clock_gettime(_BOOT_CLOCK) - time.monotonic()
    return time.time() - time.monotonic()


class Watch:
    """One call. `moved` says that something has happened on it; `why` says why it was cancelled."""

    def __init__(self, patience: float, now: float, clock: Callable[[], float]) -> None:
        self.patience = patience
        self.why = ""
        self.at = now
        self._clock = clock
        self._cancel: Callable[[], object] | None = None

    def moved(self) -> None:
        self.at = self._clock()

    def guard(self, cancel: Callable[[], object]) -> None:
        """From now on there is something to cancel."""
        self._cancel = cancel
        if self.why:
            cancel()

    def give_up(self, why: str) -> None:
        self.why = why
        if self._cancel is not None:
            self._cancel()


class Watchdog:
    """Watches calls from a thread of its own, which lives while there are any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, slept: Callable[[], float] = slept) -> None:
        self._clock = clock
        self._slept = slept
        self._watches: set[Watch] = set()
        self._changed = threading.Condition()
        self._running = False
        self._looked = 0.0
        self._slept_before = 0.0

    def begin(self, patience: float) -> Watch:
        """Watch a call that is about to be made: `patience` seconds without `moved` end it."""
        watch = Watch(patience, self._clock(), self._clock)
        with self._changed:
            if not self._watches:
                self._looked, self._slept_before = self._clock(), self._slept()
            self._watches.add(watch)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="diloco-watch", daemon=True).start()
            self._changed.notify()
        return watch

    def end(self, watch: Watch) -> None:
        with self._changed:
            self._watches.discard(watch)
            self._changed.notify()

    def look(self) -> None:
        """End the calls that have had their time; all of them after a sleep, which no connection survives."""
        with self._changed:
            now, slept = self._clock(), self._slept()
            late = now - self._looked - TICK
            asleep = slept - self._slept_before
            self._looked, self._slept_before = now, slept
            due = {}
            for watch in self._watches:
                if late > STOOD_STILL:
                    watch.at = min(now, watch.at + late)
                if asleep > STOOD_STILL:
                    due[watch] = f"this machine was asleep for {asleep:.0f} s"
                elif now - watch.at > watch.patience:
                    due[watch] = f"nothing has moved for {now - watch.at:.0f} s"
            self._watches.difference_update(due)
        for watch, why in due.items():
            watch.give_up(why)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._watches:
                    self._changed.wait(10 * TICK)
                if not self._watches:
                    self._running = False
                    return
                first = min(w.at + w.patience for w in self._watches)
                pause = min(max(first - self._clock(), 0.01), TICK)
                self._changed.wait_for(lambda: not self._watches, pause)
            self.look()
