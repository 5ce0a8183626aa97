"""Dynamic local updates (DyLU, arXiv 2401.09135): how many inner steps a round each worker should take. Pure.

A worker of half the speed gets half the inner steps, so that all push at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from diloco_proto import outer_pb2 as pb
from diloco_proto.schedule import Schedule

MEMORY = 0.9
"""Share of what was measured before that counts on at each heartbeat: about ten of them are looked at."""

HIGH = 0.9
"""Percentile of the speeds that takes the whole H: one worker that measures itself wrongly sets no pace."""

LEAST_COMPUTED = 1e-6
"""Seconds between two heartbeats from which a speed can be told."""

DEAD_BAND = 0.05
"""Of H; smaller changes are not worth a new period."""


@dataclass(slots=True)
class Speed:
    """Inner steps a second of one worker while it computes, from its heartbeats."""

    _steps: float = 0.0
    _seconds: float = 0.0

    @property
    def steps_per_second(self) -> float | None:
        """None before anything was measured."""
        return self._steps / self._seconds if self._steps and self._seconds > 0 else None

    def hear(self, before: pb.Heartbeat, now: pb.Heartbeat) -> None:
        """Take in what happened between two heartbeats of one process."""
        computed = (now.train_seconds - now.stall_seconds) - (before.train_seconds - before.stall_seconds)
        if now.steps < before.steps or computed < LEAST_COMPUTED:
            return
        self._steps = MEMORY * self._steps + (now.steps - before.steps)
        self._seconds = MEMORY * self._seconds + computed


def reference_speed(speeds: Iterable[float]) -> float:
    """The speed that goes with the whole H: the HIGH percentile, nearest rank. At least one speed is given."""
    ordered = sorted(speeds)
    return ordered[math.ceil(HIGH * len(ordered)) - 1]


class Paced(Protocol):
    """What pacing has to know of a worker."""

    sync_every: int

    @property
    def speed(self) -> Speed: ...


W = TypeVar("W", bound=Paced)


def new_paces(workers: Iterable[W], schedule: Schedule) -> list[tuple[W, int]]:
    """The workers whose speed asks for another H, and which. `schedule` has the whole H."""
    known = [(w, s) for w in workers if (s := w.speed.steps_per_second) is not None]
    if not known:
        return []
    reference = reference_speed(speed for _, speed in known)
    paces = [(w, next_pace(w.sync_every, speed / reference, schedule)) for w, speed in known]
    return [(w, pace) for w, pace in paces if pace != w.sync_every]


def next_pace(current: int, speed: float, schedule: Schedule) -> int:
    """H of a worker from its next period on: ⌊speed·H⌋ within what is possible, or what it has if that is near.

    `speed` is relative to the one that goes with the whole H.
    """
    whole = schedule.sync_every
    wanted = max(schedule.least_sync_every, min(whole, math.floor(speed * whole)))
    near = abs(wanted - current) <= DEAD_BAND * whole
    return current if near and wanted != whole else wanted
