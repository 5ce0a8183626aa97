"""What the simulation knows of every contribution: the inner steps in it, and what became of it (promise 3).

A contribution is known by what identifies its bytes. All is taken from what the server does and answers, nothing from
what workers believe.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec.formats import Floats
from diloco_server.model import Committed

from .broken import BrokenPromise

FrameSet = frozenset[tuple[int, int]]
"""(first block, xxh3) of some frames."""


@dataclass(slots=True, eq=False, kw_only=True)
class Pushed:
    """One contribution that a worker, or somebody in its name, has sent off."""

    worker_id: str
    generation: int
    fragment: int
    base_version: int
    frames: FrameSet
    tokens: int
    since_version: int
    decoded: Floats
    delta: Floats | None = None
    """Δ as it was captured; None for one that no worker made."""
    next_residual: Floats | None = None
    steps: frozenset[int] = frozenset()
    """The inner steps of that process in it."""
    step: int = 0
    """How many inner steps the process had taken when it was captured."""
    due: bool = True
    """Pushed by schedule, not as a remainder."""
    resync: bool = False
    """The server answered that the worker was away for too long."""
    settled: bool | None = None
    """What the worker took for its fate, once it merged."""


@dataclass(slots=True)
class Ledger:
    """All contributions of a run. `asynchronous`, `max_away`: as in the run's config."""

    asynchronous: bool
    max_away: int
    newest: dict[str, int] = field(default_factory=dict)
    """Worker -> generation of its newest process that was admitted."""
    counted: dict[Pushed, int] = field(default_factory=dict)
    """Contribution -> the version that it led to."""
    staged: dict[int, dict[Pushed, int]] = field(default_factory=lambda: defaultdict(dict))
    """Fragment -> those that were acknowledged and wait, and the version they will be counted on."""
    _by_key: dict[tuple[int, int, str], list[Pushed]] = field(default_factory=lambda: defaultdict(list))
    _steps: dict[tuple[str, int, int], set[int]] = field(default_factory=lambda: defaultdict(set))
    """(worker, generation, fragment) -> the inner steps that were counted."""

    def note(self, pushed: Pushed) -> None:
        """It begins its way."""
        self._by_key[pushed.fragment, pushed.base_version, pushed.worker_id].append(pushed)

    def find(self, fragment: int, base_version: int, worker_id: str, frames: Iterable[tuple[int, int]]) -> Pushed:
        """The contribution of which these frames are."""
        some = frozenset(frames)
        for pushed in self._by_key[fragment, base_version, worker_id]:
            if some <= pushed.frames:
                return pushed
        raise BrokenPromise(2, "the server holds bytes that nobody sent", worker_id=worker_id, fragment=fragment)

    def of_header(self, header: pb.PushHeader) -> Pushed:
        frames = zip((p.first_block for p in header.parts), header.frame_digests, strict=True)
        return self.find(header.fragment, header.base_version, header.worker_id, frames)

    def steps_counted(self, worker_id: str, generation: int, fragment: int) -> set[int]:
        return self._steps[worker_id, generation, fragment]

    # -- generations --

    def attached(self, worker_id: str, generation: int) -> None:
        self.fence(worker_id, generation)
        self.newest[worker_id] = generation

    def fence(self, worker_id: str, generation: int) -> None:
        """The server has listened to this process."""
        if generation < self.newest.get(worker_id, 0):
            text = f"generation {generation} was admitted after generation {self.newest[worker_id]}"
            raise BrokenPromise(3, text, worker_id=worker_id)

    # -- what the server does --

    def answered(self, header: pb.PushHeader, outcome: pb.Outcome, version: int) -> None:
        """A push of a contribution got its outcome, while the fragment was at `version`."""
        pushed = self.of_header(header)
        fragment, kind = pushed.fragment, outcome.kind
        waits, counted = pushed in self.staged[fragment], pushed in self.counted

        def check(good: bool, text: str) -> None:
            if not good:
                said = f"was answered {pb.OutcomeKind.Name(kind)} although {text}"
                raise BrokenPromise(3, said, worker_id=pushed.worker_id, fragment=fragment)

        if kind == pb.OUTCOME_STAGED:
            check(not counted, "it was counted before")
            check(not waits, "it waits already")
            check(pushed.settled is None, "the worker took it back")
            self.staged[fragment][pushed] = version
        elif kind == pb.OUTCOME_ALREADY_HAVE:
            check(waits, "it does not wait to be counted")
        elif kind == pb.OUTCOME_COUNTED:
            check(counted, "it was not counted")
            check(outcome.version >= self.counted.get(pushed, 0), "it was counted later")
        elif kind in (pb.OUTCOME_CLOSED, pb.OUTCOME_CONFLICT, pb.OUTCOME_RESYNC):
            # Who asks again after it was told gets what is true of its newest contribution; nobody listens.
            check(not counted or pushed.settled is not None, "it was counted")
            check(not waits, "it waits to be counted")
            if kind == pb.OUTCOME_RESYNC:
                check(version - pushed.since_version > self.max_away, "its worker was not away for long")
                pushed.resync = True

    def committed(self, committed: Committed) -> list[Pushed]:
        """An outer step was made; returns its contributions, in its order."""
        close = committed.close
        fragment, waiting = close.fragment, self.staged[close.fragment]
        entered = [self.find(fragment, c.key.base_version, c.key.worker_id, c.frames.items()) for c in committed.staged]
        for pushed in entered:
            self._check_may_count(pushed, close.base_version)
        left = [p for p in waiting if p not in entered]
        if left and not self.asynchronous:
            raise BrokenPromise(
                3, "it was acknowledged and is not in its round", worker_id=left[0].worker_id, fragment=fragment
            )
        for pushed in entered:
            del waiting[pushed]
        if close.contributions:
            for pushed in entered:
                self._count(pushed, close.base_version + 1)
        return entered if close.contributions else []

    def _check_may_count(self, pushed: Pushed, version: int) -> None:
        def check(good: bool, text: str) -> None:
            if not good:
                raise BrokenPromise(3, text, worker_id=pushed.worker_id, fragment=pushed.fragment)

        check(pushed not in self.counted, "the same contribution is counted twice")
        check(pushed in self.staged[pushed.fragment], "it is counted without having been acknowledged")
        check(pushed.settled is None, "it is counted after its worker took it back")
        if not self.asynchronous:
            check(pushed.base_version == version, f"it is against version {pushed.base_version}, not {version}")

    def _count(self, pushed: Pushed, version: int) -> None:
        self.counted[pushed] = version
        known = self.steps_counted(pushed.worker_id, pushed.generation, pushed.fragment)
        twice = known & pushed.steps
        if twice:
            text = f"inner steps {min(twice)} to {max(twice)} are counted twice"
            raise BrokenPromise(3, text, worker_id=pushed.worker_id, fragment=pushed.fragment)
        known |= pushed.steps
