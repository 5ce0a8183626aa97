"""Rounds: which contributions make one outer step of a fragment, and when. Pure: time is passed in, in seconds.

A round takes a fragment from version v to v + 1. It closes when every expected worker has contributed or is
gone, or when the quorum has contributed and the grace has passed. Its result depends on the set of
contributions alone: members are sorted by worker id, whatever the order of arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from statistics import median

from diloco_proto.codec.formats import Encoded
from diloco_proto.errors import InvalidContribution

MIN_AUTO_GRACE = 2.0
"""Seconds; below it the jitter of healthy workers would cost them their contributions."""

KEPT_RECORDS = 64
"""Rounds of each fragment that are remembered for status."""

KEPT_TIMES = 16

MAX_WEIGHT = 2.0
"""Times the median of a round: a worker that comes back after long must not take the run over."""


@dataclass(frozen=True, slots=True)
class Key:
    """What identifies a contribution within a run."""

    fragment: int
    base_version: int
    worker_id: str


@dataclass(frozen=True, slots=True)
class Contribution:
    """One worker's outer gradient for one fragment against one base version, complete."""

    key: Key
    frames: dict[int, int]
    """First block of each frame -> its xxh3: together the identity of the bytes."""
    payload: Encoded
    tokens: int
    steps: int

    @property
    def weight(self) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Counted:
    """A worker's last counted contribution to a fragment, for ever: while its fate is unknown to the worker it
    pushes no other, so this one settles every repeated push, however late."""

    key: Key
    frames: dict[int, int]


