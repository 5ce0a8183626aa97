"""How fast bytes went over links lately: whether compressing them takes longer than it saves (`codec.worth_level`)."""

from __future__ import annotations

from collections import deque

LEAST_BYTES = 4 << 20
"""Of a transfer that can tell: in a shorter one, round trips take most of the time."""

KEPT = 16
"""Transfers, of one link."""

KEPT_OF_MANY = 256
"""Of all links of a server: of each some, for as many links as it has."""


class Speeds:
    """Of the last transfers that were long enough to tell. Any thread."""

    def __init__(self, kept: int = KEPT) -> None:
        self._last: deque[tuple[str, float]] = deque(maxlen=kept)

    def note(self, nbytes: int, seconds: float, link: str = "") -> None:
        """A transfer over this link is over."""
        if nbytes >= LEAST_BYTES:
            self._last.append((link, nbytes / max(seconds, 1e-9)))

    @property
    def slowest(self) -> float | None:
        """Bytes a second of the slowest of these links; None while nothing is known. Of one link the fastest transfer
        counts: what made the others slower was something else."""
        links: dict[str, float] = {}
        for link, speed in tuple(self._last):
            links[link] = max(speed, links.get(link, 0.0))
        return min(links.values(), default=None)
