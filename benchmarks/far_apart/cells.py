"""What is measured: a link, and the settings of a run over it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

LINKS = (1000, 100, 20)
"""Mbit/s each way."""

PERIODS, FRAGMENTS, OVERLAPS, CODECS = (50, 100), (4, 8), (0, 2, 5), ("int4", "fp32")
FAST = 20.0
"""Seconds of blocking synchronisations that are made, at least one."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    mbit: int
    period: int
    """H."""
    fragments: int
    overlap: int
    codec: str
    stalls: bool = False
    connections: int = 1
    blocking: bool = False
    """The whole model at once after an inner step: how long that takes is what counts."""
    rounds: int = 1
    """Periods that are measured."""

    @property
    def name(self) -> str:
        """As in the results."""
        if self.blocking:
            return f"blocking_{self.mbit}"
        if self.stalls:
            return f"stalls_{self.mbit}_{self.connections}"
        return f"{self.codec}_{self.mbit}_{self.period}_{self.fragments}_{self.overlap}"


def named(name: str, parameters: int) -> Cell:
    """The cell of that name. Raises ValueError."""
    kind, *numbers = name.split("_")
    match kind, [int(n) for n in numbers]:
        case "blocking", [mbit]:
            return blocking(mbit, parameters)
        case "stalls", [mbit, connections]:
            return stalling(mbit, connections)
        case ("int4" | "fp32") as codec, [mbit, period, fragments, overlap]:
            return Cell(mbit=mbit, period=period, fragments=fragments, overlap=overlap, codec=codec)
    raise ValueError(f"{name} is no cell; write int4_100_50_4_5, blocking_100 or stalls_100_4")


def blocking(mbit: int, parameters: int) -> Cell:
    seconds = 2 * 32 * parameters / (mbit * 1e6)
    rounds = max(1, min(5, int(FAST / seconds)))
    return Cell(mbit=mbit, period=1, fragments=1, overlap=0, codec="fp32", blocking=True, rounds=rounds)


def stalling(mbit: int, connections: int) -> Cell:
    settings = Cell(mbit=mbit, period=50, fragments=4, overlap=5, codec="fp32", rounds=2)
    return replace(settings, stalls=True, connections=connections)


def some(mbit: int) -> list[Cell]:
    """Those that say most."""
    chosen = [("int4", 100, 4, 0), ("int4", 100, 4, 2), ("int4", 100, 4, 5), ("int4", 50, 4, 5), ("int4", 100, 8, 5)]
    chosen += [("fp32", 100, 4, 5)]
    return [Cell(mbit=mbit, period=h, fragments=p, overlap=tau, codec=c) for c, h, p, tau in chosen]


def every(mbit: int) -> list[Cell]:
    grid = product(CODECS, PERIODS, FRAGMENTS, OVERLAPS)
    return [Cell(mbit=mbit, period=h, fragments=p, overlap=tau, codec=c) for c, h, p, tau in grid]
