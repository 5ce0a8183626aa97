"""The server in virtual time: a Run, and what the engine and the service do around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diloco_client.transport import PulledItem
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import read_frame
from diloco_proto.errors import ConnectionClosed, DilocoError, Superseded
from diloco_server.config import RunConfig
from diloco_server.members import Member
from diloco_server.parameters import snapshot_frames, snapshot_item
from diloco_server.pushes import Ticket
from diloco_server.rounds import Close
from diloco_server.run import Run

from .clock import Clock, Gate, Timer
from .line import Connection
from .watch import Watch


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
    stands still, timers and all."""

    def __init__(
        self,
        config: RunConfig,
        clock: Clock,
        *,
        commit_seconds: Callable[[], float] = lambda: 0.0,
        watch: Watch | None = None,
    ) -> None:
        self.run = Run(config)
        self.gate = Gate()
        self.watch = watch or Watch()
        self.bytes_in = 0
        self.bytes_out = 0
        self._clock = clock
        self._commit_seconds = commit_seconds
        self._sessions: dict[str, tuple[Member, Peer]] = {}
        self._committing = 0
        self._timer: Timer | None = None

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

    def begin_push(self, header: pb.PushHeader) -> Ticket | pb.Outcome:
        """Raises DilocoError."""
        self.watch.count("push begins")
        reply = self.run.begin_push(header)
        self.watch.admitted(header)
        if isinstance(reply, pb.Outcome):
            self.watch.answered(header, reply)
        return reply

    def finish_push(self, ticket: Ticket, frames: Sequence[bytes]) -> pb.Outcome:
        """Those of the frames that are not here yet have come. Raises DilocoError."""
        self.watch.count("push ends")
        held = set(ticket.assembly.held(ticket.places))
        for i, (place, frame) in enumerate(zip(ticket.places, frames, strict=True)):
            if i not in held:
                self.bytes_in += len(frame)
                ticket.assembly.add(place, read_frame(frame))
        outcome = self.run.finish_push(ticket, self._clock.now)
        self.watch.admitted(ticket.header)
        self.watch.answered(ticket.header, outcome)
        self.settle()
        return outcome

    def pull(self, request: pb.PullRequest) -> list[PulledItem]:
        """The updates since a version, or a snapshot. Raises DilocoError."""
        self.watch.count("pull")
        self.run.check_run_id(request.run_id)
        self.run.check_readable(request.fragment)
        parameters = self.run.parameters
        updates = None
        if not request.snapshot:
            updates = parameters.updates_since(request.fragment, request.since_version)
        if updates is not None:
            items = [_pulled(update.item, update.messages) for update in updates]
        else:
            snapshot = parameters.pin(request.fragment)
            try:
                items = [_pulled(snapshot_item(snapshot, 0), list(snapshot_frames(snapshot, 0)))]
            finally:
                parameters.unpin(snapshot)
        self.bytes_out += sum(item.nbytes for item in items)
        return items

    # -- time --

    def settle(self) -> None:
        """After anything happened: close what is due, deliver what is to be told, set the timer."""
        now = self._clock.now
        self.run.tick(now)
        for close in self.run.due(now):
            self._committing += 1
            self._clock.after(self._commit_seconds(), lambda close=close: self.gate(lambda: self._commit(close)))  # type: ignore[misc]
        if not self._committing:
            self.run.settle_finish()
        outbox, self.run.outbox = self.run.outbox, []
        for worker_id, event in outbox:
            session = self._sessions.get(worker_id)
            if session is not None:
                session[1].deliver(event)
        self.watch.settled()
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.run.next_deadline()
        if deadline is not None and deadline != float("inf"):
            self._timer = self._clock.after(deadline - now, lambda: self.gate(self.settle))

    def stand_still(self, seconds: float) -> None:
        """As if the process were stopped."""
        if not self.gate.shut:
            self.gate.shut = True
            self._clock.after(seconds, lambda: self._go_on(seconds))

    def _go_on(self, seconds: float) -> None:
        self.watch.stood_still(seconds)
        self.gate.open()

    def _commit(self, close: Close) -> None:
        self.watch.count("outer step")
        committed = self.run.commit(close)
        self.watch.committed(committed)
        self.run.publish(committed, self._clock.now)
        self._committing -= 1
        self.settle()


def _pulled(item: pb.Item, messages: Sequence[bytes]) -> PulledItem:
    frames = [pb.PullReply.FromString(message).frame for message in messages]
    return PulledItem(item.kind, item.version, item.digest, frames, sum(map(len, messages)))
