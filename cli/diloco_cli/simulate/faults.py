"""The kinds of fault, and how each is done to a simulated run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from diloco_client.flights import Flight
from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import PROTOCOL_VERSION
from diloco_proto.codec import Encoded, encode_fragment, reference
from diloco_proto.errors import DilocoError, ManifestMismatch, RunMismatch
from diloco_proto.manifest import Manifest, Role, TensorSpec
from diloco_proto.wire import manifest_to_pb
from diloco_server.pushes import Ticket

from .booked import BookedTrainer
from .broken import BrokenPromise
from .ledger import Pushed
from .outages import KINDS
from .parcels import Parcel, parcels_of
from .spoilt import SPOILT
from .worker import VirtualWorker

if TYPE_CHECKING:
    from .world import World

MOST_ALIVE = 9
"""Processes; no more join then."""

TRIES = 12
"""Kinds that are tried until one can be done."""


class Faults:
    """Does faults to a world. Each kind says whether it could be done."""

    def __init__(self, world: World) -> None:
        self.counts: Counter[str] = Counter()
        self._world = world
        self._rng = world.rng
        self._kinds: dict[str, tuple[int, Callable[[], bool]]] = {
            "late join": (2, self._join),
            "kill": (2, lambda: self._kill(restart=False)),
            "kill and restart": (4, lambda: self._kill(restart=True)),
            "kill and replacement": (2, self._replace),
            "second process": (2, self._second_process),
            "short freeze": (3, lambda: self._freeze(0.1, 0.8)),
            "long freeze": (3, lambda: self._freeze(1.1, 2.5)),
            "hang": (3, self._hang),
            "noticed cut": (5, lambda: self._cut(noticed=True)),
            "unnoticed cut": (5, lambda: self._cut(noticed=False)),
            "long cut": (2, lambda: self._cut(noticed=self._rng.random() < 0.5, long=True)),
            "cut with messages late": (6, lambda: self._cut(noticed=self._rng.random() < 0.3, late=True)),
            "repeated push": (7, self._repeat),
            "push of other bytes": (8, self._forge),
            "half a push": (7, self._half),
            "worker with another model": (2, self._stranger),
            "invalid push": (4, self._invalid),
            "huge gradient": (2, self._blow_up),
            "slow outer step": (3, self._slow_commit),
            "server stands still": (2, self._stall),
            "finish": (2, self._finish),
            "leave": (2, self._leave),
        }

    @property
    def kinds(self) -> list[str]:
        return [*self._kinds, *KINDS]

    def note(self, name: str) -> None:
        """A fault of this kind is done."""
        self._world.promises.note(f"-- {name}")
        self.counts[name] += 1

    def strike(self) -> None:
        """One fault, of a kind that can be done now."""
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        for _ in range(TRIES):
            name = self._rng.choices(names, weights)[0]
            self._world.promises.note(f"-- {name}")
            if self._kinds[name][1]():
                self.counts[name] += 1
                return

    def heal(self) -> None:
        """Undo what lasts."""
        for worker in self._world.alive():
            self._thaw(worker)
            self._mend(worker)

    # -- helpers --

    def _some(self, *, training: bool = False) -> VirtualWorker | None:
        """Some process, that trains if it must."""
        fit = [w for w in self._world.alive() if w.replica is not None or not training]
        return self._rng.choice(fit) if fit else None

    def _later(self, seconds: float, action: Callable[[], object]) -> None:
        """Unless all has been healed by then."""

        def act() -> None:
            if not self._world.healing:
                action()

        self._world.clock.after(seconds, act)

    def _lease(self, low: float, high: float) -> float:
        """Seconds, between two shares of the lease."""
        return self._rng.uniform(low, high) * self._world.setting.config.lease_seconds

    def _say(self, worker: VirtualWorker) -> None:
        self._world.promises.note(f"   to {worker.worker_id}#{worker.generation}")

    # -- processes --

    def _join(self) -> bool:
        if len(self._world.alive()) >= MOST_ALIVE:
            return False
        self._world.spawn()
        return True

    def _kill(self, *, restart: bool) -> bool:
        worker = self._some()
        if worker is None:
            return False
        self._say(worker)
        self._end(worker)
        if restart:
            worker_id = worker.worker_id
            self._later(
                self._rng.choice((0.0, self._lease(0, 0.3), self._lease(0, 1.5))), lambda: self._spawn(worker_id)
            )
        return True

    def _spawn(self, worker_id: str) -> None:
        if all(w.worker_id != worker_id for w in self._world.alive()):
            self._world.spawn(worker_id)

    def _end(self, worker: VirtualWorker) -> None:
        lag = self._rng.choice((None, self._lease(0, 0.2), self._lease(0, 1.2)))
        worker.kill(noticed=self._rng.random() < 0.6, lag=lag)

    def _replace(self) -> bool:
        worker = self._some()
        if worker is None:
            return False
        self._say(worker)
        self._end(worker)
        self._later(self._lease(0, 0.5), self._world.spawn)
        return True

    def _second_process(self) -> bool:
        worker = self._some()
        if worker is None or worker not in self._world.newest() or len(self._world.alive()) >= MOST_ALIVE:
            return False
        self._say(worker)
        self._world.spawn(worker.worker_id)
        return True

    def _freeze(self, low: float, high: float) -> bool:
        worker = self._some()
        if worker is None or worker.gate.shut:
            return False
        self._say(worker)
        worker.gate.shut = True
        self._later(self._lease(low, high), lambda: self._thaw(worker))
        return True

    def _hang(self) -> bool:
        worker = self._some(training=True)
        if worker is None or worker.training.shut:
            return False
        self._say(worker)
        worker.training.shut = True
        self._later(self._lease(0.5, 5), lambda: self._thaw(worker))
        return True

    def _thaw(self, worker: VirtualWorker) -> None:
        if not worker.over:
            worker.gate.open()
            worker.training.open()

    def _finish(self) -> bool:
        worker = self._some(training=True)
        if worker is None or worker.steps is not None or len(self._world.alive()) < 2:
            return False
        assert worker.replica is not None
        self._say(worker)
        worker.steps = worker.replica.taken
        return True

    def _leave(self) -> bool:
        worker = self._some(training=True)
        if worker is None or worker.steps is not None or len(self._world.alive()) < 2:
            return False
        assert worker.replica is not None
        self._say(worker)
        worker.steps, worker.flush = worker.replica.taken, False
        return True

    def _blow_up(self) -> bool:
        worker = self._some(training=True)
        if worker is None:
            return False
        assert isinstance(worker.trainer, BookedTrainer)
        worker.trainer.blow_up = 10.0 ** self._rng.uniform(0, 6)
        return True

    # -- lines --

    def _cut(self, *, noticed: bool, late: bool = False, long: bool = False) -> bool:
        worker = self._some()
        if worker is None or not worker.link.connected:
            return False
        self._say(worker)
        worker.line.broken = True
        lag = self._rng.choice((self._lease(0, 0.1), self._lease(0, 1), self._lease(0, 3))) if late else None
        worker.link.lose(noticed=noticed, lag=lag)
        away = self._lease(1.0, 2.5) if long else self._rng.choice((0.0, self._lease(0, 0.2), self._lease(0, 0.9)))
        self._later(away, lambda: self._mend(worker))
        return True

    def _mend(self, worker: VirtualWorker) -> None:
        worker.line.broken = False
        worker.gate(worker.link.connect)

    # -- the server --

    def _slow_commit(self) -> bool:
        self._world.slow_commits.append(self._lease(0.1, 1.5))
        return True

    def _stall(self) -> bool:
        if self._world.server.gate.shut:
            return False
        self._world.server.stand_still(self._lease(0.1, 2.0))
        return True

    # -- messages --

    def _repeat(self) -> bool:
        """A contribution that was sent some time is sent again."""
        parcels = self._world.promises.parcels
        if not parcels:
            return False
        recent = self._rng.random() < 0.7
        self._send(self._rng.choice(parcels[-6:] if recent else parcels))
        return True

    def _send(self, parcel: Parcel) -> None:
        """As a worker's connection would, but nobody hears the answer."""
        header, frames = parcel
        server, gate = self._world.server, self._world.server.gate

        def begin() -> None:
            try:
                ticket = server.begin_push(header)
            except DilocoError:
                return
            if ticket is not None:
                self._world.clock.after(self._rng.choice((0.0, self._lease(0, 0.3))), lambda: gate(lambda: end(ticket)))

        def end(ticket: Ticket) -> None:
            try:
                server.finish_push(ticket, frames)
            except DilocoError:
                return

        self._world.clock.after(self._rng.choice((0.0, self._lease(0, 0.2))), lambda: gate(begin))

    def _forge(self) -> bool:
        """Other bytes under the key of a contribution under way, as from a process that trained anew."""
        chosen = self._flight()
        if chosen is None or self._world.server.gate.shut or len(chosen[0].link.parcels[chosen[1].fragment]) > 1:
            return False
        header, frames = self._other_bytes(*chosen, parts=1)[0]
        server = self._world.server
        try:
            ticket = server.begin_push(header)
            if ticket is not None:
                server.finish_push(ticket, frames)
        except DilocoError:
            pass
        return True

    def _half(self) -> bool:
        """A worker of several ranks dies, and one rank's part still arrives."""
        chosen = self._flight()
        if chosen is None or chosen[0].link.layout.fragments[chosen[1].fragment].num_blocks < 2:
            return False
        worker, flight = chosen
        parcels = worker.link.parcels[flight.fragment]
        if len(parcels) == 1:
            parcels = self._other_bytes(worker, flight, parts=2)
        parcel = self._rng.choice(parcels)
        worker.kill(noticed=False)
        self._send(parcel)
        if self._rng.random() < 0.7:
            self._later(self._lease(0, 0.5), lambda: self._spawn(worker.worker_id))
        return True

    def _flight(self) -> tuple[VirtualWorker, Flight] | None:
        """Some worker's contribution under way."""
        worker = self._some(training=True)
        if worker is None:
            return None
        link = worker.link
        flights = [f for p in range(link.layout.num_scheduled) if (f := link.flight(p)) is not None]
        if flights:
            self._say(worker)
        return (worker, self._rng.choice(flights)) if flights else None

    def _other_bytes(self, worker: VirtualWorker, flight: Flight, parts: int) -> list[Parcel]:
        """A contribution that says the same as this one, and is not."""
        assert flight.header is not None
        assert flight.encoded is not None
        blocks = worker.link.layout.fragments[flight.fragment].num_blocks
        values = np.random.default_rng(self._rng.getrandbits(32)).standard_normal(blocks * 64, np.float32)
        encoded = encode_fragment(flight.encoded.format, np.float32(0.1) * values)
        parcels = parcels_of(flight.header, encoded, parts)
        self._world.promises.ledger.note(_pushed_by_nobody(flight.header, encoded, parcels))
        return parcels

    def _stranger(self) -> bool:
        """A worker with another model is refused and changes nothing."""
        run = self._world.server.run
        if not run.seeded or self._world.server.gate.shut:
            return False
        extra = TensorSpec("other.weight", (64,), "float32", Role.TRAINED)
        tensors = self._world.manifest.tensors
        other = Manifest(self._rng.choice(((*tensors[1:], extra), (*tensors, extra), (extra, *tensors[1:]))))
        worker = self._some()
        known = worker.worker_id if worker is not None and self._rng.random() < 0.5 else "stranger"
        hello = pb.Hello(protocol=PROTOCOL_VERSION, worker_id=known, generation=99, manifest=manifest_to_pb(other))
        self._refused(lambda: run.hello(hello, self._world.clock.now), ManifestMismatch)
        hello.run_id = "another run"
        self._refused(lambda: run.hello(hello, self._world.clock.now), RunMismatch)
        return True

    def _invalid(self) -> bool:
        """A push that makes no sense is refused and changes nothing."""
        if not self._world.promises.parcels or self._world.server.gate.shut:
            return False
        header = pb.PushHeader()
        header.CopyFrom(self._rng.choice(self._world.promises.parcels[-4:])[0])
        self._rng.choice(SPOILT)(header)
        self._refused(lambda: self._world.server.run.begin_push(header), DilocoError)
        return True

    def _refused(self, attempt: Callable[[], object], error: type[DilocoError]) -> None:
        """Promise 6."""
        before = self._state()
        try:
            attempt()
        except error:
            if self._state() != before:
                raise BrokenPromise(6, "what was refused has changed the run") from None
            return
        raise BrokenPromise(6, f"what should be refused with {error.__name__} is taken")

    def _state(self) -> object:
        run = self._world.server.run
        model = run.model
        members = [(m.worker_id, m.generation, m.state, m.seen, m.moved) for m in run.members.all()]
        rounds = [run.rounds.round(p) for p in range(model.layout.num_scheduled)]
        staged = [(r.version, tuple(r.contributions), tuple(sorted(r.expected))) for r in rounds if r is not None]
        return members, staged, list(model.pushes._assemblies), [v.digest for v in run.parameters.versions()]


def _pushed_by_nobody(header: pb.PushHeader, encoded: Encoded, parcels: list[Parcel]) -> Pushed:
    frames = [(p.first_block, d) for h, _ in parcels for p, d in zip(h.parts, h.frame_digests, strict=True)]
    return Pushed(
        worker_id=header.worker_id,
        generation=header.generation,
        fragment=header.fragment,
        base_version=header.base_version,
        frames=frozenset(frames),
        tokens=header.tokens,
        since_version=header.since_version,
        decoded=reference.decode(encoded.format, encoded.scales, encoded.codes),
    )
