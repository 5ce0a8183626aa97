"""gRPC to one server: pushes, pulls and unary calls, with the only retries there are.

Synchronous grpc, called from the client's own threads. Failures of the connection are retried with full
jitter; errors that the server names (`DilocoError`) are raised at once.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import grpc

from diloco_proto import outer_pb2 as pb
from diloco_proto import outer_pb2_grpc as rpc
from diloco_proto.channel import CLIENT_OPTIONS, PUSH_WINDOW_FRAMES
from diloco_proto.codec import BLOCK, CorruptFrame, decode, read_frame, subtract
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import (
    ConnectionClosed,
    DilocoError,
    InvalidAddress,
    NotMember,
    NotReady,
    ServerUnreachable,
    SnapshotExpired,
)
from diloco_proto.wire import error_from_rpc

T = TypeVar("T")

log = logging.getLogger("diloco")

_FINAL = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
"""Statuses that gRPC itself gives for what no new attempt can mend, such as a message over the limit."""

_LOOPBACK = ("127.", "localhost:", "[::1]:")

RETRY_LATER = (ConnectionClosed, NotMember, NotReady, SnapshotExpired)
"""What the server may answer although the same call can succeed later."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Exponential backoff with full jitter: the n-th pause is uniform in [0, min(cap, first * 2^n)] seconds.

    The numbers are the system's: workers whose scripts seed `random` alike must not retry in step, and the trainer's
    own sequence stays what it is without us.
    """

    first: float = 0.5
    cap: float = 15.0

    def pause(self, attempt: int) -> float:
        return random.SystemRandom().uniform(0, min(self.cap, self.first * 2.0 ** min(attempt, 16)))


def parse_address(address: str) -> str:
    """host:port as gRPC takes it. Raises InvalidAddress."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise InvalidAddress(f"{address!r} is not a server address: write HOST:PORT, such as 203.0.113.7:50051")
    return address


@dataclass(slots=True)
class Counters:
    """Payload bytes on the wire, messages included, both directions; parameters moved, for bits a parameter."""

    bytes_up: int = 0
    bytes_down: int = 0
    contribution_bytes: int = 0
    contribution_parameters: int = 0
    update_bytes: int = 0
    update_parameters: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def up(self, size: int) -> None:
        with self._lock:
            self.bytes_up += size

    def down(self, size: int) -> None:
        with self._lock:
            self.bytes_down += size

    def contribution(self, size: int, parameters: int) -> None:
        with self._lock:
            self.contribution_bytes += size
            self.contribution_parameters += parameters

    def update(self, size: int, parameters: int) -> None:
        with self._lock:
            self.update_bytes += size
            self.update_parameters += parameters


@dataclass(slots=True)
class PulledItem:
    """One update or snapshot, its frames still encoded."""

    kind: pb.ItemKind
    version: int
    digest: int
    frames: list[bytes] = field(default_factory=list)
    nbytes: int = 0
    """Bytes of the messages that brought it."""

    def apply(self, theta: Floats) -> None:
        """Bring a fragment's parameters, float32[length], to this item's version, in place.

        Raises CorruptFrame unless the frames are whole and cover the fragment in order; theta is of no use then.
        """
        operation = decode if self.kind == pb.ITEM_SNAPSHOT else subtract
        end = 0
        for data in self.frames:
            frame = read_frame(data)
            stop = end + frame.num_blocks * BLOCK
            if frame.first_block * BLOCK != end or stop > theta.size:
                raise CorruptFrame(f"a frame begins at block {frame.first_block}, not at {end // BLOCK}")
            operation(frame.format, frame.scales, frame.codes, theta[end:stop])
            end = stop
        if end != theta.size:
            raise CorruptFrame(f"the frames end at block {end // BLOCK} of {theta.size // BLOCK}")


