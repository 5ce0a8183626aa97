"""One training run: its members, rounds and global parameters. Pure: time is passed in, in seconds.

Methods take what arrives and leave what is to be told to the workers in `news`, and what is to be kept on disk in
`records`. The engine takes both away, and calls `due`, `commit` (heavy, in a thread) and `publish` in turn.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from concurrent.futures import Executor

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import NotReady
from diloco_proto.manifest import Layout, Manifest
from diloco_proto.wire import manifest_from_pb

from . import admission, keeping
from .checkpoint import InitialParameters
from .config import RunConfig
from .logs import plain
from .members import Member, Members, MemberState
from .model import Committed, Model
from .news import News
from .pace import new_paces
from .parameters import Parameters, Seed
from .patience import Patience
from .pushes import Ticket
from .round import Close
from .rounds import Rounds
from .store import state_pb2 as disk

log = logging.getLogger("diloco.server")


class Run:
    """The state machine of one run. All methods but `commit` belong to one thread."""

    def __init__(self, config: RunConfig, init: InitialParameters | None = None, run_id: str = "") -> None:
        self.config = config
        self.run_id = run_id or secrets.token_hex(8)
        self.members = Members(config.lease_seconds, config.min_workers)
        self.news = News(self.members)
        self.records: list[disk.Record] = []
        self.opened = False
        self.stopped = ""
        """Why the run has reached its end; empty while it has not."""
        self.hold_seed = False
        """Whether nobody is told that the run has parameters until `begin` is called, once they are on disk."""
        self._begun = False
        self._init = init
        self._model: Model | None = None
        self._barriers = 0
        """How often all workers have finished together."""
        self._patience = Patience(self.members, asynchronous=config.asynchronous)

    # -- what the run is --

    @property
    def layout(self) -> Layout:
        return self.model.layout

    @property
    def parameters(self) -> Parameters:
        return self.model.parameters

    @property
    def rounds(self) -> Rounds:
        return self.model.rounds

    @property
    def manifest(self) -> Manifest | None:
        return self._model.manifest if self._model else None

    @property
    def seeded(self) -> bool:
        """The run has parameters, and the workers know."""
        return self._begun

    @property
    def can_begin(self) -> bool:
        """All parameters have come; `begin` is next."""
        return self._model is not None and self._model.seeding.done and not self._begun

    @property
    def rounds_committed(self) -> int:
        """Outer steps of all fragments together."""
        return self._model.outer_steps if self._model else 0

    @property
    def tokens(self) -> int:
        """Tokens behind what every fragment has counted."""
        return self._model.tokens if self._model else 0

    @property
    def model(self) -> Model:
        """Raises NotReady before the first worker has brought it."""
        if self._model is None:
            raise NotReady("no worker has joined this run yet, so it has no model")
        return self._model

    @property
    def complete_rounds(self) -> int:
        """Rounds that every trained fragment has had."""
        return self._model.complete_rounds if self._model else 0

    def serials(self) -> set[int]:
        """Of the contributions whose frames may still be needed."""
        return self._model.serials() if self._model else set()

    def check_run_id(self, run_id: str) -> None:
        """Raises RunMismatch for another run's id, RolledBack for this run's before it was rolled back; empty fits
        any."""
        admission.check_run_id(run_id, self.run_id)

    def check_readable(self, fragment: int) -> None:
        """Raises NotReady or InvalidContribution unless the fragment can be pulled."""
        admission.check_readable(self.layout, fragment, seeded=self.seeded)

    # -- membership --

    def hello(self, hello: pb.Hello, now: float) -> Member:
        """A worker joins, or takes up its session again; its Welcome is news.

        Raises ProtocolMismatch, RunMismatch, UnsupportedModel, ManifestMismatch (naming the first tensor that
        differs) or Superseded.
        """
        rolled_back = admission.check_hello(hello, self.run_id)
        manifest = manifest_from_pb(hello.manifest)
        model = self._adopt(manifest)
        admission.check_model(model, manifest, hello.worker_id)
        shards = self.members.shards
        member = self.members.hello(hello.worker_id, hello.generation, now)
        model.rounds.forget({m.worker_id for m in self.members.all()})
        if rolled_back:
            member.state = MemberState.JOINING  # it has to fetch everything anew
        if member.state is MemberState.JOINING:
            # A new process under a known id: nobody waits for what its predecessor still owed.
            model.rounds.no_longer_expected(member.worker_id, now)
        if self.can_begin and not self.hold_seed:
            self.begin()  # from a file
        self.news.welcome(member, self.run_id, self.config, model, seeded=self.seeded)
        self._keep(member)
        if self.members.shards != shards:
            self._keep_progress()
            self.news.shards()
        else:
            self.news.shard(member)
        self._appoint_seeder(member)
        return member

    def _adopt(self, manifest: Manifest) -> Model:
        """The run's model: the first worker's, or that of the next one if all are gone before it is seeded."""
        current = self._model
        if current is not None and (self.seeded or self.members.live() or current.manifest == manifest):
            return current
        self._model, self._init = Model.fitting(self.config, manifest, self._init), None
        return self._model

    def _appoint_seeder(self, arrived: Member | None = None) -> None:
        model = self.model
        seeder, afresh = model.seeding.appoint(self.members.live(), arrived)
        if afresh:
            model.pushes.clear()
        if seeder is not None:
            self.news.seed_wanted(seeder)

    def hear(self, worker_id: str, generation: int, request: pb.SessionRequest, now: float) -> None:
        """A message of a worker's session, after its hello.

        Raises NotMember or Superseded: its lease may have run out, or a newer process taken over, since the last.
        """
        member = self.members.get(worker_id, generation)
        match request.WhichOneof("body"):
            case "heartbeat":
                member.hears(request.heartbeat, now)
            case "ready":
                self.ready(member, now)
            case "finishing":
                self.finishing(member, now)
            case "finished":
                self.finished(member, request.finished.flush, now)
            case "leave":
                reason = plain(request.leave.reason) or "done"
                log.info("worker %r left: %s", worker_id, reason, extra={"worker": worker_id})
                self.leave(member, now)

    def ready(self, member: Member, now: float) -> None:
        """The worker holds theta: it trains as soon as the run is open, and is expected in rounds opened later."""
        if not self.seeded:
            raise NotReady("ready before the run has parameters")
        member.state = MemberState.READY
        member.moves(now)
        member.done = False
        if member.sync_every == 0:
            member.sync_every = self.config.sync_every
        elif self.config.dynamic_local_updates:
            self.news.pace(member)
        self._keep(member)
        self._set_floor()
        if self.stopped:
            self.news.stop(member, self.stopped)
        if self.opened:
            # Versions of an asynchronous run are no rounds.
            rounds = 0 if self.config.asynchronous else self.model.complete_rounds
            member.start_step = self.members.step_beside(member, rounds * self.config.sync_every)
            self.news.opened(member, member.start_step)
            self.rounds.await_too(member.worker_id)
            self.rounds.tell_again()
            return
        ready = self.members.in_state(MemberState.READY)
        if len(ready) < self.members.needed:
            self._tell_waiting(ready)
            return
        self.open(now)
        log.info("the run is open: %d workers train", len(ready))
        for other in ready:
            other.moves(now)
            self.news.opened(other, 0)

    def open(self, now: float) -> None:
        """Enough workers are here: the first rounds open."""
        self.opened = True
        self._keep_progress()
        for fragment in range(self.layout.num_scheduled):
            self._open_round(fragment, now)
            version, digest = self.parameters.version(fragment), self.parameters.digest(fragment)
            self.records.append(keeping.published(fragment, version, digest, False, self.expected(fragment)))

    def _tell_waiting(self, members: Iterable[Member]) -> None:
        """Tell these workers that no round closes until more have joined."""
        ready, needed = len(self.members.in_state(MemberState.READY)), self.members.needed
        if ready < needed:
            log.warning("%d of %d workers are here: no round closes until more have joined", ready, needed)
        else:
            log.info("a round has fewer than its %d contributions: those in it train on without waiting", needed)
        self.news.waiting(members, ready, needed)

    def finishing(self, member: Member, now: float) -> None:
        self._set_state(member, MemberState.FINISHING, now)

    def finished(self, member: Member, flush: int, now: float) -> None:
        """The worker waits for all others to finish too. The same `flush` again, after a cut, is the same wait."""
        if flush != member.flush:
            member.flush, member.barrier = flush, self._barriers + 1
        self._set_state(member, MemberState.FINISHED, now)
        if member.barrier <= self._barriers:
            self.news.all_finished(member, self.parameters.versions())

    def cut(self, member: Member, now: float) -> None:
        """The worker's connection broke: if it does not come back soon it is gone."""
        member.cut_at = now

    def leave(self, member: Member, now: float) -> None:
        """The worker is gone, by its own word or because its lease ran out."""
        self._set_state(member, MemberState.GONE, now)
        if self._model is not None:
            self._appoint_seeder()

    def tick(self, now: float) -> None:
        """Let time pass: leases run out, and the patience with workers that beat without training."""
        for member in self._patience.passes(now):
            self.leave(member, now)
        for member in self._patience.hanging(self.rounds, now) if self._model else ():
            self._keep(member)
            self.rounds.no_longer_expected(member.worker_id, now)

    def next_deadline(self) -> float | None:
        """When `tick` and `due` have something to do even if nothing arrives."""
        rounds = self._model.rounds if self._model else None
        grace = rounds.next_deadline() if rounds else None
        times = [*self._patience.deadlines(rounds), *([] if grace is None else [grace])]
        return min(times, default=None)

    def _set_state(self, member: Member, state: MemberState, now: float) -> None:
        member.state = state
        member.done = member.done or state in (MemberState.FINISHING, MemberState.FINISHED)
        self._keep(member)
        self._set_floor()
        if self._model is not None:
            self._model.rounds.no_longer_expected(member.worker_id, now)

    def _set_floor(self) -> None:
        """The floor of a round: when nobody but finishing workers is left their last contributions count, however
        few. An asynchronous round needs one."""
        if self._model is not None:
            one = self.members.all_end or self.config.asynchronous
            self._model.rounds.floor = 1 if one else self.members.needed
            self._model.rounds.staleness_limit = self.config.staleness_limit(len(self.members.live()))

    # -- pushes --

    def begin_push(self, header: pb.PushHeader) -> Ticket | pb.Outcome:
        """What a push announces: a Ticket to receive it, or its Outcome when nothing need be sent.

        Raises RunMismatch, NotMember, Superseded, NotReady or InvalidContribution.
        """
        self.check_run_id(header.run_id)
        self.members.get(header.worker_id, header.generation)
        return self.model.begin_push(header, len(self.members.live()))

    def finish_push(self, ticket: Ticket, now: float, prepared: Seed | float | None = None) -> pb.Outcome:
        """All frames of the stream are in; `prepared` is `ticket.prepare()`, if it was called beforehand.

        Raises NotMember, Superseded or NonFiniteParameter.
        """
        member = self.members.get(ticket.header.worker_id, ticket.header.generation)
        prepared = ticket.prepare() if prepared is None else prepared
        outcome = self.model.finish_push(ticket, now, prepared)
        if outcome.kind == pb.OUTCOME_STAGED:
            assert isinstance(prepared, float)
            self.records.append(keeping.staged(ticket, prepared))
            member.moves(now)
        if self.can_begin and not self.hold_seed:
            self.begin()
        return outcome

    def begin(self) -> None:
        """The run has parameters: tell the workers."""
        assert self.can_begin
        self._begun = True
        trained = self.layout.trained
        log.info("the run has parameters: %d in %d fragments", sum(f.parameters for f in trained), len(trained))
        self.news.seeded(self.parameters.versions())

    # -- after a restart of the server --

    def resume(self, manifest: Manifest) -> Model:
        """The run goes on with parameters that are about to be restored."""
        assert self._model is None
        self._model, self._init = Model(self.config, manifest, None), None
        self._model.seeding.restored()
        self._begun = True
        return self._model

    def restore(self, progress: disk.Progress) -> None:
        """What the run had come to."""
        self.stopped, self._barriers, self.members.shards = progress.stopped, progress.barriers, progress.shards
        if progress.opened and not self.opened:
            self.open(0.0)

    def redo(self, close: Close, threads: Executor | None) -> None:
        """Make the outer step of a round again that was decided before the restart."""
        self.rounds.reclose(close)
        record = self.model.publish(self.commit(close, threads), 0.0)
        for member in self.members.live():
            member.hears_of(record, 0.0)
        self._open_round(close.fragment, 0.0)

    def recovered(self) -> None:
        """All is as it was: nothing of how it came back is to be told or kept."""
        self._set_floor()
        self.rounds.forget_times()
        self.news.clear()
        self.records.clear()

    # -- rounds --

    def due(self, now: float) -> list[Close]:
        """Rounds to commit now; each must come back through `commit` and `publish`."""
        if self._model is None or not self.opened:
            return []
        for waiting in self._model.rounds.stuck():
            # They must not wait for a fate that may never come: a newcomer would not find them training.
            self._tell_waiting([m for m in self.members.live() if m.worker_id in waiting])
        closes = self._model.rounds.due(now, self.config.buffered(len(self.members.live())))
        self.records += [keeping.closed(close) for close in closes]
        for close in closes:
            self.parameters.make_room(close.fragment, all_have=self._all_have(close))
        return closes

    def _all_have(self, close: Close) -> bool:
        """Every live worker has the version that the round was made on top of: its contribution is."""
        have = {c.key.worker_id for c in close.contributions if c.key.base_version == close.base_version}
        return all(m.worker_id in have for m in self.members.live())

    def commit(self, close: Close, threads: Executor | None = None) -> Committed:
        """The outer step of a close. Heavy; touches only its own fragment's parameters, so any thread may run it."""
        return self.model.commit(close, threads)

    def publish(self, committed: Committed, now: float) -> None:
        """The new version is out: tell every worker its fate and open the next round."""
        fragment, update = committed.close.fragment, committed.update
        record = self.model.publish(committed, now)
        for member in self.members.live():
            member.hears_of(record, now)
        self.news.committed(committed, asynchronous=self.config.asynchronous)
        self.rounds.tell_again()  # workers take the news for a sign that nothing is stuck any more
        self._open_round(fragment, now)
        self.records.append(
            keeping.published(fragment, update.version, update.digest, committed.void, self.expected(fragment))
        )
        if fragment == self.layout.num_trained - 1:
            self._set_paces()
        self._check_end()

    def _set_paces(self) -> None:
        """Between two rounds: tell workers whose speed asks for another H."""
        if self.config.dynamic_local_updates:
            for member, pace in new_paces(self.members.in_state(MemberState.READY), self.config.schedule()):
                log.info("worker %r: %d inner steps a round from now on", member.worker_id, pace)
                member.sync_every = pace
                self._keep(member)
                self.news.pace(member)

    def _check_end(self) -> None:
        """Tell the workers once the run has had its rounds or tokens."""
        if not self.stopped:
            self.stopped = self.model.end()
            if self.stopped:
                log.warning("the run has had %s and stops", self.stopped)
                self._keep_progress()
                self.news.stop_all(self.stopped)

    def settle_finish(self) -> None:
        """Once every live worker has finished and nothing is under way, tell them so."""
        live = self.members.live()
        if not live or not self.opened or not self.rounds.idle:
            return
        awaited = [m for m in live if not m.hung]
        if awaited and all(m.state is MemberState.FINISHED and m.barrier > self._barriers for m in awaited):
            self._barriers += 1
            self._keep_progress()
            for member in live:
                self.news.all_finished(member, self.parameters.versions())

    def expected(self, fragment: int) -> list[str]:
        """Whom the open round of the fragment waits for, or had; none while it is not open."""
        current = self.rounds.round(fragment)
        return sorted(current.expected) if current is not None else []

    def _keep(self, member: Member) -> None:
        self.records.append(disk.Record(member=keeping.member(member)))

    def _keep_progress(self) -> None:
        self.records.append(disk.Record(progress=self.progress()))

    def progress(self) -> disk.Progress:
        """What the run has come to as a whole."""
        return disk.Progress(
            opened=self.opened, stopped=self.stopped, barriers=self._barriers, shards=self.members.shards
        )

    def _open_round(self, fragment: int, now: float) -> None:
        ready = [m.worker_id for m in self.members.in_state(MemberState.READY) if not m.hung]
        self.rounds.open(fragment, self.parameters.version(fragment), ready, now)
