"""Drives a Run in real time: its clock, its threads, its timers, and the queues to the workers' sessions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format
from diloco_proto.errors import ConnectionClosed, DilocoError, Superseded
from diloco_proto.speeds import KEPT_OF_MANY, Speeds

from .keeper import Keeper
from .limits import Limits
from .members import Member
from .metrics import Metrics
from .model import Committed
from .outer import warm_up
from .parameters import Snapshot
from .pushes import Ticket
from .rates import Rates, Totals
from .round import Close
from .run import Run
from .store import StorageFailed

log = logging.getLogger("diloco.server")

SESSION_QUEUE = 10_000
"""Events; a worker that reads none of so many has lost its session and must come back."""

_UNREAD = "the worker did not read its session's events"

SessionQueue = asyncio.Queue[pb.SessionEvent | DilocoError | None]
"""What goes to one worker; an error ends its session with it, None ends it quietly."""


class Engine:
    """Owns the Run on one event loop. Heavy work goes to `threads`, in which nothing but arrays is touched."""

    def __init__(
        self, run: Run, threads: ThreadPoolExecutor, keeper: Keeper, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.run = run
        self.keeper = keeper
        self.threads = threads
        self.clock = clock
        self.started_at = clock()
        self.bytes_in = 0
        self.bytes_out = 0
        self.draining = False
        self.limits = Limits()
        self.metrics = Metrics()
        self.rates = Rates()
        self.reader_speeds = Speeds(KEPT_OF_MANY)
        self.storage: Callable[[], pb.Storage | None] | None = None
        """How the run stands on disk; None while nothing is kept there."""
        self.on_failure: Callable[[Exception], None] | None = None
        self._sessions: dict[str, tuple[Member, SessionQueue]] = {}
        self._commits: set[asyncio.Task[None]] = set()
        self._busy: dict[int, asyncio.Lock] = {}
        self._beginning: asyncio.Task[None] | None = None
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
            if member.live and not self.draining:
                extra = {"worker": member.worker_id}
                log.info("worker %r has lost its connection; it may come back", member.worker_id, extra=extra)
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
        if self.draining:  # nothing more is kept, so nothing more may be acknowledged
            raise ConnectionClosed("the server is shutting down; push again when it is back")
        outcome = self.run.finish_push(ticket, self.clock(), prepared)
        self.metrics.on_push(outcome)
        self.settle()
        await self.keeper.durable()
        return outcome

    @property
    def trouble(self) -> str:
        """Why nothing can be acknowledged now; empty when all is well."""
        return self.keeper.trouble

    @property
    def sessions(self) -> int:
        """Open ones."""
        return len(self._sessions)

    @property
    def totals(self) -> Totals:
        return Totals(self.run.rounds_committed, self.run.tokens, self.bytes_in, self.bytes_out)

    def settle(self) -> None:
        """After anything happened: close what is due, deliver what is to be told, set the timer."""
        now = self.clock()
        self.rates.note(now, self.totals)
        self.run.tick(now)
        if not self.draining:
            for close in self.run.due(now):
                task = asyncio.get_running_loop().create_task(self._commit(close))
                self._commits.add(task)
                task.add_done_callback(self._commits.discard)
        if not self._commits:
            self.run.settle_finish()
        self._keep()
        news = self.run.news.take()
        for worker_id, event in news:
            session = self._sessions.get(worker_id)
            if session is not None:
                offer(session[1], event)
        self._set_timer(now)

    def _keep(self) -> None:
        records, self.run.records = self.run.records, []
        self.keeper.keep(records)
        if self.run.can_begin and self.run.hold_seed and self._beginning is None:
            self._beginning = asyncio.get_running_loop().create_task(self._begin())

    async def _begin(self) -> None:
        """The first parameters are all here: once they are on disk, the workers are told."""
        try:
            await self.keeper.begin(self.fragment_lock)
            self.run.begin()
            self.settle()
        except Exception as error:
            self.fail(error)

    async def _commit(self, close: Close) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self.keeper.durable()  # the decision, and what it was made of
            async with self.fragment_lock(close.fragment):
                began = self.clock()
                self.run.parameters.reader_speed = self.reader_speeds.slowest
                committed = await loop.run_in_executor(self.threads, self.run.commit, close, self.threads)
                self.keeper.reach("before_publish")
                self.run.publish(committed, self.clock())
                self._note_round(committed, self.clock() - began)
            if (task := asyncio.current_task()) is not None:
                self._commits.discard(task)
            self.settle()
            if self.keeper.snapshot_due() and not self.draining:
                self.keeper.start_snapshot(self.fragment_lock, self.fail)
        except Exception as error:
            self.fail(error)

    def _note_round(self, committed: Committed, seconds: float) -> None:
        """Metrics and a line in the log of a round that was just published."""
        fragment = committed.close.fragment
        record = self.run.rounds.records[fragment][-1]
        overflowed = [c.key.worker_id for c in committed.staged] if not committed.close.contributions else []
        self.metrics.on_round(record, seconds, overflowed)
        log.debug(
            "fragment %d is at version %d: counted %s; missed %s; open for %.2f s, commit in %.3f s",
            fragment,
            record.version,
            ", ".join(m.worker_id for m in record.members) or "nobody",
            ", ".join(record.missed) or "nobody",
            record.open_seconds,
            seconds,
            extra={"fragment": fragment, "version": record.version, "seconds": record.open_seconds},
        )

    def fail(self, error: Exception) -> None:
        """A fault of ours, or of the disk: the server stops, since the run's state cannot be trusted to go on."""
        if isinstance(error, StorageFailed):
            log.critical("the server stops: %s", error)
        else:
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

    @asynccontextmanager
    async def snapshot(
        self, fragment: int, version: int | None = None, kept: int | None = None
    ) -> AsyncIterator[Snapshot]:
        """The newest version, or rather `version` if it is still held, held still for a reader; or what the kept
        snapshot of number `kept` holds.

        Raises NotKept or CorruptSnapshot.
        """
        if kept is not None:
            yield await self.keeper.kept(kept, fragment)
            return
        async with self.fragment_lock(fragment):
            pinned = self.run.parameters.pin(fragment, version)
        try:
            yield pinned
        finally:
            self.run.parameters.unpin(pinned)

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
        kept = "start the server again and it goes on" if self.keeper.keeps else "its parameters were in memory only"
        log.warning(
            "shutting down (%s): run %s is at version %d; %s", reason, self.run.run_id, self.run.complete_rounds, kept
        )
        for _, queue in self._sessions.values():
            offer(queue, pb.SessionEvent(draining=pb.Draining(reason=reason)))
        while self._commits:
            await asyncio.wait(set(self._commits))
        if self._timer is not None:
            self._timer.cancel()
        await self.keeper.close(self.fragment_lock)
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