class Stage(Enum):
    """What became of a contribution that arrived."""

    STAGED = auto()
    ALREADY_HAVE = auto()
    COUNTED = auto()
    CLOSED = auto()
    CONFLICT = auto()


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round that is over, kept for repeated pushes and for status."""

    version: int
    """The version it led to."""
    weights: dict[str, float]
    """Worker id -> share of the mean, for each that was counted."""
    expected: frozenset[str]
    open_seconds: float


@dataclass(slots=True)
class Round:
    """The open round of one fragment."""

    version: int
    """The base version; the round leads to the next."""
    expected: set[str]
    opened_at: float
    contributions: dict[str, Contribution] = field(default_factory=dict)
    first_at: float | None = None
    quorum_at: float | None = None
    last_at: float | None = None
    closing: bool = False
    told_stuck: bool = False

    @property
    def missing(self) -> set[str]:
        return self.expected - self.contributions.keys()


@dataclass(frozen=True, slots=True)
class Close:
    """The decision to close a round: its members in worker order."""

    fragment: int
    base_version: int
    contributions: tuple[Contribution, ...]
    weights: tuple[float, ...]


class Rounds:
    """The rounds of all trained fragments of a run.

    `grace` is seconds (may be inf), or None for auto; `uniform` weighs all contributions alike.
    """

    def __init__(self, num_fragments: int, *, min_workers: int, grace: float | None, uniform: bool) -> None:
        self._grace = grace
        self._uniform = uniform
        self._open: list[Round | None] = [None] * num_fragments
        self._fill_times: deque[float] = deque(maxlen=KEPT_TIMES)
        self._open_times: deque[float] = deque(maxlen=KEPT_TIMES)
        self._last_counted: list[dict[str, Counted]] = [{} for _ in range(num_fragments)]
        self.records: list[deque[RoundRecord]] = [deque(maxlen=KEPT_RECORDS) for _ in range(num_fragments)]
        self.floor = min_workers
        """Contributions without which no round closes; the run lowers it as workers end."""

    def open(self, fragment: int, version: int, expected: Iterable[str], now: float) -> None:
        """Open the round version -> version + 1; `expected` are the live, ready workers of this moment."""
        assert self._open[fragment] is None
        self._open[fragment] = Round(version, set(expected), now)

    def round(self, fragment: int) -> Round | None:
        return self._open[fragment]

    def seen_before(self, key: Key, frames: dict[int, int]) -> Stage | None:
        """The fate of a push that need not be received, judged by its frames; None when it is welcome.

        Raises InvalidContribution for a base version that does not exist yet.
        """
        current = self._open[key.fragment]
        if current is None:
            raise InvalidContribution(f"fragment {key.fragment} has no open round yet")
        if key.base_version > current.version:
            raise InvalidContribution(
                f"worker {key.worker_id!r} pushed fragment {key.fragment} against version {key.base_version}, "
                f"but the newest is {current.version}"
            )
        if key.base_version < current.version:
            return self._past(key, frames)
        held = current.contributions.get(key.worker_id)
        if held is not None:
            return Stage.ALREADY_HAVE if frames.items() <= held.frames.items() else Stage.CONFLICT
        return Stage.CLOSED if current.closing else None

    def _past(self, key: Key, frames: dict[int, int]) -> Stage:
        last = self._last_counted[key.fragment].get(key.worker_id)
        if last is None or last.key.base_version != key.base_version:
            return Stage.CLOSED
        return Stage.COUNTED if frames.items() <= last.frames.items() else Stage.CONFLICT

    def stage(self, contribution: Contribution, now: float) -> Stage:
        """Take a complete contribution into the open round, or say why not."""
        key = contribution.key
        known = self.seen_before(key, contribution.frames)
        if known is not None:
            return known
        current = self._open[key.fragment]
        assert current is not None
        current.contributions[key.worker_id] = contribution
        if current.first_at is None:
            current.first_at = now
        current.last_at = now
        self._note_quorum(current, now)
        return Stage.STAGED

    def no_longer_expected(self, worker_id: str, now: float) -> None:
        """The worker died, left or is finishing: nobody waits for it; what it staged stays."""
        for current in self._open:
            if current is not None:
                current.expected.discard(worker_id)
                self._note_quorum(current, now)

    def due(self, now: float) -> list[Close]:
        """Rounds to close now. Each is returned once; `committed` must follow."""
        closes = []
        for fragment, current in enumerate(self._open):
            if current is not None and self._is_due(current, now):
                current.closing = True
                members = tuple(current.contributions[w] for w in sorted(current.contributions))
                closes.append(Close(fragment, current.version, members, self._weights(members)))
        return closes

    def _weights(self, members: Sequence[Contribution]) -> tuple[float, ...]:
        if self._uniform:
            return (1.0,) * len(members)
        cap = MAX_WEIGHT * median(c.weight for c in members)
        return tuple(min(float(c.weight), cap) for c in members)

    def holds(self, worker_id: str) -> bool:
        """A contribution of the worker waits in an open round."""
        return any(current is not None and worker_id in current.contributions for current in self._open)

    @property
    def usual_seconds(self) -> float | None:
        """How long recent rounds were open; None before the first is over."""
        return median(self._open_times) if self._open_times else None

    def tell_again(self) -> None:
        """Somebody came (back) who may not have heard which rounds are stuck."""
        for current in self._open:
            if current is not None:
                current.told_stuck = False

    def stuck(self) -> list[set[str]]:
        """Contributors of rounds in which nobody is missing and that are below the floor; each round once."""
        found = []
        for current in self._open:
            if current is None or current.closing or current.missing or current.told_stuck:
                continue
            if 0 < len(current.contributions) < self.floor:
                current.told_stuck = True
                found.append(set(current.contributions))
        return found

    def next_deadline(self) -> float | None:
        """When a grace runs out, or None when nothing but an event can close a round."""
        deadlines = [
            current.quorum_at + self._grace_now()
            for current in self._open
            if current is not None
            and not current.closing
            and current.quorum_at is not None
            and len(current.contributions) >= self.floor
        ]
        return min(deadlines, default=None)

    def committed(self, close: Close, now: float) -> RoundRecord:
        """The round of `close` is over; the caller opens the next."""
        current = self._open[close.fragment]
        assert current is not None
        assert current.closing
        assert current.version == close.base_version
        if not current.missing and current.first_at is not None and current.last_at is not None:
            self._fill_times.append(current.last_at - current.first_at)
        self._open_times.append(now - current.opened_at)
        total = sum(close.weights)
        record = RoundRecord(
            version=close.base_version + 1,
            weights={c.key.worker_id: w / total for c, w in zip(close.contributions, close.weights, strict=True)},
            expected=frozenset(current.expected),
            open_seconds=now - current.opened_at,
        )
        self.records[close.fragment].append(record)
        for c in close.contributions:
            self._last_counted[close.fragment][c.key.worker_id] = Counted(c.key, c.frames)
        self._open[close.fragment] = None
        return record

    @property
    def idle(self) -> bool:
        """No contribution is waiting anywhere."""
        return all(current is None or not current.contributions for current in self._open)

    def _note_quorum(self, current: Round, now: float) -> None:
        quorum = max(self.floor, -(-len(current.expected) // 2))
        if current.quorum_at is None and len(current.contributions) >= quorum:
            current.quorum_at = now

    def _grace_now(self) -> float:
        if self._grace is not None:
            return self._grace
        return max(MIN_AUTO_GRACE, median(self._fill_times)) if self._fill_times else MIN_AUTO_GRACE

    def _is_due(self, current: Round, now: float) -> bool:
        if current.closing or len(current.contributions) < self.floor:
            return False
        if not current.missing:
            return True
        return current.quorum_at is not None and now >= current.quorum_at + self._grace_now()
