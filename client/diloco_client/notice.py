"""SIGTERM as the notice of a machine that is taken away (a spot instance): on request, chained, undone at the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any


class Notice:
    """From here to `restore`, SIGTERM is noted instead of ending the process; whoever trains looks at `left` and acts.

    A handler can come at any point of the training thread, in the midst of a step: it only takes the time. A second
    signal, or one in a forked child, does at once what SIGTERM did before.

    Raises ValueError outside the main thread, which alone may set handlers, or where SIGTERM belongs to other than
    Python code.
    """

    def __init__(self, seconds: float) -> None:
        if seconds <= 0:
            raise ValueError(f"sigterm_seconds is {seconds}: it must be more than 0, the time from SIGTERM to the end")
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("sigterm_seconds: only the main thread can handle signals; join there, or without it")
        former: Any = signal.getsignal(signal.SIGTERM)
        if former is None:
            raise ValueError("sigterm_seconds: something that is not Python handles SIGTERM in this process already")
        self._seconds = seconds
        self._pid = os.getpid()
        self._former = former
        self._received_at: float | None = None
        self._over = False
        self._handle = self._on_signal
        signal.signal(signal.SIGTERM, self._handle)

    @property
    def left(self) -> float | None:
        """Seconds left of the notice, at least 0; None while there was no signal."""
        if self._received_at is None:
            return None
        return max(0.0, self._received_at + self._seconds - time.monotonic())

    def restore(self) -> None:
        """SIGTERM does again what it did before, unless somebody else has taken it over since; then what we get of it
        is passed on."""
        self._over = True
        here = threading.current_thread() is threading.main_thread() and os.getpid() == self._pid
        if here and signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._former)

    def pass_on(self, frame: FrameType | None = None) -> None:
        """Do what SIGTERM did before; by default that ends the process."""
        if callable(self._former):
            self._former(signal.SIGTERM, frame)
        elif self._former == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            if os.getpid() == 1:  # to which the kernel does not deliver it: the first process of a container
                raise SystemExit(128 + signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._over or self._received_at is not None or os.getpid() != self._pid:
            self.pass_on(frame)
        else:
            self._received_at = time.monotonic()
