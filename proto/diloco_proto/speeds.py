"""How fast bytes went over links lately: whether compressing them takes longer than it saves (`codec.worth_level`)."""

from __future__ import annotations

from collections import deque

LEAST_BYTES = 4 << 20
"""Of a transfer that can tell: in a shorter one, round trips take most of the time."""

KEPT = 16
"""Transfers."""


class Speeds:
    """Of the last transfers that were long enough to tell. Any thread."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=KEPT)

    def note(self, nbytes: int, seconds: float) -> None:
        """A transfer is over."""
        if nbytes >= LEAST_BYTES:
            self._last.append(nbytes / max(seconds, 1e-9))

    @property
    def fastest(self) -> float | None:
        """Bytes a second; None while nothing is known. Of one link: what made the others slower was something else."""
        return max(tuple(self._last), default=None)

    @property
    def slowest(self) -> float | None:
        """Likewise. Of several links: none of them is slower."""
        return min(tuple(self._last), default=None)
