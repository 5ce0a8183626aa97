"""How much each contribution of a round counts: its weight in the mean, and a scale if it is far too large."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Protocol

MAX_WEIGHT = 2.0
"""Times the median of a round: a worker that comes back after long must not take the run over."""

KEPT_VALUES = 64
"""Counted contributions of a fragment from which its running medians are taken."""


class Weighable(Protocol):
    """What weighing has to know of a contribution."""

    @property
    def tokens(self) -> int: ...
    @property
    def since_version(self) -> int: ...
    @property
    def norm(self) -> float: ...


class Weights:
    """The weights of one fragment's contributions.

    `uniform` weighs all alike instead of by tokens. A norm of more than `max_norm` times the running median is
    scaled down to that, or to as many times more as there is more work behind it; 0 is no limit. The result depends
    on the contributions of the round, as a set, and on those of earlier rounds.
    """

    def __init__(self, *, uniform: bool, max_norm: float) -> None:
        self._uniform = uniform
        self._max_norm = max_norm
        self.norms: deque[float] = deque(maxlen=KEPT_VALUES)
        """Of counted contributions, as scaled."""
        self.works: deque[float] = deque(maxlen=KEPT_VALUES)
        """Their tokens."""
        self.sizes: deque[float] = deque(maxlen=KEPT_VALUES - 1)
        """Of counted contributions, discounted by staleness: see `of_step`."""

    def of_round(self, members: Sequence[Weighable]) -> tuple[float, ...]:
        """For a mean, in which weights are relative to each other: tokens, at most MAX_WEIGHT times their median."""
        if self._uniform or not members:
            return (1.0,) * len(members)
        cap = MAX_WEIGHT * median(c.tokens for c in members)
        return tuple(min(float(c.tokens), cap) for c in members)

    def of_step(self, contribution: Weighable, version: int) -> float:
        """For a step of its own (delayed Nesterov): tokens·(1 + s)^−½ over its running median, at most MAX_WEIGHT.

        s is the staleness: how many versions the fragment has moved on since the oldest of the steps. Since the
        median is discounted too, s matters only where it differs: of k equal workers each is stale by k − 1.
        """
        size = self._size(contribution, version)
        return min(MAX_WEIGHT, size / median([*self.sizes, size]))

    def _size(self, contribution: Weighable, version: int) -> float:
        size = 1.0 if self._uniform else float(contribution.tokens)
        return size / math.sqrt(1 + max(0, version - contribution.since_version))

    def scales(self, members: Sequence[Weighable]) -> tuple[float, ...]:
        """By how much each contribution is to be scaled: 1, or less if its norm is beyond the limit.

        The round's own norms take part in the median, so the first round is protected from three members on.
        """
        if not self._max_norm:
            return (1.0,) * len(members)
        norms = [n for n in (*self.norms, *(c.norm for c in members)) if n > 0]
        if not norms:  # a warm-up at a learning rate of 0
            return (1.0,) * len(members)
        usual = self._max_norm * median(norms)
        work = median([*self.works, *(c.tokens for c in members)])
        limits = [usual * max(1.0, c.tokens / work) for c in members]
        return tuple(1.0 if c.norm <= limit else limit / c.norm for c, limit in zip(members, limits, strict=True))

    def counted(self, members: Sequence[Weighable], scales: Sequence[float], version: int) -> None:
        """These were counted on top of `version`: what is usual is judged by them, worker by worker, from now on."""
        self.norms.extend(c.norm * s for c, s in zip(members, scales, strict=True))
        self.works.extend(float(c.tokens) for c in members)
        self.sizes.extend(self._size(c, version) for c in members)
