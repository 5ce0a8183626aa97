"""One training run: its members, rounds and global parameters. Pure: time is passed in, in seconds.

Methods take what arrives and leave what is to be told to the workers in `outbox`. The engine delivers it, and
calls `due`, `commit` (heavy, in a thread) and `publish` in turn.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import PROTOCOL_VERSION
from diloco_proto.errors import (
    InvalidContribution,
    ManifestMismatch,
    NonFiniteParameter,
    NotReady,
    ProtocolMismatch,
    RunMismatch,
)
from diloco_proto.manifest import Layout, Manifest, build_layout
from diloco_proto.wire import manifest_from_pb

from .checkpoint import InitialParameters
from .config import RunConfig
from .members import Member, Members, MemberState
from .parameters import Parameters, Seed, Update, prepare_seed
from .pushes import Pushes, Ticket
from .rounds import Close, Contribution, Rounds, Stage

log = logging.getLogger("diloco.server")

HANG_ROUNDS = 3.0
"""Times the usual length of a round without a step: then a worker's training hangs, though its heart beats."""

_OUTCOME = {
    Stage.STAGED: pb.OUTCOME_STAGED,
    Stage.ALREADY_HAVE: pb.OUTCOME_ALREADY_HAVE,
    Stage.COUNTED: pb.OUTCOME_COUNTED,
    Stage.CLOSED: pb.OUTCOME_CLOSED,
    Stage.CONFLICT: pb.OUTCOME_CONFLICT,
}


@dataclass(frozen=True, slots=True)
class Committed:
    """A close whose outer step was computed, to be published."""

    close: Close
    update: Update


@dataclass(slots=True)
class _Model:
    """What exists once the first worker has brought its manifest."""

    manifest: Manifest
    layout: Layout
    parameters: Parameters
    rounds: Rounds
    pushes: Pushes


