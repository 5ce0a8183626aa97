"""Many strangers at once: makes the calls of `hostile`, and says what became of each."""

from __future__ import annotations

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import grpc
from hostile import MEMBERS, Call
from raw_worker import RawWorker
from steady import MODEL

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import CLIENT_OPTIONS, MAX_MESSAGE_BYTES
from diloco_proto.wire import error_from_rpc

CHANNELS = 3
CALLERS = 12

UNANSWERED = 60.0
"""Seconds; a call whose side has ended is answered long before."""


@dataclass(slots=True)
class Tally:
    """What came of the calls."""

    calls: int = 0
    messages: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """By method, and error or outcome."""
    wrong: list[str] = field(default_factory=list)
    """Answers that should not be."""


class Callers:
    """All strangers of one server."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self.tally = Tally()

    def run(self, make: Callable[[int], Call], enough: Callable[[Tally], bool]) -> None:
        """Make the calls one after another, several at once, until there are enough."""
        numbers = itertools.count()
        options = [o for o in CLIENT_OPTIONS if o[0] != "grpc.max_send_message_length"]

        def caller(channel: grpc.Channel) -> None:
            while True:
                with self._lock:
                    if enough(self.tally):
                        return
                    number = next(numbers)
                self._make(channel, make(number))

        with ExitStack() as stack, ThreadPoolExecutor(CALLERS) as threads:
            for name in MEMBERS:
                stack.enter_context(_member(self._address, name))
            channels = [
                stack.enter_context(
                    grpc.insecure_channel(self._address, [*options, ("grpc.max_send_message_length", -1)])
                )
                for _ in range(CHANNELS)
            ]
            for done in [threads.submit(caller, channels[i % CHANNELS]) for i in range(CALLERS)]:
                done.result()

    def _make(self, channel: grpc.Channel, call: Call) -> None:
        sent, over = threading.Event(), threading.Event()

        def messages() -> Iterator[bytes]:
            yield from call.messages
            sent.set()
            if not call.ends:
                over.wait()

        stream = channel.stream_stream(f"/diloco.v1.Outer/{call.method}")(messages(), timeout=UNANSWERED)
        answer, wrong = "gone away", ""
        try:
            if call.ends:
                answer = _read(stream, call)
            else:
                stream.add_done_callback(lambda _: sent.set())
                sent.wait()
        except grpc.RpcError as error:
            answer, wrong = _judged(call, error)
        finally:
            over.set()
            stream.cancel()
        with self._lock:
            self.tally.calls += 1
            self.tally.messages += len(call.messages)
            self.tally.answers[f"{call.method} {answer}"] += 1
            self.tally.wrong += [f"call {call.number} ({call.label}): {wrong}"] if wrong else []


def _read(stream: grpc.Call, call: Call) -> str:
    """What the server said last. Raises RpcError."""
    last = deque(stream, maxlen=1)
    if call.method == "Push" and last:
        reply = pb.PushReply.FromString(last[0])
        return pb.OutcomeKind.Name(reply.outcome.kind) if reply.HasField("outcome") else str(reply.WhichOneof("body"))
    return "OK"


def _judged(call: Call, error: grpc.RpcError) -> tuple[str, str]:
    """The answer, and what is wrong with it. Right is a typed error with the status of its class; or one of gRPC's own
    where that refuses before we see anything."""
    code, typed = error.code(), error_from_rpc(error)
    if typed is not None:
        fits = typed.status is code and str(typed)
        return type(typed).__name__, "" if fits else f"{typed!r} came with {code}"
    too_long = any(len(m) > MAX_MESSAGE_BYTES for m in call.messages) and code is grpc.StatusCode.RESOURCE_EXHAUSTED
    fits = too_long or code is grpc.StatusCode.UNIMPLEMENTED
    return str(code), "" if fits else f"{code}: {(error.details() or '')[:300]}"


class _member(ExitStack):
    """A session that goes on, of a worker that is never ready."""

    def __init__(self, address: str, name: str) -> None:
        super().__init__()
        self._worker = self.enter_context(RawWorker(address, name))
        self._ended = threading.Event()
        self._worker.join(MODEL, timeout=600)
        self._worker.expect("welcome")
        for body in (self._beat, self._drain):
            thread = threading.Thread(target=body, daemon=True)
            thread.start()
            self.callback(thread.join)
        self.callback(self._worker.end_session)
        self.callback(self._ended.set)

    def _beat(self) -> None:
        while not self._ended.wait(0.7):
            self._worker.say(heartbeat=pb.Heartbeat())

    def _drain(self) -> None:
        for _ in self._worker.events:
            pass
