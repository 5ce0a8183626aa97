"""When each fragment is pushed and applied (Streaming DiLoCo, arXiv 2501.18512, algorithm 2).

Inner steps are counted from 1. Fragment p is applied after step k ≡ ⌊(p+1)·H/P⌋ (mod H) and pushed
`overlap_steps` earlier; a push that would fall on k <= 0 is skipped, and with it the apply that belongs to it.
P = 1 and no overlap is classic DiLoCo (arXiv 2311.08105). The fragment of buffers, if there is one, goes with the
last trained one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from .errors import ConfigError


@dataclass(frozen=True, slots=True)
class Due:
    """What is due after one inner step: fragments to push, then fragments to apply."""

    push: tuple[int, ...]
    apply: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """H = sync_every and τ = overlap_steps, in inner steps; P = num_fragments, the trained ones.

    With `buffers` there is one fragment more, number P.
    Raises ConfigError unless P >= 1, τ >= 0 and H >= max(P, τ + 1).
    """

    sync_every: int
    num_fragments: int
    overlap_steps: int
    buffers: bool = False

    def __post_init__(self) -> None:
        if self.num_fragments < 1:
            raise ConfigError(f"num_fragments is {self.num_fragments}; it must be at least 1")
        if self.overlap_steps < 0:
            raise ConfigError(f"overlap_steps is {self.overlap_steps}; it must be 0 or more")
        if self.sync_every < 1:
            raise ConfigError(f"sync_every is {self.sync_every}; it must be at least 1")
        if self.sync_every < self.num_fragments:
            raise ConfigError(
                f"sync_every ({self.sync_every}) must be at least num_fragments ({self.num_fragments}), "
                "so that trained fragments are due at different steps"
            )
        if self.sync_every <= self.overlap_steps:
            raise ConfigError(
                f"sync_every ({self.sync_every}) must be greater than overlap_steps ({self.overlap_steps}), "
                "so that a fragment is merged before it is pushed again"
            )

    @property
    def least_sync_every(self) -> int:
        """The smallest H with which this works."""
        return max(self.num_fragments, self.overlap_steps + 1)

    def with_sync_every(self, sync_every: int) -> Self:
        """The same with another H. Raises ConfigError if it is too small."""
        return replace(self, sync_every=sync_every)

    def apply_offset(self, fragment: int) -> int:
        """Inner steps from the start of a period to the apply of `fragment`, in 1..H."""
        return min(fragment + 1, self.num_fragments) * self.sync_every // self.num_fragments

    def due(self, step: int) -> Due:
        """What is due after inner step `step` (1, 2, …). With τ = 0 the same fragments are in both lists."""
        return Due(push=self._at(step + self.overlap_steps), apply=self._at(step))

    def steps_until_due(self, step: int) -> int:
        """Inner steps from `step` to the next one after which something is due; at least 1."""
        offsets = [self.apply_offset(p) - early for p in range(self.num_fragments) for early in (0, self.overlap_steps)]
        return min((offset - step - 1) % self.sync_every + 1 for offset in offsets)

    def _at(self, step: int) -> tuple[int, ...]:
        phase = step % self.sync_every
        fragments = range(self.num_fragments + self.buffers)
        return tuple(p for p in fragments if self.apply_offset(p) % self.sync_every == phase)
