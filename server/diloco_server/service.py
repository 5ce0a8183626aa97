"""gRPC in and out, and nothing else: messages to calls on the engine, errors to statuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import ACK_EVERY_FRAMES
from diloco_proto.codec import CorruptFrame, read_frame
from diloco_proto.errors import ERROR_KEY, ConnectionClosed, DilocoError, InvalidContribution

from .engine import Engine, SessionQueue, offer
from .members import Member
from .parameters import snapshot_frames, snapshot_item
from .pushes import Ticket
from .status import describe, status

log = logging.getLogger("diloco.server")

Context = grpc.aio.ServicerContext[Any, Any]


def handlers(engine: Engine) -> grpc.GenericRpcHandler:
    """The service `diloco.v1.Outer`. Pull answers with bytes already serialized, so it has no serializer."""
    service = Service(engine)
    return grpc.method_handlers_generic_handler(
        "diloco.v1.Outer",
        {
            "Session": grpc.stream_stream_rpc_method_handler(
                service.session, pb.SessionRequest.FromString, pb.SessionEvent.SerializeToString
            ),
            "Push": grpc.stream_stream_rpc_method_handler(
                service.push, pb.PushRequest.FromString, pb.PushReply.SerializeToString
            ),
            "Pull": grpc.unary_stream_rpc_method_handler(service.pull, pb.PullRequest.FromString, None),
            "Describe": grpc.unary_unary_rpc_method_handler(
                service.describe, pb.DescribeRequest.FromString, pb.RunDescription.SerializeToString
            ),
            "Status": grpc.unary_unary_rpc_method_handler(
                service.status, pb.StatusRequest.FromString, pb.RunStatus.SerializeToString
            ),
        },
    )


async def _refuse(context: Context, error: DilocoError) -> None:
    """End the call with the error's status and class name. Never returns."""
    if not isinstance(error, ConnectionClosed):
        log.info("refused %s: %s: %s", context.peer(), type(error).__name__, error)
    await context.abort(error.status, str(error), ((ERROR_KEY, type(error).__name__),))


class Service:
    """One method a call of the protocol."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # -- Session --

    async def session(
        self, requests: AsyncIterator[pb.SessionRequest], context: Context
    ) -> AsyncIterator[pb.SessionEvent]:
        try:
            member, queue = self._engine.attach(await self._hello(requests))
        except DilocoError as error:
            await _refuse(context, error)
            return
        log.info("worker %r joined from %s", member.worker_id, context.peer())
        reader = asyncio.create_task(self._read_session(requests, member, queue))
        try:
            while True:
                event = await queue.get()
                if event is None:
                    return
                if isinstance(event, DilocoError):
                    await _refuse(context, event)
                    return
                yield event
        finally:
            reader.cancel()
            self._engine.detach(member, queue)

    async def _hello(self, requests: AsyncIterator[pb.SessionRequest]) -> pb.Hello:
        async for first in requests:
            if first.HasField("hello"):
                return first.hello
            break
        raise InvalidContribution("a session begins with hello")

    async def _read_session(
        self, requests: AsyncIterator[pb.SessionRequest], member: Member, queue: SessionQueue
    ) -> None:
        try:
            async for request in requests:
                self._engine.hear(member, queue, request)
            offer(queue, None)
        except DilocoError as error:
            offer(queue, error)
        except grpc.aio.BaseError:
            offer(queue, None)  # the stream is over
        except Exception:
            log.exception("the session of worker %r failed; please report this", member.worker_id)
            offer(queue, DilocoError("the server failed on a message of this worker; its log says why"))

    # -- Push --

    async def push(self, requests: AsyncIterator[pb.PushRequest], context: Context) -> AsyncIterator[pb.PushReply]:
        try:
            stream = aiter(requests)
            first = await anext(stream, None)
            if first is None or not first.HasField("header"):
                raise InvalidContribution("a push begins with its header")
            ticket = self._engine.run.begin_push(first.header)
            if isinstance(ticket, pb.Outcome):
                yield pb.PushReply(outcome=ticket)
                return
            held = ticket.assembly.held(ticket.places)
            yield pb.PushReply(have=pb.Have(frames=held))
            async for reply in self._receive(stream, ticket, set(held)):
                yield reply
            yield pb.PushReply(outcome=await self._engine.finish_push(ticket))
        except DilocoError as error:
            await _refuse(context, error)

    async def _receive(
        self, stream: AsyncIterator[pb.PushRequest], ticket: Ticket, held: set[int]
    ) -> AsyncIterator[pb.PushReply]:
        loop = asyncio.get_running_loop()
        wanted = [place for i, place in enumerate(ticket.places) if i not in held]
        for count, place in enumerate(wanted, 1):
            request = await anext(stream, None)
            if request is None or not request.HasField("frame"):
                raise InvalidContribution(
                    f"worker {ticket.header.worker_id!r} sent {count - 1} of {len(wanted)} frames of fragment "
                    f"{ticket.header.fragment}, then ended"
                )
            self._engine.bytes_in += len(request.frame)
            try:
                frame = await loop.run_in_executor(self._engine.threads, read_frame, request.frame)
            except CorruptFrame as error:
                raise InvalidContribution(
                    f"worker {ticket.header.worker_id!r}, fragment {ticket.header.fragment}, block "
                    f"{place.first_block}: {error}"
                ) from error
            ticket.assembly.add(place, frame)
            if count % ACK_EVERY_FRAMES == 0:
                yield pb.PushReply(ack=pb.Ack(frames=count))

    # -- Pull --

    async def pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[bytes]:
        try:
            async for message in self._pull(request):
                self._engine.bytes_out += len(message)
                yield message
        except DilocoError as error:
            await _refuse(context, error)

    async def _pull(self, request: pb.PullRequest) -> AsyncIterator[bytes]:
        run = self._engine.run
        run.check_run_id(request.run_id)
        run.check_readable(request.fragment)
        updates = None
        if not request.snapshot:
            updates = run.parameters.updates_since(request.fragment, request.since_version)
        if updates is None:
            async for message in self._snapshot(request):
                yield message
            return
        for update in updates:
            skip = request.skip_frames if request.item_version == update.version else 0
            item = pb.Item()
            item.CopyFrom(update.item)
            item.frames = max(0, len(update.messages) - skip)
            yield pb.PullReply(item=item).SerializeToString()
            for message in update.messages[skip:]:
                yield message

    async def _snapshot(self, request: pb.PullRequest) -> AsyncIterator[bytes]:
        snapshot = await self._engine.pin(request.fragment)
        try:
            skip = request.skip_frames if request.item_version == snapshot.version else 0
            yield pb.PullReply(item=snapshot_item(snapshot, skip)).SerializeToString()
            frames = snapshot_frames(snapshot, skip)
            loop = asyncio.get_running_loop()
            while (message := await loop.run_in_executor(self._engine.threads, next, frames, None)) is not None:
                yield message
        finally:
            self._engine.run.parameters.unpin(snapshot)

    # -- Describe, Status --

    async def describe(self, request: pb.DescribeRequest, context: Context) -> pb.RunDescription:
        return describe(self._engine.run)

    async def status(self, request: pb.StatusRequest, context: Context) -> pb.RunStatus:
        return status(self._engine, request.rounds)
