"""All promises, checked after every event of a simulated run."""

from __future__ import annotations

import zlib
from collections import Counter

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
        self._limits: dict[int, int] = {}
        """The highest staleness limit of each fragment since its last outer step."""
        self.trace = 0
        """A checksum of all events and their times."""

    def begin(self, run: Run) -> None:
        """Watch this run."""
        self.run = run
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
        self.ledger.attached(worker_id, generation)
        self.patience.attached(worker_id, new)
        self.note(f"{worker_id}#{generation} is attached")

    def heard(self, worker_id: str, generation: int, request: pb.SessionRequest) -> None:
        self.ledger.fence(worker_id, generation)
        self.patience.heard(worker_id, request)
        if not request.HasField("heartbeat"):
            self.note(f"{worker_id}#{generation} says {request.WhichOneof('body')}")

    def cut(self, worker_id: str) -> None:
        self.patience.cut(worker_id)

    def admitted(self, header: pb.PushHeader) -> None:
        self.ledger.fence(header.worker_id, header.generation)

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

    def _check_stale(self, header: pb.PushHeader) -> None:
        limit = 0
        if self.config.asynchronous:
            auto = self.config.max_staleness == "auto"
            limit = 4 * len(self.run.members.live()) if auto else int(self.config.max_staleness)
        if self.run.parameters.version(header.fragment) - header.base_version > limit:
            text = f"a contribution against version {header.base_version} is taken"
            raise BrokenPromise(6, text, worker_id=header.worker_id, fragment=header.fragment)

    def committed(self, committed: Committed) -> None:
        close = committed.close
        entered = self.ledger.committed(committed)
        names = [p.worker_id for p in entered]
        self.note(f"fragment {close.fragment} comes to version {close.base_version + 1} by {', '.join(names)}")
        self.oracles[close.fragment].check(committed, entered, close.delay)
        self.patience.committed(close.fragment, names)
        self._limits[close.fragment] = 0

    def settled(self) -> None:
        run = self.run
        if not run.seeded:
            return
        if not self.oracles:
            self._start_oracles()
        self.patience.check()
        self._check_memory()

    def stood_still(self, seconds: float) -> None:
        self.patience.stood_still(seconds)

    def _start_oracles(self) -> None:
        for fragment in self.run.layout.fragments:
            snapshot = self.run.parameters.pin(fragment.index)
            assert snapshot.theta is not None
            self.oracles.append(Oracle(self.config, fragment, snapshot.theta))
            self.run.parameters.unpin(snapshot)

    def _check_memory(self) -> None:
        """Promise 7: what is incomplete or waits is what live or late workers may have under way, once each."""
        model = self.run._must_have_model()
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
        history = self.oracles[fragment].history
        if base.version >= len(history) or base.theta.tobytes() != history[base.version]:
            text = f"its version {base.version} is not the server's"
            raise BrokenPromise(1, text, worker_id=link.worker_id, fragment=fragment)

    def failed_with(self, link: VirtualLink) -> None:
        self.failed.append(link)

    def took(self, link: VirtualLink, fragment: int, old: Base, arrival: Arrival) -> None:
        assert isinstance(link.trainer, BookedTrainer)
        link.trainer.expect(fragment, old, arrival)

    # -- at the end --

    def check_end(self, links: list[VirtualLink], together: list[VirtualLink]) -> None:
        """All is over. `links` have flushed, `together` all at the same time."""
        for link in links:
            assert isinstance(link.trainer, BookedTrainer)
            link.trainer.check_end()
        for fragment, oracle in enumerate(self.oracles):
            for link in together:
                assert isinstance(link.trainer, BookedTrainer)
                assert link.final is not None
                scheduled = fragment < link.layout.num_scheduled
                version = link.bases[fragment].version if scheduled else 0
                same = link.trainer.locals[fragment].tobytes() == oracle.history[version]
                if not same or version < link.final.get(fragment, 0):
                    text = "after the flush together it does not hold the global parameters"
                    raise BrokenPromise(1, text, worker_id=link.worker_id, fragment=fragment)
