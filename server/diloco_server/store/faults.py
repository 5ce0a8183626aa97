"""Points at which a test has the server die, as a power cut would have it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

from diloco_proto.errors import ConfigError

VARIABLE = "DILOCO_FAULT"


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class FaultPoints:
    """Kills this process when a named point is reached for the count-th time. Without points it does nothing."""

    def __init__(self, points: Mapping[str, int] | None = None, strike: Callable[[], None] = _die) -> None:
        """`points`: name -> how often it is reached, the last time included."""
        self._left = dict(points or {})
        self._strike = strike

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> FaultPoints:
        """From DILOCO_FAULT, `name:count` or several of them, with commas between. Raises ConfigError."""
        points: dict[str, int] = {}
        for item in filter(None, environ.get(VARIABLE, "").split(",")):
            name, colon, count = item.partition(":")
            if not name or (colon and not count.isdecimal()) or (colon and int(count) < 1):
                raise ConfigError(f"{VARIABLE} has {item!r}; it must be name:count, with a count of at least 1")
            points[name] = int(count) if colon else 1
        return cls(points)

    def reach(self, name: str) -> None:
        """The point of this name is reached."""
        if name not in self._left:
            return
        self._left[name] -= 1
        if self._left[name] == 0:
            del self._left[name]
            self._strike()


NO_FAULTS = FaultPoints()
"""The default: has no points, so nothing in it ever changes."""
