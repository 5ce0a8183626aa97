"""Rounds: which contributions make one outer step of a fragment, and when. Pure: time is passed in, in seconds.

A round takes a fragment from version v to v + 1. A synchronous one closes when every expected worker has
contributed or is gone, or when the quorum has contributed and the grace has passed. Its result depends on the set
of contributions alone: members are sorted by worker id, whatever the order of arrival. An asynchronous one closes
with its first contribution, which may be against an older version; those that arrive meanwhile are next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from diloco_proto.errors import InvalidContribution, NotReady

from .round import Close, Contribution, Counted, Key, Round, RoundMember, RoundRecord, Stage
from .weights import Weights

MIN_AUTO_GRACE = 2.0
"""Seconds; below it the jitter of healthy workers would cost them their contributions."""

KEPT_RECORDS = 64
"""Rounds of each fragment that are remembered for status."""

KEPT_TIMES = 16


class Rounds:
    """The rounds of all scheduled fragments of a run.

    `grace` is seconds (may be inf), or None for auto. `weights` has one entry a fragment.
    """

    def __init__(
        self, weights: list[Weights], *, min_workers: int, grace: float | None, asynchronous: bool = False
    ) -> None:
        count = len(weights)
        self._grace = grace
        self.weights = weights
        self._asynchronous = asynchronous
        self._open: list[Round | None] = [None] * count
        self._next: list[dict[str, Contribution]] = [{} for _ in range(count)]
        """Asynchronous: what arrived while a round was closing."""
        self._fill_times: deque[float] = deque(maxlen=KEPT_TIMES)
        self._open_times: deque[float] = deque(maxlen=KEPT_TIMES)
        self.last_counted: list[dict[str, Counted]] = [{} for _ in range(count)]
        """Of each fragment, by worker."""
        self.records: list[deque[RoundRecord]] = [deque(maxlen=KEPT_RECORDS) for _ in range(count)]
        self.floor = 1 if asynchronous else min_workers
        """Contributions without which no round closes; the run lowers it as workers end."""
        self.staleness_limit = 0
        """Versions that a contribution's base may lag behind."""

    def open(self, fragment: int, version: int, expected: Iterable[str], now: float) -> None:
        """Open the round version -> version + 1; `expected` are the live, ready workers of this moment."""
        assert self._open[fragment] is None
        current = self._open[fragment] = Round(version, set() if self._asynchronous else set(expected), now)
        current.nobody = not current.expected
        waiting = self._next[fragment]
        if waiting:
            first = next(iter(waiting))
            self._take(current, waiting.pop(first), now)

    def round(self, fragment: int) -> Round | None:
        return self._open[fragment]

    def seen_before(self, key: Key, frames: dict[int, int]) -> Stage | None:
        """The fate of a push that need not be received, judged by its frames; None when it is welcome.

        Raises InvalidContribution for a base version that does not exist yet, NotReady while no round was opened.
        """
        current = self._open[key.fragment]
        if current is None:
            raise NotReady(f"fragment {key.fragment} has no open round yet")
        if key.base_version > current.version:
            raise InvalidContribution(
                f"worker {key.worker_id!r} pushed fragment {key.fragment} against version {key.base_version}, "
                f"but the newest is {current.version}"
            )
        for held in (current.contributions.get(key.worker_id), self._next[key.fragment].get(key.worker_id)):
            if held is not None and (held.key == key or self._asynchronous):
                same = held.key == key and frames.items() <= held.frames.items()
                return Stage.ALREADY_HAVE if same else Stage.CONFLICT
        last = self.last_counted[key.fragment].get(key.worker_id)
        if last is not None and last.key == key:
            return Stage.COUNTED if frames.items() <= last.frames.items() else Stage.CONFLICT
        if key.base_version < current.version - self.staleness_limit:
            return Stage.CLOSED
        if last is not None and key.base_version < last.version:
            return (
                Stage.CLOSED
            )  # its base does not have this worker's last counted steps yet: it would bring them again
        return Stage.CLOSED if current.closing and not self._asynchronous else None

    def stage(self, contribution: Contribution, now: float) -> Stage:
        """Take a complete contribution into the open round, or say why not."""
        key = contribution.key
        known = self.seen_before(key, contribution.frames)
        if known is not None:
            return known
        self.restage(contribution, now)
        return Stage.STAGED

    def restage(self, contribution: Contribution, now: float) -> None:
        """Take a contribution that was staged before a restart: nobody judges it again, however old it is by now."""
        key = contribution.key
        current = self._open[key.fragment]
        assert current is not None
        if current.closing or (self._asynchronous and current.contributions):
            self._next[key.fragment][key.worker_id] = contribution
        else:
            self._take(current, contribution, now)

    def _take(self, current: Round, contribution: Contribution, now: float) -> None:
        current.contributions[contribution.key.worker_id] = contribution
        current.told_stuck = False  # this worker has not heard it
        if current.first_at is None:
            current.first_at = now
        current.last_at = now
        self._note_quorum(current, now)

    def no_longer_expected(self, worker_id: str, now: float) -> None:
        """The worker died, left or is finishing: nobody waits for it; what it staged stays."""
        for current in self._open:
            if current is not None:
                current.expected.discard(worker_id)
                self._note_quorum(current, now)

    def due(self, now: float, delay: int = 1) -> list[Close]:
        """Rounds to close now. Each is returned once; `committed` must follow. `delay` goes into each Close."""
        closes = []
        for fragment, current in enumerate(self._open):
            if current is not None and self._is_due(current, now):
                current.closing = True
                closes.append(self._close(fragment, current, now, delay))
        return closes

    def _close(self, fragment: int, current: Round, now: float, delay: int) -> Close:
        members = tuple(current.contributions[w] for w in sorted(current.contributions))
        weights = self.weights[fragment]
        if self._asynchronous:
            each: tuple[float, ...] = (weights.of_step(members[0], current.version),)
        else:
            each = weights.of_round(members)
        return Close(
            fragment=fragment,
            base_version=current.version,
            contributions=members,
            weights=each,
            scales=weights.scales(members),
            closed_at=now,
            delay=delay,
        )

    def reclose(self, close: Close) -> None:
        """Close the open round again as it was once decided; `committed` must follow."""
        current = self._open[close.fragment]
        assert current is not None
        assert current.version == close.base_version
        current.contributions = {c.key.worker_id: c for c in close.contributions}
        current.closing = True

    def expect(self, fragment: int, workers: Iterable[str], now: float, *, nobody: bool) -> None:
        """The open round waits for these, from now on, as if it opened now; `nobody`: no worker was ready then."""
        current = self._open[fragment]
        assert current is not None
        current.expected = set() if self._asynchronous else set(workers)
        current.nobody, current.opened_at = nobody, now
        self._note_quorum(current, now)

    def forget_times(self) -> None:
        """How long rounds took is not known any more."""
        self._fill_times.clear()
        self._open_times.clear()

    def await_too(self, worker_id: str) -> None:
        """A worker is ready: rounds for which nobody was ready yet, and that have nothing, are its rounds too."""
        for current in self._open:
            if current is not None and current.nobody and not current.contributions and not self._asynchronous:
                current.expected.add(worker_id)

    def forget(self, members: set[str]) -> None:
        """Nothing is remembered of workers that are none of these."""
        for counted in self.last_counted:
            for worker_id in counted.keys() - members:
                del counted[worker_id]

    def waiting(self) -> list[Contribution]:
        """Contributions whose round is not over yet."""
        rounds = [list(r.contributions.values()) for r in self._open if r is not None]
        return [c for group in (*rounds, *(list(later.values()) for later in self._next)) for c in group]

    def standing(self, fragment: int, worker_id: str) -> tuple[int | None, int | None]:
        """Base versions of the worker's last counted contribution, and of the one whose round is not over; None if
        there is none."""
        current, counted = self._open[fragment], self.last_counted[fragment].get(worker_id)
        staged = self._next[fragment].get(worker_id)
        if staged is None and current is not None:
            staged = current.contributions.get(worker_id)
        return counted.key.base_version if counted else None, staged.key.base_version if staged else None

    def holds(self, worker_id: str) -> bool:
        """A contribution of the worker waits in an open round."""
        return any(current is not None and worker_id in current.contributions for current in self._open)

    def in_circle(self) -> set[str]:
        """Workers whose contributions wait in rounds that wait for each other: none of them may go on by itself.

        Workers that were out of reach for a while can be at different fragments of a period. Each then waits for the
        fate of a contribution in a round that waits for the other's.
        """
        waiting = [r for r in self._open if r is not None and not r.closing and r.missing]
        while True:
            held = {w for r in waiting for w in r.contributions}
            still = [r for r in waiting if r.missing & held]
            if len(still) == len(waiting):
                return {w for r in waiting for w in r.missing & held}
            waiting = still

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
        ends = [self.grace_end(fragment) for fragment in range(len(self._open))]
        return min((end for end in ends if end is not None), default=None)

    def grace_end(self, fragment: int) -> float | None:
        """When the grace of the open round runs out (may be inf), or None while it has not begun."""
        current = self._open[fragment]
        if current is None or current.closing or current.quorum_at is None or len(current.contributions) < self.floor:
            return None
        return current.quorum_at + self._grace_now()

    def committed(self, close: Close, now: float) -> RoundRecord:
        """The round of `close` is over; the caller opens the next."""
        current = self._open[close.fragment]
        assert current is not None
        assert current.closing
        assert current.version == close.base_version
        if not current.missing and current.first_at is not None and current.last_at is not None:
            self._fill_times.append(current.last_at - current.first_at)
        self._open_times.append(now - current.opened_at)
        record = self._record(close, current, now)
        self.records[close.fragment].append(record)
        self.weights[close.fragment].counted(close.contributions, close.scales, close.base_version)
        for c in close.contributions:
            counted = Counted(c.key, c.frames, close.base_version + 1)
            self.last_counted[close.fragment][c.key.worker_id] = counted
        self._open[close.fragment] = None
        return record

    def _record(self, close: Close, current: Round, now: float) -> RoundRecord:
        total = 1.0 if self._asynchronous else sum(close.weights)
        members = tuple(
            RoundMember(
                worker_id=c.key.worker_id,
                weight=weight / total,
                norm=c.norm,
                scale=scale,
                waited_seconds=close.closed_at - c.arrived,
                tokens=c.tokens,
                steps=c.steps,
                staleness=close.base_version - min(c.since_version, close.base_version),
            )
            for c, weight, scale in zip(close.contributions, close.weights, close.scales, strict=True)
        )
        missed = current.expected - {m.worker_id for m in members}
        first, last, quorum = current.first_at, current.last_at, current.quorum_at
        return RoundRecord(
            version=close.base_version + 1,
            members=members,
            missed=tuple(sorted(missed)),
            open_seconds=now - current.opened_at,
            fill_seconds=0.0 if first is None or last is None else last - first,
            grace_seconds=0.0 if quorum is None else max(0.0, close.closed_at - quorum),
        )

    @property
    def idle(self) -> bool:
        """No contribution is waiting anywhere."""
        return all(current is None or not current.contributions for current in self._open) and not any(self._next)

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
