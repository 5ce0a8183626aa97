"""Drives a Run in real time: its clock, its threads, its timers, and the queues to the workers' sessions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format
from diloco_proto.errors import ConnectionClosed, DilocoError, Superseded

from .members import Member
from .outer import warm_up
from .parameters import Snapshot
from .pushes import Ticket
from .rounds import Close
from .run import Run

log = logging.getLogger("diloco.server")

SESSION_QUEUE = 10_000
"""Events; a worker that reads none of so many has lost its session and must come back."""

_UNREAD = "the worker did not read its session's events"

SessionQueue = asyncio.Queue[pb.SessionEvent | DilocoError | None]
"""What goes to one worker; an error ends its session with it, None ends it quietly."""


class Engine:
    """Owns the Run on one event loop. Heavy work goes to `threads`, in which nothing but arrays is touched."""

    def __init__(self, run: Run, threads: ThreadPoolExecutor, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self.threads = threads
        self.clock = clock
        self.started_at = clock()
        self.bytes_in = 0
        self.bytes_out = 0
        self.draining = False
        self.on_failure: Callable[[Exception], None] | None = None
        self._sessions: dict[str, tuple[Member, SessionQueue]] = {}
        self._commits: set[asyncio.Task[None]] = set()
        self._busy: dict[int, asyncio.Lock] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def warm_up(self) -> None:
        """Compile the kernels that this run needs."""
        config = self.run.config
        formats = {config.uplink, config.downlink, Format.FP32}
        await asyncio.get_running_loop().run_in_executor(self.threads, warm_up, formats)

    def attach(self, hello: pb.Hello) -> tuple[Member, SessionQueue]:
        """A session begins. A former session of the same worker ends."""
        if self.draining:
            raise ConnectionClosed("the server is shutting down")
        member = self.run.hello(hello, self.clock())
        member.seen = self.clock()  # the first hello seeds the run from --init, which takes a while
        former = self._sessions.get(member.worker_id)
        if former is not None:
            offer(former[1], _replaced(former[0], member))
        queue: SessionQueue = asyncio.Queue(SESSION_QUEUE)
        self._sessions[member.worker_id] = member, queue
        self.settle()
        return member, queue

    def detach(self, member: Member, queue: SessionQueue) -> None:
        """The session's stream has ended. The member has a while to come back."""
        if self._is_current(member, queue):
            del self._sessions[member.worker_id]
            self.run.cut(member, self.clock())
            self.settle()

    def hear(self, member: Member, queue: SessionQueue, request: pb.SessionRequest) -> None:
        """A message of a session. Raises ConnectionClosed for one that another has taken the place of, whose messages
        may be older than those heard since; NotMember or Superseded."""
        if not self._is_current(member, queue):
            raise ConnectionClosed("another session of this worker has begun")
        self.run.hear(member.worker_id, member.generation, request, self.clock())
        self.settle()

    def _is_current(self, member: Member, queue: SessionQueue) -> bool:
        current = self._sessions.get(member.worker_id)
        return current is not None and current[1] is queue

    async def finish_push(self, ticket: Ticket) -> pb.Outcome:
        """All frames of the stream are in."""
        prepared = await asyncio.get_running_loop().run_in_executor(self.threads, ticket.prepare)
        outcome = self.run.finish_push(ticket, self.clock(), prepared)
        self.settle()
        return outcome

    def settle(self) -> None:
        """After anything happened: close what is due, deliver what is to be told, set the timer."""
        now = self.clock()
        self.run.tick(now)
        if not self.draining:
            for close in self.run.due(now):
                task = asyncio.get_running_loop().create_task(self._commit(close))
                self._commits.add(task)
                task.add_done_callback(self._commits.discard)
        if not self._commits:
            self.run.settle_finish()
        outbox, self.run.outbox = self.run.outbox, []
        for worker_id, event in outbox:
            session = self._sessions.get(worker_id)
            if session is not None:
                offer(session[1], event)
        self._set_timer(now)

    async def _commit(self, close: Close) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with self.fragment_lock(close.fragment):
                committed = await loop.run_in_executor(self.threads, self.run.commit, close, self.threads)
                self.run.publish(committed, self.clock())
            if (task := asyncio.current_task()) is not None:
                self._commits.discard(task)
            self.settle()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """A fault of ours: the server stops, since the run's state can no longer be trusted to go on."""
        log.critical("the server has failed and stops; please report this", exc_info=error)
        if self.on_failure is not None:
            self.on_failure(error)

    def _on_timer(self) -> None:
        try:
            self.settle()
        except Exception as error:
            self.fail(error)

    def fragment_lock(self, fragment: int) -> asyncio.Lock:
        """Held while a fragment's parameters change."""
        return self._busy.setdefault(fragment, asyncio.Lock())

    async def pin(self, fragment: int) -> Snapshot:
        async with self.fragment_lock(fragment):
            return self.run.parameters.pin(fragment)

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.run.next_deadline()
        if deadline is not None and deadline != float("inf"):
            delay = max(0.01, deadline - now)
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    async def drain(self, reason: str) -> None:
        """Take no more rounds, tell the workers, let running commits end."""
        self.draining = True
        log.warning(
            "shutting down (%s): run %s ends after %d rounds; its parameters were in memory only",
            reason,
            self.run.run_id,
            self.run.rounds_committed,
        )
        for _, queue in self._sessions.values():
            offer(queue, pb.SessionEvent(draining=pb.Draining(reason=reason)))
        while self._commits:
            await asyncio.wait(set(self._commits))
        if self._timer is not None:
            self._timer.cancel()
        for _, queue in self._sessions.values():
            offer(queue, ConnectionClosed(f"the server is shutting down: {reason}"))


def _replaced(former: Member, member: Member) -> DilocoError:
    """Why a session ends when its worker says hello anew. The same process may come back if it was this one that
    lived: a hello can be late, by a connection that was given up."""
    if former.generation == member.generation:
        return ConnectionClosed("another session of this worker has begun")
    return Superseded(f"worker {member.worker_id!r} has joined again: stop this process, or give it another worker_id")


def offer(queue: SessionQueue, event: pb.SessionEvent | DilocoError | None) -> None:
    """Put without waiting; who has not read so many events gets an error instead of them."""
    try:
        queue.put_nowait(event)
    except asyncio.QueueFull:
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(event if isinstance(event, DilocoError) else ConnectionClosed(_UNREAD))
