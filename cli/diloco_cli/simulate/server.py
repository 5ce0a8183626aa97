"""The server in virtual time: a Run, and what the engine and the service do around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import read_frame
from diloco_proto.errors import ConnectionClosed, DilocoError, Superseded
from diloco_server.config import RunConfig
from diloco_server.members import Member
from diloco_server.parameters import snapshot_frames, snapshot_item
from diloco_server.pushes import Ticket
from diloco_server.round import Close
from diloco_server.run import Run

from .clock import Action, Clock, Gate, Timer
from .disk import Disk
from .keeper import VirtualKeeper
from .line import Connection
from .parcels import Brought
from .revival import Back, revive
from .watch import Watch

Answer = Callable[[pb.Outcome], None]


def _nobody(outcome: pb.Outcome) -> None:
    """Hears it."""


class Peer:
    """The worker as one of its sessions sees it: over one connection."""

    def __init__(
        self,
        connection: Connection,
        hear: Callable[[pb.SessionEvent], None],
        end: Callable[[DilocoError], None],
    ) -> None:
        self.member: Member | None = None
        self._connection = connection
        self._hear = hear
        self._end = end

    def deliver(self, event: pb.SessionEvent) -> None:
        self._connection.tell(lambda: self._hear(event))

    def end(self, error: DilocoError) -> None:
        self._connection.tell(lambda: self._end(error))


class VirtualServer:
    """Serves one run. `commit_seconds` gives how long the next outer step takes. While `gate` is shut the process
    stands still, timers and all. `disk` is what outlives the process; without one everything counts as kept."""

    def __init__(
        self,
        config: RunConfig,
        clock: Clock,
        *,
        commit_seconds: Callable[[], float] = lambda: 0.0,
        watch: Watch | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.run = Run(config)
        self.gate = Gate()
        """Of the process of this moment."""
        self.up = True
        self.disk = disk
        self.watch = watch or Watch()
        self.bytes_in = 0
        self.bytes_out = 0
        self._clock = clock
        self._commit_seconds = commit_seconds
        self._sessions: dict[str, tuple[Member, Peer]] = {}
        self._committing = 0
        self._timer: Timer | None = None
        self._keeper = self._new_keeper()

    def _new_keeper(self) -> VirtualKeeper | None:
        if self.disk is None:
            return None
        return VirtualKeeper(self.disk, self.run, self._clock, self.gate, lambda: self.watch.count("snapshot"))

    # -- sessions --

    def attach(self, hello: pb.Hello, peer: Peer) -> Member:
        """A session begins; `peer` gets its events. A former session of the worker ends. Raises DilocoError."""
        self.watch.count("hello")
        member = self.run.hello(hello, self._clock.now)
        self.watch.attached(hello.worker_id, hello.generation)
        former = self._sessions.get(member.worker_id)
        if former is not None:
            replaced = former[0].generation < member.generation
            former[1].end(Superseded("joined by a newer process") if replaced else ConnectionClosed("a newer session"))
        self._sessions[member.worker_id] = (member, peer)
        self.settle()
        return member

    def detach(self, peer: Peer) -> None:
        """The session's connection broke, and the server notices."""
        for worker_id, (member, current) in list(self._sessions.items()):
            if current is peer:
                del self._sessions[worker_id]
                self.run.cut(member, self._clock.now)
                if self.run.members.known(worker_id) is member:
                    self.watch.cut(worker_id)
                self.settle()

    def hear(self, peer: Peer, request: pb.SessionRequest) -> None:
        """A message of a session. Raises NotMember or Superseded."""
        member = peer.member
        assert member is not None
        self.watch.count(request.WhichOneof("body") or "nothing")
        session = self._sessions.get(member.worker_id)
        if session is not None and session[0] is member and session[1] is not peer:
            return  # the same process has begun another session since, and this message is old
        self.run.hear(member.worker_id, member.generation, request, self._clock.now)
        self.watch.heard(member.worker_id, member.generation, request)
        self.settle()

    # -- pushes and pulls --

    def begin_push(self, header: pb.PushHeader, answer: Answer = _nobody) -> Ticket | None:
        """None if nothing need be sent: then its answer comes. Raises DilocoError."""
        self.watch.count("push begins")
        reply = self.run.begin_push(header)
        self.watch.admitted(header)
        if isinstance(reply, Ticket):
            return reply
        self.watch.answered(header, reply)
        self._answer(header, reply, answer)
        return None

    def finish_push(self, ticket: Ticket, frames: Sequence[bytes], answer: Answer = _nobody) -> None:
        """Those of the frames that are not here yet have come. Raises DilocoError."""
        self.watch.count("push ends")
        held = set(ticket.assembly.held(ticket.places))
        for i, (place, frame) in enumerate(zip(ticket.places, frames, strict=True)):
            if i not in held:
                self.bytes_in += len(frame)
                ticket.assembly.add(place, read_frame(frame))
                if self._keeper is not None and not ticket.assembly.closed:
                    self._keeper.keep_frame(ticket, frame)
        outcome = self.run.finish_push(ticket, self._clock.now)
        self.watch.admitted(ticket.header)
        self.watch.answered(ticket.header, outcome)
        self.settle()
        self._answer(ticket.header, outcome, answer)

    def _answer(self, header: pb.PushHeader, outcome: pb.Outcome, answer: Answer) -> None:
        """Once what it tells is on disk."""

        def tell() -> None:
            self.watch.acknowledged(header, outcome)
            answer(outcome)

        self._when_durable(tell)

    def _when_durable(self, action: Action) -> None:
        if self._keeper is None:
            action()
        else:
            self._keeper.when_durable(action)

    def pull(self, request: pb.PullRequest) -> list[Brought]:
        """The updates since a version, or a snapshot. Raises DilocoError."""
        self.watch.count("pull")
        self.run.check_run_id(request.run_id)
        self.run.check_readable(request.fragment)
        parameters = self.run.parameters
        updates = None
        if not request.snapshot:
            updates = parameters.updates_since(request.fragment, request.since_version)
        if updates is not None:
            brought = [(update.item, list(update.messages)) for update in updates]
        else:
            snapshot = parameters.pin(request.fragment)
            try:
                brought = [(snapshot_item(snapshot, 0), list(snapshot_frames(snapshot, 0)))]
            finally:
                parameters.unpin(snapshot)
        self.bytes_out += sum(len(message) for _, messages in brought for message in messages)
        return brought

    # -- time --

    def settle(self) -> None:
        """After anything happened: close what is due, deliver what is to be told, set the timer."""
        now, gate = self._clock.now, self.gate
        self.run.tick(now)
        closes = self.run.due(now)
        self._committing += len(closes)
        if not self._committing:
            self.run.settle_finish()
        self._keep()
        for close in closes:
            self._decide(close)
        news = self.run.news.take()
        for worker_id, event in news:
            session = self._sessions.get(worker_id)
            if session is not None:
                session[1].deliver(event)
        self.watch.settled()
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.run.next_deadline()
        if deadline is not None and deadline != float("inf"):
            self._timer = self._clock.after(deadline - now, lambda: gate(self.settle))

    def stand_still(self, seconds: float) -> None:
        """As if the process were stopped."""
        if not self.gate.shut:
            gate = self.gate
            gate.shut = True
            self._clock.after(seconds, lambda: self._go_on(gate, seconds))

    def _go_on(self, gate: Gate, seconds: float) -> None:
        if gate is self.gate and self.up:
            self.watch.stood_still(seconds)
            gate.open()

    def _decide(self, close: Close) -> None:
        """The outer step of a round begins once it is on disk of what."""
        self._when_durable(lambda: self._begin_commit(close))

    def _begin_commit(self, close: Close) -> None:
        gate = self.gate
        self._clock.after(self._commit_seconds(), lambda: gate(lambda: self._commit(close)))

    def _commit(self, close: Close) -> None:
        self.watch.count("outer step")
        committed = self.run.commit(close)
        self.watch.committed(committed)
        self.run.publish(committed, self._clock.now)
        self._committing -= 1
        self.settle()

    # -- what outlives the process --

    @property
    def position(self) -> int:
        """Of the disk's last record of what has happened so far."""
        return self._keeper.position if self._keeper is not None else 0

    def _keep(self) -> None:
        if self._keeper is None:
            self.run.records.clear()
        else:
            self._keeper.keep()
            self._keeper.begin(self._begin)

    def _begin(self) -> None:
        self.run.begin()
        self.settle()

    def snapshot(self, pause: Callable[[], float]) -> None:
        """Make one; `pause` gives how long the next fragment takes."""
        keeper = self._keeper
        if keeper is not None:
            self.gate(lambda: keeper.snapshot(pause))

    def kill(self, survive: float) -> int:
        """As SIGKILL or a loss of power does. Of what was not synced only this share is left. Returns how many
        records are lost."""
        assert self.disk is not None
        self.gate.close_for_ever()
        self.up = False
        self._sessions.clear()
        self._committing = 0
        if self._timer is not None:
            self._timer.cancel()
        return self.disk.crash(survive)

    def restart(self, back: Back | None = None) -> None:
        """A new process goes on from the disk."""
        assert self.disk is not None
        assert not self.up
        assert self.run.manifest is not None
        now = self._clock.now
        revived = revive(self.disk, self.run.config, self.run.manifest, now, back)
        self.run, self.gate, self.up = revived.run, Gate(), True
        self._keeper = self._new_keeper()
        assert self._keeper is not None
        self._keeper.start(revived.saved.snapshot.first_segment)
        self.watch.restarted(revived)
        self.settle()
