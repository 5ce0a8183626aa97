"""Virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator

Action = Callable[[], None]


class Timer:
    """An action that is to happen, until it is cancelled."""

    __slots__ = ("action",)

    def __init__(self, action: Action) -> None:
        self.action: Action | None = action

    def cancel(self) -> None:
        self.action = None


class Clock:
    """Seconds since the start. Actions happen in the order of their times, those of one time in the order they
    were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Timer]] = []
        self._asked = 0

    def after(self, seconds: float, action: Action) -> Timer:
        timer = Timer(action)
        self._asked += 1
        heapq.heappush(self._queue, (self.now + max(0.0, seconds), self._asked, timer))
        return timer

    def step(self) -> bool:
        """Let the next action happen. False when there is none."""
        while self._queue:
            time, _, timer = heapq.heappop(self._queue)
            if timer.action is not None:
                self.now = time
                timer.action()
                return True
        return False


class Gate:
    """What one process does passes through its gate. While it is shut, as SIGSTOP shuts it, actions wait."""

    def __init__(self, within: Gate | None = None) -> None:
        self.shut = False
        self._within = within
        self._waiting: list[Action] = []

    def __call__(self, action: Action) -> None:
        if self.shut:
            self._waiting.append(action)
        elif self._within is not None:
            self._within(action)
        else:
            action()

    def open(self) -> None:
        """Go on: what has waited happens now, in order."""
        self.shut = False
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            self(action)

    def close_for_ever(self) -> None:
        """The process is dead."""
        self.shut = True
        self._waiting = []


Life = Generator[float | Callable[[], bool], None, None]
"""What somebody does: it yields the seconds to let pass, or a condition to wait for."""


class Task:
    """Lives a life. Conditions are looked at again whenever it is poked."""

    def __init__(self, clock: Clock, life: Life, gate: Gate | None = None) -> None:
        self._clock = clock
        self._gate = gate or Gate()
        self._life: Life | None = life
        self._condition: Callable[[], bool] | None = None
        self._timer: Timer | None = clock.after(0.0, self._wake)

    @property
    def over(self) -> bool:
        return self._life is None

    def poke(self) -> None:
        """Something has changed."""
        if self._condition is not None and self._timer is None and self._condition():
            self._timer = self._clock.after(0.0, self._wake)

    def kill(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._life = self._timer = self._condition = None

    def _wake(self) -> None:
        self._gate(self._go_on)

    def _go_on(self) -> None:
        self._timer = self._condition = None
        while self._life is not None:
            wish = next(self._life, None)
            if wish is None:
                self._life = None
            elif isinstance(wish, float):
                self._timer = self._clock.after(wish, self._wake)
                return
            elif not wish():
                self._condition = wish
                return
