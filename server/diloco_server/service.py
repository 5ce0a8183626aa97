"""gRPC in and out, and nothing else: messages to calls on the engine, errors to statuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import ACK_EVERY_FRAMES, ANSWER_SECONDS, MAX_DATA_CONNECTIONS
from diloco_proto.codec import CorruptFrame, Format, frame_checksum, is_compressed, is_intact, read_frame
from diloco_proto.errors import (
    ConnectionClosed,
    DamagedFrame,
    DilocoError,
    InvalidContribution,
)
from diloco_proto.frame_messages import read_push

from .answers import Refusals, readable, reader
from .assembly import Assembly, Place
from .cuts import asked_for, cuts_of, recut
from .engine import Engine, SessionQueue, offer
from .limits import Stream, address_of
from .members import Member
from .parameters import snapshot_frame, snapshot_item
from .pushes import Ticket
from .status import describe, status

log = logging.getLogger("diloco.server")

T = TypeVar("T")

Context = grpc.aio.ServicerContext[Any, Any]
PushStream = AsyncIterator[pb.PushRequest | memoryview | None]


def handlers(engine: Engine) -> grpc.GenericRpcHandler:
    """The service `diloco.v1.Outer`. Pull answers with bytes already serialized, so it has no serializer; of a push's
    frames it is given views.

    All handlers are those of streams, also where there is one request: for that gRPC would wait for ever.
    """
    service = Service(engine)
    return grpc.method_handlers_generic_handler(
        "diloco.v1.Outer",
        {
            "Session": grpc.stream_stream_rpc_method_handler(
                service.session, reader(pb.SessionRequest.FromString), pb.SessionEvent.SerializeToString
            ),
            "Push": grpc.stream_stream_rpc_method_handler(
                service.push, reader(read_push), pb.PushReply.SerializeToString
            ),
            "Pull": grpc.stream_stream_rpc_method_handler(service.pull, reader(pb.PullRequest.FromString), None),
            "Describe": grpc.stream_stream_rpc_method_handler(
                service.describe, reader(pb.DescribeRequest.FromString), pb.RunDescription.SerializeToString
            ),
            "Status": grpc.stream_stream_rpc_method_handler(
                service.status, reader(pb.StatusRequest.FromString), pb.RunStatus.SerializeToString
            ),
        },
    )


class Service:
    """One method a call of the protocol."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._limits = engine.limits
        self._refuse = Refusals().refuse

    # -- Session --

    async def session(
        self, requests: AsyncIterator[pb.SessionRequest | None], context: Context
    ) -> AsyncIterator[pb.SessionEvent]:
        try:
            hello = await self._hello(requests, context)
            with self._limits.hold(Stream.SESSION, hello.worker_id):
                async with aclosing(self._session(hello, requests, context)) as events:
                    async for event in events:
                        yield event
        except DilocoError as error:
            await self._refuse(context, "Session", error)

    async def _session(
        self, hello: pb.Hello, requests: AsyncIterator[pb.SessionRequest | None], context: Context
    ) -> AsyncGenerator[pb.SessionEvent]:
        member, queue = self._engine.attach(hello)
        extra = {"worker": member.worker_id, "peer": context.peer()}
        log.info("worker %r joined from %s", member.worker_id, context.peer(), extra=extra)
        reader = asyncio.create_task(self._read_session(requests, member, queue))
        try:
            await self._engine.keeper.durable()  # what Welcome says of the worker's contributions
            while True:
                event = await queue.get()
                if event is None:
                    return
                if isinstance(event, DilocoError):
                    await self._refuse(context, "Session", event)  # before `detach`, which may fail as well
                yield event
        finally:
            reader.cancel()
            self._engine.detach(member, queue)

    async def _hello(self, requests: AsyncIterator[pb.SessionRequest | None], context: Context) -> pb.Hello:
        first = await self._first(requests, context)
        if first is None or not first.HasField("hello"):
            raise InvalidContribution("a session begins with hello")
        return first.hello

    async def _read_session(
        self, requests: AsyncIterator[pb.SessionRequest | None], member: Member, queue: SessionQueue
    ) -> None:
        try:
            async for read in requests:
                request = readable(read)
                self._engine.hear(member, queue, request)
                if request.HasField("heartbeat"):
                    offer(queue, pb.SessionEvent(beat=pb.Beat()))
            offer(queue, None)
        except DilocoError as error:
            offer(queue, error)
        except grpc.aio.BaseError:
            offer(queue, None)  # the stream is over
        except Exception:
            log.exception("the session of worker %r failed; please report this", member.worker_id)
            offer(queue, DilocoError("the server failed on a message of this worker; its log says why"))

    # -- Push --

    async def push(self, requests: PushStream, context: Context) -> None:
        try:
            stream = aiter(requests)
            first = await self._first(stream, context)
            if not isinstance(first, pb.PushRequest) or not first.HasField("header"):
                raise InvalidContribution("a push begins with its header")
            with self._limits.hold(Stream.PUSH, first.header.worker_id):
                await context.write(pb.PushReply(outcome=await self._push(first.header, stream, context)))
        except DilocoError as error:
            await self._refuse(context, "Push", error)

    async def _push(self, header: pb.PushHeader, stream: PushStream, context: Context) -> pb.Outcome:
        self._engine.keeper.check()
        ticket = self._engine.run.begin_push(header)
        if isinstance(ticket, pb.Outcome):
            self._engine.metrics.on_push(ticket)
            await _answering(context, self._engine.keeper.durable(), 0)
            return ticket
        with ticket.filling():
            held = ticket.assembly.held(ticket.places)
            await context.write(pb.PushReply(have=pb.Have(frames=held)))
            received = await self._receive(stream, ticket, set(held), context)
            return await _answering(context, self._engine.finish_push(ticket), received)

    async def _receive(self, stream: PushStream, ticket: Ticket, held: set[int], context: Context) -> int:
        """Take in the frames that are missing; returns how many."""
        header, count = ticket.header, 0
        wanted = [place for i, place in enumerate(ticket.places) if i not in held]
        if not wanted:
            return 0
        async with aclosing(_ahead(stream, self._limits.bounds.frame_seconds, len(wanted))) as messages:
            async for frame in messages:
                if ticket.assembly.closed:
                    break
                if not isinstance(frame, memoryview):
                    raise InvalidContribution(
                        f"worker {header.worker_id!r} sent {count} of {len(wanted)} frames of fragment "
                        f"{header.fragment}, then ended"
                    )
                self._engine.bytes_in += len(frame)
                where = f"worker {header.worker_id!r}, fragment {header.fragment}, block {wanted[count].first_block}"
                if is_compressed(frame):
                    await self._heavy(_write, ticket.assembly, wanted[count], frame, where)
                else:  # a fraction of a millisecond, less of the processor's time than by way of a thread
                    _write(ticket.assembly, wanted[count], frame, where)
                ticket.assembly.hold(wanted[count])
                self._engine.keeper.keep_frame(ticket, frame)  # nothing comes in between: what is held is kept
                if not self._engine.keeper.has_room:
                    await _answering(context, self._engine.keeper.room(), count)
                count += 1
                if count % ACK_EVERY_FRAMES == 0:
                    await context.write(pb.PushReply(ack=pb.Ack(frames=count)))
        return count

    # -- Pull --

    async def pull(self, requests: AsyncIterator[pb.PullRequest | None], context: Context) -> None:
        try:
            request = await self._only(requests, context)
            with self._limits.hold(Stream.PULL, address_of(context.peer())):
                writer = _Writer(context, self._limits.bounds.unread_seconds)
                began = self._engine.clock()
                try:
                    async with aclosing(self._pull(request)) as messages:
                        async for message in messages:
                            await writer.write(message)
                            self._engine.bytes_out += len(message)
                finally:
                    await writer.settle()
                if not request.snapshot:
                    self._engine.reader_speeds.note(writer.written, self._engine.clock() - began, context.peer())
        except DilocoError as error:
            await self._refuse(context, "Pull", error)

    async def _pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        run = self._engine.run
        run.check_run_id(request.run_id)
        run.check_readable(request.fragment)
        if request.stripes > MAX_DATA_CONNECTIONS or request.stripe >= max(1, request.stripes):
            raise InvalidContribution(
                f"asked for stripe {request.stripe} of {request.stripes}; a pull has at most {MAX_DATA_CONNECTIONS}"
            )
        fragment = run.layout.fragments[request.fragment]
        asked_for(fragment, request)
        updates = None
        if not request.snapshot:
            updates = run.parameters.updates_since(request.fragment, request.since_version)
        if updates is None:
            async with aclosing(self._snapshot(request)) as messages:
                async for message in messages:
                    yield message
            return
        for update in updates:
            cuts = cuts_of(fragment, Format(update.item.codec), request, update.version)
            item = pb.Item()
            item.CopyFrom(update.item)
            item.frames = len(cuts)
            yield pb.PullReply(item=item).SerializeToString()
            for cut in cuts:
                message = update.messages[cut.number]
                yield message if cut.whole else await self._heavy(recut, message, cut)

    async def _snapshot(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        version = request.item_version if request.skip_frames else None
        kept = request.kept if request.HasField("kept") else None
        async with self._engine.snapshot(request.fragment, version, kept) as snapshot:
            cuts = cuts_of(self._engine.run.layout.fragments[request.fragment], Format.FP32, request, snapshot.version)
            yield pb.PullReply(item=snapshot_item(snapshot, 0, len(cuts))).SerializeToString()
            for cut in cuts:
                yield await self._heavy(snapshot_frame, snapshot, cut.first, cut.stop)

    async def _heavy(self, work: Callable[..., T], *arguments: object) -> T:
        """Its result, made in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._engine.threads, work, *arguments)

    # -- Describe, Status --

    async def describe(self, requests: AsyncIterator[pb.DescribeRequest | None], context: Context) -> None:
        try:
            await self._only(requests, context)
            await context.write(describe(self._engine.run, self._engine.keeper.all_kept()))
        except DilocoError as error:
            await self._refuse(context, "Describe", error)

    async def status(self, requests: AsyncIterator[pb.StatusRequest | None], context: Context) -> None:
        try:
            request = await self._only(requests, context)
            await context.write(status(self._engine, request.rounds))
        except DilocoError as error:
            await self._refuse(context, "Status", error)

    # -- the first message --

    async def _first(self, requests: AsyncIterator[T | None], context: Context) -> T | None:
        """None if the stream ends without one."""
        with self._limits.hold(Stream.UNNAMED, address_of(context.peer())):
            return await _next(aiter(requests), self._limits.bounds.first_seconds)

    async def _only(self, requests: AsyncIterator[T | None], context: Context) -> T:
        """That of a call that has one request. Raises InvalidContribution."""
        request = await self._first(requests, context)
        if request is None:
            raise InvalidContribution("the call ended without its request")
        return request


class _Writer:
    """Writes the messages of a pull, and does not wait for ever for a reader that stands still."""

    def __init__(self, context: Context, patience: float) -> None:
        self._context = context
        self._patience = patience
        self._write: asyncio.Future[None] | None = None
        self.written = 0
        """Bytes."""

    async def write(self, message: bytes) -> None:
        """Raises ConnectionClosed when the reader takes nothing for too long; `settle` then waits for it."""
        write = self._write = asyncio.ensure_future(self._context.write(message))
        done, _ = await asyncio.wait((write,), timeout=self._patience)
        if not done:
            raise ConnectionClosed(f"nothing of this pull was read for {self._patience:.0f} s")
        await write
        self.written += len(message)

    async def settle(self) -> None:
        """Until the last message is gone, or the call has ended: gRPC holds it so long, so it must count so long."""
        if self._write is not None:
            await asyncio.gather(self._write, return_exceptions=True)


def _write(assembly: Assembly, place: Place, data: memoryview, where: str) -> None:
    """Heavy if the frame is compressed. Raises DamagedFrame for bytes that are not those announced, InvalidContribution
    for such as are, but no frame that a worker may send here."""
    if not is_intact(data) or frame_checksum(data) != place.digest:
        raise DamagedFrame(f"{where}: the frame is not the one announced; it was damaged on its way")
    try:
        frame = read_frame(data, intact=True)
    except CorruptFrame as error:
        raise InvalidContribution(f"{where}: {error}") from error
    assembly.write(place, frame)


async def _next(stream: AsyncIterator[T | None], seconds: float) -> T | None:
    """The next message; None at the end. Raises ConnectionClosed when none comes for so long, InvalidContribution for
    one that cannot be read."""
    try:
        async with asyncio.timeout(seconds):
            async for message in stream:
                return readable(message)
            return None
    except TimeoutError:
        raise ConnectionClosed(f"nothing has arrived on this stream for {seconds:.0f} s") from None


async def _ahead(stream: AsyncIterator[T | None], seconds: float, count: int) -> AsyncGenerator[T | None]:
    """The next `count` messages, at least one, each as by `_next`. One more is under way while one is dealt with: a
    peer may send little of what nobody has asked for."""
    reading = asyncio.ensure_future(_next(stream, seconds))
    try:
        for left in range(count, 0, -1):
            message = await reading
            if left > 1:
                reading = asyncio.ensure_future(_next(stream, seconds))
                await asyncio.sleep(0)  # gRPC is asked in the task's first step, now
            yield message
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _answering(context: Context, work: Awaitable[T], acked: int) -> T:
    """The result of `work`. Meanwhile the worker is told now and then that its push is alive, by its last Ack."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait((task,), timeout=ANSWER_SECONDS))[0]:
            await context.write(pb.PushReply(ack=pb.Ack(frames=acked)))
        return task.result()
    finally:
        task.cancel()