class Run:
    """The state machine of one run. All methods but `commit` belong to one thread."""

    def __init__(self, config: RunConfig, init: InitialParameters | None = None) -> None:
        self.config = config
        self.run_id = secrets.token_hex(8)
        self.members = Members(config.lease_seconds)
        self.outbox: list[tuple[str, pb.SessionEvent]] = []
        self.seeded = False
        self.opened = False
        self.rounds_committed = 0
        self._init = init
        self._model: _Model | None = None
        self._seeder: tuple[str, int] | None = None
        """Id and generation of the worker that was last asked for the parameters."""
        self._unseeded: set[int] = set()
        self._barriers = 0
        """How often all workers have finished together."""

    # -- what the run is --

    @property
    def layout(self) -> Layout:
        return self._must_have_model().layout

    @property
    def parameters(self) -> Parameters:
        return self._must_have_model().parameters

    @property
    def rounds(self) -> Rounds:
        return self._must_have_model().rounds

    @property
    def manifest(self) -> Manifest | None:
        return self._model.manifest if self._model else None

    def _must_have_model(self) -> _Model:
        if self._model is None:
            raise NotReady("no worker has joined this run yet, so it has no model")
        return self._model

    def check_run_id(self, run_id: str) -> None:
        """Raises RunMismatch for another run's id; empty fits any."""
        if run_id and run_id != self.run_id:
            raise RunMismatch(
                f"this server runs {self.run_id}, not {run_id}: it was started anew. Start the worker again to join; "
                "its model holds its local parameters until then"
            )

    def check_readable(self, fragment: int) -> None:
        """Raises NotReady or InvalidContribution unless the fragment can be pulled."""
        count = len(self.layout.fragments)
        if not self.seeded:
            raise NotReady("the run has no parameters yet")
        if fragment >= count:
            raise InvalidContribution(f"asked for fragment {fragment}; this run has {count}")

    # -- membership --

    def hello(self, hello: pb.Hello, now: float) -> Member:
        """A worker joins, or takes up its session again; its Welcome goes to the outbox.

        Raises ProtocolMismatch, RunMismatch, UnsupportedModel, ManifestMismatch (naming the first tensor that
        differs) or Superseded.
        """
        if hello.protocol != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"this server speaks protocol {PROTOCOL_VERSION}, the worker {hello.protocol}: "
                "install the same version of diloco on both"
            )
        self.check_run_id(hello.run_id)
        if not hello.worker_id:
            raise InvalidContribution("hello without a worker_id")
        manifest = manifest_from_pb(hello.manifest)
        model = self._adopt(manifest)
        difference = model.manifest.first_difference(manifest)
        if difference:
            raise ManifestMismatch(f"worker {hello.worker_id!r} has another model than this run: {difference}")
        member = self.members.hello(hello.worker_id, hello.generation, now)
        if member.state is MemberState.JOINING:
            # A new process under a known id: nobody waits for what its predecessor still owed.
            model.rounds.no_longer_expected(member.worker_id, now)
        self._tell(member, welcome=self._welcome(model))
        self._appoint_seeder(member)
        return member

    def _adopt(self, manifest: Manifest) -> _Model:
        """The run's model: the first worker's, or that of the next one if all are gone before it is seeded."""
        current = self._model
        if current is not None and (self.seeded or self.members.live() or current.manifest == manifest):
            return current
        config = self.config
        layout = build_layout(manifest, config.num_fragments, config.pattern)
        rounds = Rounds(
            layout.num_trained,
            min_workers=config.min_workers,
            grace=config.grace,
            uniform=config.weighting == "uniform",
        )
        parameters = Parameters(layout, config.outer_settings())
        if self._init is not None:
            _seed_from(self._init, manifest, layout, parameters)
            self._init = None
            self.seeded = True
        self._model = _Model(manifest, layout, parameters, rounds, Pushes(layout, config.uplink))
        self._seeder = None
        return self._model

    def _welcome(self, model: _Model) -> pb.Welcome:
        return pb.Welcome(
            run_id=self.run_id,
            settings=self.config.to_pb(),
            layout_fingerprint=model.layout.fingerprint,
            seeded=self.seeded,
            heartbeat_seconds=self.config.lease_seconds / 5,
            versions=model.parameters.versions() if self.seeded else [],
        )

    def _appoint_seeder(self, arrived: Member | None = None) -> None:
        """Ask one live worker for the initial parameters: another one if it is gone, again if it came back."""
        live = self.members.live()
        if self.seeded or not live:
            return
        seeder = next((m for m in live if self._seeder and m.worker_id == self._seeder[0]), None)
        if seeder is not None and seeder is not arrived:
            return
        seeder = seeder or live[0]
        if self._seeder != (seeder.worker_id, seeder.generation):
            # Another process holds other parameters: nothing of its predecessor's may be mixed with them.
            self._seeder = (seeder.worker_id, seeder.generation)
            self._unseeded = set(range(len(self.layout.fragments)))
            self._must_have_model().pushes.clear()
        self._tell(seeder, seed_wanted=pb.SeedWanted())

    def _mark_seeded(self, fragment: int) -> None:
        self._unseeded.discard(fragment)
        if not self._unseeded:
            self.seeded = True
            self._must_have_model().pushes.clear()
            for member in self.members.live():
                self._tell(member, seeded=pb.Seeded(versions=self.parameters.versions()))

    def ready(self, member: Member, now: float) -> None:
        """The worker holds theta: it trains as soon as the run is open, and is expected in rounds opened later."""
        if not self.seeded:
            raise NotReady("ready before the run has parameters")
        member.state = MemberState.READY
        member.moves(now)
        member.done = False
        self._set_floor()
        if self.opened:
            self._tell(member, opened=pb.Opened(start_step=self.step()))
            self.rounds.tell_again()
            return
        ready = self.members.in_state(MemberState.READY)
        if len(ready) < self.rounds.floor:
            self._tell_waiting(ready)
            return
        self.opened = True
        for fragment in range(self.layout.num_trained):
            self._open_round(fragment, now)
        for other in ready:
            other.moves(now)
            self._tell(other, opened=pb.Opened(start_step=0))

    def _tell_waiting(self, members: Iterable[Member]) -> None:
        """Tell these workers that no round closes until more have joined."""
        ready, needed = len(self.members.in_state(MemberState.READY)), self.rounds.floor
        log.warning("%d of %d workers are here: no round closes until more have joined", ready, needed)
        for member in members:
            self._tell(member, waiting=pb.Waiting(ready=ready, needed=needed))

    def step(self) -> int:
        """The run's current inner step: that of the furthest worker, live ones first."""
        steps = [m.last.step for m in self.members.in_state(MemberState.READY)]
        return max(steps or [m.last.step for m in self.members.all()], default=0)

    def heartbeat(self, member: Member, beat: pb.Heartbeat, now: float) -> None:
        member.seen = now
        if beat.step > member.last.step:
            member.moves(now)
        member.last = beat

    def finishing(self, member: Member, now: float) -> None:
        self._set_state(member, MemberState.FINISHING, now)

    def finished(self, member: Member, flush: int, now: float) -> None:
        """The worker waits for all others to finish too. The same `flush` again, after a cut, is the same wait."""
        if flush != member.flush:
            member.flush, member.barrier = flush, self._barriers + 1
        self._set_state(member, MemberState.FINISHED, now)
        if member.barrier <= self._barriers:
            self._tell_finished(member)

    def leave(self, member: Member, now: float) -> None:
        """The worker is gone, by its own word or because its lease ran out."""
        self._set_state(member, MemberState.GONE, now)
        if not self.seeded:
            self._appoint_seeder()

    def tick(self, now: float) -> None:
        """Let time pass: leases run out, and the patience with workers that beat without training."""
        for member in self.members.expired(now):
            log.warning(
                "worker %r was silent for %.0f s and is no longer expected",
                member.worker_id,
                now - member.seen,
            )
            self.leave(member, now)
        for member, deadline in self._may_hang():
            if now >= deadline:
                log.warning(
                    "worker %r has taken no step for %.0f s although its heart beats: rounds no longer wait for it",
                    member.worker_id,
                    now - member.moved,
                )
                member.hung = True
                self.rounds.no_longer_expected(member.worker_id, now)

    def next_deadline(self) -> float | None:
        """When `tick` and `due` have something to do even if nothing arrives."""
        grace = self._model.rounds.next_deadline() if self._model else None
        times = [self.members.next_expiry(), grace, *(deadline for _, deadline in self._may_hang())]
        return min((t for t in times if t is not None), default=None)

    def _may_hang(self) -> list[tuple[Member, float]]:
        """The workers whose next step is awaited, and when they are taken to hang.

        Not those of which a contribution waits in a round: they may be waiting for its fate.
        """
        usual = self._model.rounds.usual_seconds if self._model else None
        if usual is None:
            return []
        patience = max(HANG_ROUNDS * usual, self.config.lease_seconds)
        return [
            (m, m.moved + patience)
            for m in self.members.in_state(MemberState.READY)
            if not m.hung and not self.rounds.holds(m.worker_id)
        ]

    def _set_state(self, member: Member, state: MemberState, now: float) -> None:
        member.state = state
        member.done = member.done or state in (MemberState.FINISHING, MemberState.FINISHED)
        if self._model is not None:
            self._set_floor()
            self._model.rounds.no_longer_expected(member.worker_id, now)

    def _set_floor(self) -> None:
        """`min_workers` is the floor of a round, less those that ended by finishing; death does not lower it.

        When nobody but finishing workers is left their last contributions count, however few.
        """
        live = self.members.live()
        ending = bool(live) and all(m.state in (MemberState.FINISHING, MemberState.FINISHED) for m in live)
        done = sum(m.done for m in self.members.all())
        self.rounds.floor = 1 if ending else max(1, self.config.min_workers - done)

    # -- pushes --

    def begin_push(self, header: pb.PushHeader) -> Ticket | pb.Outcome:
        """What a push announces: a Ticket to receive it, or its Outcome when nothing need be sent.

        Raises RunMismatch, NotMember, Superseded, NotReady or InvalidContribution.
        """
        self.check_run_id(header.run_id)
        self.members.get(header.worker_id, header.generation)
        seed = header.purpose == pb.PURPOSE_SEED
        if seed and (self.seeded or (header.worker_id, header.generation) != self._seeder):
            return pb.Outcome(kind=pb.OUTCOME_ALREADY_HAVE, detail="this worker's seed is not needed")
        pushes = self._must_have_model().pushes
        announced = pushes.read(header)
        if not seed:
            known = self.rounds.seen_before(announced.key, announced.frames)
            if known is not None:
                return self._outcome(known, announced.fragment.index)
        return pushes.claim(announced)

    def finish_push(self, ticket: Ticket, now: float, seed: Seed | None = None) -> pb.Outcome:
        """All frames of the stream are in; `seed` is `ticket.seed()`, if it was called beforehand.

        Raises NotMember, Superseded or NonFiniteParameter.
        """
        header, key, assembly = ticket.header, ticket.announced.key, ticket.assembly
        member = self.members.get(header.worker_id, header.generation)
        pushes = self._must_have_model().pushes
        if not pushes.holds(ticket):
            # Another stream completed it, or began anew with other bytes.
            if header.purpose == pb.PURPOSE_SEED:
                return pb.Outcome(kind=pb.OUTCOME_ALREADY_HAVE)
            known = self.rounds.seen_before(key, ticket.announced.frames)
            return self._outcome(known or Stage.CONFLICT, key.fragment)
        if not assembly.complete:
            return pb.Outcome(kind=pb.OUTCOME_PART_HELD, version=header.base_version)
        pushes.take(ticket)
        if header.purpose == pb.PURPOSE_SEED:
            seed = seed or ticket.seed()
            assert seed is not None
            self.parameters.seed(key.fragment, seed)
            self._mark_seeded(key.fragment)
            return pb.Outcome(kind=pb.OUTCOME_SEEDED)
        member.moves(now)
        contribution = Contribution(key, assembly.frames, assembly.encoded(), assembly.tokens, assembly.steps)
        return self._outcome(self.rounds.stage(contribution, now), key.fragment)

    def _outcome(self, stage: Stage, fragment: int) -> pb.Outcome:
        return pb.Outcome(kind=_OUTCOME[stage], version=self.parameters.version(fragment))

    # -- rounds --

    def due(self, now: float) -> list[Close]:
        """Rounds to commit now; each must come back through `commit` and `publish`."""
        if self._model is None or not self.opened:
            return []
        for waiting in self._model.rounds.stuck():
            # They must not wait for a fate that may never come: a newcomer would not find them training.
            self._tell_waiting([m for m in self.members.live() if m.worker_id in waiting])
        return self._model.rounds.due(now)

    def commit(self, close: Close, threads: Executor | None = None) -> Committed:
        """The outer step of a close. Heavy; touches only its own fragment's parameters, so any thread may run it."""
        payloads = [c.payload for c in close.contributions]
        update, counted = self.parameters.commit(close.fragment, payloads, close.weights, threads)
        if not counted:
            log.error(
                "fragment %d: the contributions of %s overflow together; none was counted",
                close.fragment,
                ", ".join(c.key.worker_id for c in close.contributions),
            )
            close = dataclasses.replace(close, contributions=(), weights=())
        return Committed(close, update)

    def publish(self, committed: Committed, now: float) -> None:
        """The new version is out: tell every worker its fate and open the next round."""
        close, update = committed.close, committed.update
        self.parameters.publish(close.fragment, update)
        record = self.rounds.committed(close, now)
        self.rounds_committed += 1
        self._must_have_model().pushes.drop_round(close.fragment, close.base_version)
        for member in self.members.live():
            counted = member.worker_id in record.weights
            if counted:
                member.counted += 1
                member.moves(now)  # it may have waited for this
            elif member.worker_id in record.expected:
                member.not_counted += 1
            self._tell(
                member,
                committed=pb.Committed(
                    fragment=close.fragment,
                    version=update.version,
                    fate=pb.FATE_COUNTED if counted else pb.FATE_NOT_COUNTED,
                    digest=update.digest,
                ),
            )
        self._open_round(close.fragment, now)

    def settle_finish(self) -> None:
        """Once every live worker has finished and nothing is under way, tell them so."""
        live = self.members.live()
        if not live or not self.opened or not self.rounds.idle:
            return
        if all(m.state is MemberState.FINISHED and m.barrier > self._barriers for m in live):
            self._barriers += 1
            for member in live:
                self._tell_finished(member)

    def _tell_finished(self, member: Member) -> None:
        self._tell(member, all_finished=pb.AllFinished(versions=self.parameters.versions()))

    def _open_round(self, fragment: int, now: float) -> None:
        ready = [m.worker_id for m in self.members.in_state(MemberState.READY) if not m.hung]
        self.rounds.open(fragment, self.parameters.version(fragment), ready, now)

    def _tell(self, member: Member, **body: object) -> None:
        self.outbox.append((member.worker_id, pb.SessionEvent(**body)))  # type: ignore[arg-type]


def _seed_from(init: InitialParameters, manifest: Manifest, layout: Layout, parameters: Parameters) -> None:
    init.check(manifest)
    for fragment in layout.fragments:
        try:
            parameters.seed(fragment.index, prepare_seed(fragment, init.flat(fragment)))
        except NonFiniteParameter as error:
            raise NonFiniteParameter(f"the server's --init {init.path}: {error}") from error
