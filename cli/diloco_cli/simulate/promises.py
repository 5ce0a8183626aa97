"""All promises, checked after every event of a simulated run."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable

from diloco_client.flights import Arrival, Base, Flight
from diloco_client.replica import NEVER
from diloco_proto import outer_pb2 as pb
from diloco_server.config import RunConfig
from diloco_server.model import Committed
from diloco_server.run import Run

from .booked import BookedTrainer
from .broken import BrokenPromise
from .clock import Clock
from .ledger import Ledger
from .link import VirtualLink
from .oracle import Oracle
from .parcels import Parcel
from .patience import Patience
from .revival import Revived
from .watch import Watch


class Promises(Watch):
    """Raises BrokenPromise when one does not hold. `log` gets a line for what is worth one; None: nothing."""

    def __init__(self, config: RunConfig, clock: Clock, log: list[str] | None = None) -> None:
        self.config = config
        self.clock = clock
        self.log = log
        self.ledger = Ledger(config.asynchronous, config.max_away)
        self.oracles: list[Oracle] = []
        self.counts: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        """To contributions."""
        self.failed: list[VirtualLink] = []
        self.parcels: list[Parcel] = []
        """All contributions that were sent off."""
        self._met: list[VirtualLink] = []
        """Those that have flushed together, and were not looked at yet."""
        self._former: dict[str, list[list[bytes]]] = {}
        """Run id before the run went back -> the history of every fragment until then."""
        self._limits: dict[int, int] = {}
        """The highest staleness limit of each fragment since its last outer step."""
        self.trace = 0
        """A checksum of all events and their times."""

    def begin(self, run: Run, position: Callable[[], int] = lambda: 0) -> None:
        """Watch this run. `position` is that of its disk."""
        self.run = run
        self._position = position
        self.patience = Patience(self.config, run, self.clock)

    def count(self, kind: str) -> None:
        self.counts[kind] += 1
        self.trace = zlib.crc32(f"{kind} {self.clock.now!r}".encode(), self.trace)

    def note(self, text: str) -> None:
        if self.log is not None:
            self.log.append(f"{self.clock.now:10.3f}  {text}")

    # -- on the server --

    def attached(self, worker_id: str, generation: int) -> None:
        new = self.ledger.newest.get(worker_id) != generation
        self.ledger.attached(worker_id, generation, self._position())
        self.patience.attached(worker_id, new)
        self.note(f"{worker_id}#{generation} is attached")

    def heard(self, worker_id: str, generation: int, request: pb.SessionRequest) -> None:
        self.ledger.fence(worker_id, generation)
        self.patience.heard(worker_id, request, self._position())
        if not request.HasField("heartbeat"):
            self.note(f"{worker_id}#{generation} says {request.WhichOneof('body')}")

    def cut(self, worker_id: str) -> None:
        self.patience.cut(worker_id)

    def admitted(self, header: pb.PushHeader) -> None:
        self.ledger.fence(header.worker_id, header.generation)
        if header.run_id != self.run.run_id:
            text = f"a push to {header.run_id} is taken by {self.run.run_id}"
            raise BrokenPromise(6, text, worker_id=header.worker_id, fragment=header.fragment)

    def answered(self, header: pb.PushHeader, outcome: pb.Outcome) -> None:
        if header.purpose != pb.PURPOSE_CONTRIBUTION:
            return
        if self.log is not None:
            self.note(
                f"{header.worker_id}#{header.generation} pushed fragment {header.fragment} against version "
                f"{header.base_version}: {pb.OutcomeKind.Name(outcome.kind)}"
            )
        self.answers[pb.OutcomeKind.Name(outcome.kind).removeprefix("OUTCOME_").lower().replace("_", " ")] += 1
        self.ledger.answered(header, outcome, self.run.parameters.version(header.fragment))
        if outcome.kind == pb.OUTCOME_STAGED:
            self._check_stale(header)
            self.patience.staged(header.fragment)
            self.patience.moved(header.worker_id)

    def acknowledged(self, header: pb.PushHeader, outcome: pb.Outcome) -> None:
        if header.purpose == pb.PURPOSE_CONTRIBUTION:
            self.ledger.acknowledge(header, outcome)

    def _check_stale(self, header: pb.PushHeader) -> None:
        limit = 0
        if self.config.asynchronous:
            auto = self.config.max_staleness == "auto"
            limit = 4 * len(self.run.members.live()) if auto else int(self.config.max_staleness)
        if self.run.parameters.version(header.fragment) - header.base_version > limit:
            text = f"a contribution against version {header.base_version} is taken"
            raise BrokenPromise(6, text, worker_id=header.worker_id, fragment=header.fragment)

    def committed(self, committed: Committed) -> None:
        self.patience.committed(committed.close.fragment, self._enter(committed))

    def _enter(self, committed: Committed) -> list[str]:
        """A new version; returns whose contributions it was made of."""
        close = committed.close
        entered = self.ledger.committed(committed)
        names = [p.worker_id for p in entered]
        self.note(f"fragment {close.fragment} comes to version {close.base_version + 1} by {', '.join(names)}")
        self.oracles[close.fragment].check(committed, entered, close.delay)
        self._limits[close.fragment] = 0
        return names

    def settled(self) -> None:
        run = self.run
        if not run.seeded:
            return
        if not self.oracles:
            self._start_oracles()
        self.patience.check(self._position())
        self._check_memory()

    def stood_still(self, seconds: float) -> None:
        self.patience.stood_still(seconds)

    def restarted(self, revived: Revived) -> None:
        """What was acknowledged is there, to the bit; but not what an earlier state did not have."""
        former, self.run = self.run.run_id, revived.run
        run = self.run
        self.note(f"the server is back, as {run.run_id}, with {len(revived.remade)} outer steps made again")
        for committed in revived.remade:
            fragment, version = committed.close.fragment, committed.update.version
            if version < len(self.oracles[fragment].history):
                self.oracles[fragment].check_again(committed)
            else:  # it was decided, and not made before
                self._enter(committed)
        if revived.back is not None:
            self._former[former] = [list(oracle.history) for oracle in self.oracles]
            self._go_back(revived)
        for fragment, oracle in enumerate(self.oracles):
            oracle.check_state(run.parameters.version(fragment), run.parameters.state(fragment).theta)
        afresh = revived.back is not None
        self.ledger.restarted(run.rounds.waiting(), revived.kept, afresh=afresh)
        self.patience.restarted(run, revived.kept, self._position(), afresh=afresh)

    def _go_back(self, revived: Revived) -> None:
        self._check_together()
        for fragment, oracle in enumerate(self.oracles):
            newest = len(oracle.history) - 1
            small = next(f for f in revived.saved.snapshot.fragments if f.fragment == fragment)
            until = revived.back.version if revived.back else None
            version = min(newest, small.version if until is None else until)
            oracle.go_back(version)
            self.ledger.go_back(fragment, version)

    def _start_oracles(self) -> None:
        for fragment in self.run.layout.fragments:
            snapshot = self.run.parameters.pin(fragment.index)
            assert snapshot.theta is not None
            self.oracles.append(Oracle(self.config, fragment, snapshot.theta))
            self.run.parameters.unpin(snapshot)

    def _check_memory(self) -> None:
        """Promise 7: what is incomplete or waits is what live or late workers may have under way, once each."""
        model = self.run.model
        for fragment in range(model.layout.num_scheduled):
            self._limits[fragment] = max(model.rounds.staleness_limit, self._limits.get(fragment, 0))
        held: Counter[tuple[int, str]] = Counter()
        for key in model.pushes._assemblies:
            held[key.fragment, key.worker_id] += 1
            limit = self._limits[key.fragment]
            if key.base_version < model.parameters.version(key.fragment) - limit:
                text = "an incomplete contribution to a round that is over is kept"
                raise BrokenPromise(7, text, worker_id=key.worker_id, fragment=key.fragment)
        for (fragment, worker_id), count in held.items():
            if count > self._limits[fragment] + 1:
                raise BrokenPromise(7, f"{count} incomplete contributions", worker_id=worker_id, fragment=fragment)

    # -- in a worker --

    def pushed(self, link: VirtualLink, flight: Flight, headers: list[pb.PushHeader]) -> None:
        assert isinstance(link.trainer, BookedTrainer)
        link.trainer.book(flight, headers, flight.due_step != NEVER)
        self.parcels += link.parcels[flight.fragment]

    def arrived(self, link: VirtualLink, fragment: int, base: Base) -> None:
        # It may still get what a server sent that has gone back since.
        former = self._former.get(link.run_id)
        history = self.oracles[fragment].history if former is None else former[fragment]
        if base.version >= len(history) or base.theta.tobytes() != history[base.version]:
            text = f"its version {base.version} is not the server's"
            raise BrokenPromise(1, text, worker_id=link.worker_id, fragment=fragment)

    def failed_with(self, link: VirtualLink) -> None:
        self.failed.append(link)

    def met(self, link: VirtualLink) -> None:
        self._met.append(link)

    def took(self, link: VirtualLink, fragment: int, old: Base, arrival: Arrival) -> None:
        assert isinstance(link.trainer, BookedTrainer)
        link.trainer.expect(fragment, old, arrival)

    # -- at the end --

    def check_end(self, links: list[VirtualLink]) -> None:
        """All is over. These have flushed."""
        for link in links:
            assert isinstance(link.trainer, BookedTrainer)
            link.trainer.check_end()
        self._check_together()

    def _check_together(self) -> None:
        """Those that have flushed together hold the same."""
        for link in self._met:
            for fragment, oracle in enumerate(self.oracles):
                assert isinstance(link.trainer, BookedTrainer)
                assert link.final is not None
                scheduled = fragment < link.layout.num_scheduled
                version = link.bases[fragment].version if scheduled else 0
                same = link.trainer.locals[fragment].tobytes() == oracle.history[version]
                if not same or version < link.final.get(fragment, 0):
                    text = "after the flush together it does not hold the global parameters"
                    raise BrokenPromise(1, text, worker_id=link.worker_id, fragment=fragment)
        self._met.clear()