class Transport:
    """Two connections to one server: one for the session, one for bulk."""

    def __init__(self, address: str, retry: Retry | None = None) -> None:
        self.address = parse_address(address)
        self.retry = retry or Retry()
        self.counters = Counters()
        self.closed = threading.Event()
        options = [*CLIENT_OPTIONS]
        if self.address.startswith(_LOOPBACK):
            options.append(("grpc.enable_http_proxy", 0))  # a proxy cannot know what is on this machine
        self._session_channel = grpc.insecure_channel(self.address, options)
        self._bulk_channel = grpc.insecure_channel(self.address, options)
        self._control = rpc.OuterStub(self._session_channel)  # type: ignore[no-untyped-call]
        self._bulk = rpc.OuterStub(self._bulk_channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.closed.set()
        self._bulk_channel.close()
        self._session_channel.close()

    def wait_until_up(self, timeout: float, on_waiting: Callable[[], None]) -> None:
        """Return once the server answers; `on_waiting` is called when that takes more than a moment.

        Raises ServerUnreachable after `timeout` seconds.
        """
        ready = grpc.channel_ready_future(self._session_channel)
        try:
            ready.result(timeout=min(1.0, timeout))
            return
        except grpc.FutureTimeoutError:
            on_waiting()
        try:
            ready.result(timeout=max(0.0, timeout - 1.0))
        except grpc.FutureTimeoutError:
            ready.cancel()
            raise ServerUnreachable(
                f"no diloco-server answered at {self.address} within {timeout:.0f} s. Is it running, is the address "
                "right, and does a firewall let the port through?"
            ) from None

    def session(self, requests: Iterator[pb.SessionRequest]) -> Iterator[pb.SessionEvent]:
        """One attempt at a session. Raises the typed error, or ConnectionError when the connection broke."""
        call = self._control.Session(requests)
        try:
            for event in call:
                self.counters.down(event.ByteSize())
                yield event
        except grpc.RpcError as error:
            raise _translate(error) from error
        finally:
            call.cancel()

    def push(self, header: pb.PushHeader, frames: Sequence[bytes]) -> pb.Outcome:
        """Push until the server says what became of it. Blocks; raises typed errors that no retry can mend."""
        return self._retrying(lambda: self._push_once(header, frames))

    def pull(self, request: pb.PullRequest, patience: float | None = None) -> list[PulledItem]:
        """The updates since a version, or a snapshot. A broken transfer goes on at the frame where it broke.

        Raises ServerUnreachable when it still fails after `patience` seconds; None is for ever.
        """
        reader = _PullReader()
        return self._retrying(lambda: self._pull_once(request, reader), patience)

    def describe(self, timeout: float) -> pb.RunDescription:
        """Raises ServerUnreachable when nothing answers within `timeout` seconds."""
        describe: Callable[..., pb.RunDescription] = self._bulk.Describe
        return self._unary(describe, pb.DescribeRequest(), timeout)

    def status(self, timeout: float, rounds: int = 0) -> pb.RunStatus:
        """Raises ServerUnreachable when nothing answers within `timeout` seconds."""
        method: Callable[..., pb.RunStatus] = self._bulk.Status
        return self._unary(method, pb.StatusRequest(rounds=rounds), timeout)

    def _unary(self, method: Callable[..., T], request: object, timeout: float) -> T:
        try:
            return method(request, timeout=timeout, wait_for_ready=True)
        except grpc.RpcError as error:
            named = error_from_rpc(error)
            if named is not None:
                raise named from error
            raise ServerUnreachable(f"no diloco-server answered at {self.address} within {timeout:.0f} s") from error

    def _retrying(self, attempt: Callable[[], T], patience: float | None = None) -> T:
        count, began = 0, time.monotonic()
        while True:
            try:
                return attempt()
            except (ConnectionError, *RETRY_LATER) as error:
                level = logging.INFO if count == 0 else logging.DEBUG
                log.log(level, "a transfer to or from %s broke off and is tried again: %s", self.address, error)
                if patience is not None and time.monotonic() - began > patience:
                    raise ServerUnreachable(f"{self.address} has not answered for {patience:.0f} s: {error}") from error
                if self.closed.wait(self.retry.pause(count)):
                    raise
                count += 1

    def _push_once(self, header: pb.PushHeader, frames: Sequence[bytes]) -> pb.Outcome:
        stream = _PushStream(header, frames, self.counters)
        call = self._bulk.Push(iter(stream))
        try:
            for reply in call:
                self.counters.down(reply.ByteSize())
                if reply.HasField("outcome"):
                    outcome: pb.Outcome = reply.outcome
                    return outcome
                stream.on_reply(reply)
        except grpc.RpcError as error:
            raise _translate(error) from error
        finally:
            stream.stop()
            call.cancel()
        raise ConnectionError("the push ended without an outcome")

    def _pull_once(self, request: pb.PullRequest, reader: _PullReader) -> list[PulledItem]:
        current = reader.resume(request)
        self.counters.up(current.ByteSize())
        call = self._bulk.Pull(current)
        try:
            for reply in call:
                self.counters.down(reply.ByteSize())
                reader.take(reply)
        except grpc.RpcError as error:
            raise _translate(error) from error
        finally:
            call.cancel()
        return reader.finish()


class _PushStream:
    """The request side of one push: the header, then the frames the server lacks, a window ahead of its acks."""

    def __init__(self, header: pb.PushHeader, frames: Sequence[bytes], counters: Counters) -> None:
        self._header = header
        self._frames = frames
        self._counters = counters
        self._have: queue.SimpleQueue[set[int] | None] = queue.SimpleQueue()
        self._window = threading.Semaphore(PUSH_WINDOW_FRAMES)
        self._acked = 0
        self._stopped = False

    def __iter__(self) -> Iterator[pb.PushRequest]:
        yield self._counted(pb.PushRequest(header=self._header))
        have = self._have.get()
        if have is None:
            return
        for index, frame in enumerate(self._frames):
            if index in have:
                continue
            self._window.acquire()
            if self._stopped:
                return
            yield self._counted(pb.PushRequest(frame=frame))

    def on_reply(self, reply: pb.PushReply) -> None:
        if reply.HasField("have"):
            self._have.put(set(reply.have.frames))
        elif reply.HasField("ack"):
            for _ in range(reply.ack.frames - self._acked):
                self._window.release()
            self._acked = reply.ack.frames

    def stop(self) -> None:
        """Let the request thread end, wherever it waits."""
        self._stopped = True
        self._have.put(None)
        self._window.release()

    def _counted(self, request: pb.PushRequest) -> pb.PushRequest:
        size = request.ByteSize()
        self._counters.up(size)
        return request


class _PullReader:
    """What a pull has brought so far, over all its attempts."""

    def __init__(self) -> None:
        self._items: list[PulledItem] = []
        self._missing = 0
        """Frames of the last item still to come."""

    def resume(self, request: pb.PullRequest) -> pb.PullRequest:
        """The request for what is missing."""
        current = pb.PullRequest()
        current.CopyFrom(request)
        whole = self._items[:-1] if self._missing else self._items
        if whole and not request.snapshot:
            current.since_version = whole[-1].version
        if self._missing:
            current.skip_frames = len(self._items[-1].frames)
            current.item_version = self._items[-1].version
        return current

    def take(self, reply: pb.PullReply) -> None:
        if reply.HasField("item"):
            self._begin(reply.item)
        elif self._missing:
            self._items[-1].frames.append(reply.frame)
            self._missing -= 1
        else:
            raise ConnectionError("the server sent a frame that belongs to no item")
        self._items[-1].nbytes += reply.ByteSize()

    def _begin(self, item: pb.Item) -> None:
        last = self._items[-1] if self._items else None
        resumed = self._missing and last is not None and (last.kind, last.version) == (item.kind, item.version)
        if self._missing and not resumed:
            self._items.pop()
        if item.kind == pb.ITEM_SNAPSHOT and not resumed:
            self._items.clear()
        if not resumed:
            self._items.append(PulledItem(item.kind, item.version, item.digest))
        self._missing = item.frames

    def finish(self) -> list[PulledItem]:
        if self._missing:
            raise ConnectionError(f"the pull ended {self._missing} frames early")
        return self._items


def _translate(error: grpc.RpcError) -> Exception:
    """A typed error of the server, ConnectionError for what a new attempt may mend, or else DilocoError."""
    named = error_from_rpc(error)
    if named is not None:
        return named
    text = f"{error.code().name}: {error.details()}"
    return DilocoError(f"the server refused the call: {text}") if error.code() in _FINAL else ConnectionError(text)
