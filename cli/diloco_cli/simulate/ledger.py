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
from diloco_server.round import Contribution

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
    undone: dict[Pushed, int] = field(default_factory=dict)
    """Counted once, until the run went back to an earlier version."""
    _acknowledged: set[Pushed] = field(default_factory=set)
    """Of those that wait."""
    _admitted: list[tuple[int, str, int]] = field(default_factory=list)
    """Position on disk, worker and generation of every hello."""
    _by_key: dict[tuple[int, int, str], list[Pushed]] = field(default_factory=lambda: defaultdict(list))
    _steps: dict[tuple[str, int, int], set[int]] = field(default_factory=lambda: defaultdict(set))
    """(worker, generation, fragment) -> the inner steps that were counted."""
    _undone_steps: dict[tuple[str, int, int], set[int]] = field(default_factory=lambda: defaultdict(set))

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

    def steps_undone(self, worker_id: str, generation: int, fragment: int) -> set[int]:
        """Those that were counted in versions that are no more."""
        return self._undone_steps[worker_id, generation, fragment]

    def version_of(self, pushed: Pushed) -> int | None:
        """The version in which it was counted, be it undone since; None if it never was."""
        return self.counted.get(pushed, self.undone.get(pushed))

    # -- generations --

    def attached(self, worker_id: str, generation: int, position: int) -> None:
        """`position`: of the server's disk, by then."""
        self.fence(worker_id, generation)
        self.newest[worker_id] = generation
        self._admitted.append((position, worker_id, generation))

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

    def acknowledge(self, header: pb.PushHeader, outcome: pb.Outcome) -> None:
        """The outcome is on its way to the worker."""
        if outcome.kind in (pb.OUTCOME_STAGED, pb.OUTCOME_ALREADY_HAVE):
            self._acknowledged.add(self.of_header(header))

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
            self._acknowledged.discard(pushed)
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

    # -- when the server dies --

    def restarted(self, waiting: Iterable[Contribution], kept: int, afresh: bool) -> None:
        """The server is back, with what was on disk up to the position `kept`, and these wait to be counted. `afresh`:
        it went back to an earlier state, and nothing waits that did."""
        held = {self.find(c.key.fragment, c.key.base_version, c.key.worker_id, c.frames.items()) for c in waiting}
        if afresh:
            self.staged.clear()
            self._acknowledged.clear()
        for fragment, staged in self.staged.items():
            for pushed in [p for p in staged if p not in held]:
                if pushed in self._acknowledged:
                    text = "it was acknowledged, and is gone after a restart of the server"
                    raise BrokenPromise(3, text, worker_id=pushed.worker_id, fragment=fragment)
                del staged[pushed]
        for pushed in held:
            if pushed not in self.staged[pushed.fragment]:
                text = "after a restart of the server it waits to be counted, as it did not before"
                raise BrokenPromise(3, text, worker_id=pushed.worker_id, fragment=pushed.fragment)
        self._admitted = [a for a in self._admitted if a[0] <= kept]
        self.newest = {worker_id: generation for _, worker_id, generation in self._admitted}

    def go_back(self, fragment: int, version: int) -> None:
        """What was counted in later versions than this is undone."""
        for pushed in [p for p, v in self.counted.items() if p.fragment == fragment and v > version]:
            self.undone[pushed] = self.counted.pop(pushed)
            key = pushed.worker_id, pushed.generation, fragment
            self._steps[key] -= pushed.steps
            self._undone_steps[key] |= pushed.steps
