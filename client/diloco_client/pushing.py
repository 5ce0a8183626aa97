"""Pushes: frames up, a window ahead of the server's acknowledgements, resumed at the frame where it broke.

A push may travel as several stripes, each over a connection of its own; the server puts together the parts of a
contribution wherever they come from.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import PUSH_WINDOW_FRAMES
from diloco_proto.codec import Packed, frame_blocks
from diloco_proto.errors import DamagedFrame
from diloco_proto.frame_messages import frame_message

from .lines import Lines
from .retry import Stalled
from .watch import Watch

MAX_DAMAGED = 5
"""Times in a row that one frame may arrive damaged."""

SLOWEST = 8.0
"""Times the progress timeout: up to so much a link gets on which a single frame takes longer than that."""

_TELLING = (
    pb.OUTCOME_COUNTED,
    pb.OUTCOME_RESYNC,
    pb.OUTCOME_CLOSED,
    pb.OUTCOME_CONFLICT,
    pb.OUTCOME_SEEDED,
    pb.OUTCOME_STAGED,
    pb.OUTCOME_ALREADY_HAVE,
    pb.OUTCOME_PART_HELD,
)
"""Outcomes of the stripes of one push, the one that says most of the whole first."""


class PushStripe:
    """One stream of a push, over all its attempts."""

    def __init__(self, lines: Lines, name: str, header: pb.PushHeader, frames: Sequence[Packed | bytes]) -> None:
        self._lines = lines
        self._name = name
        self._header = header
        self._frames = frames
        self._patience = lines.network.progress_timeout
        self.progress = 0
        self._damaged = 0
        self._damaged_at = -1

    def attempt(self) -> pb.Outcome:
        """Push until the server says what became of it.

        Raises ConnectionError for what another attempt may mend, or a typed error.
        """
        stream = _PushStream(self._lines, self._header, self._frames)
        began = moved = time.monotonic()
        try:
            with self._lines.call(self._name, stream.start, self._patience) as (call, watch):
                for reply in call:
                    watch.moved()
                    self._lines.received(reply.ByteSize())
                    if reply.HasField("outcome"):
                        outcome: pb.Outcome = reply.outcome
                        self._lines.up_speeds.note(stream.sent, moved - began)
                        return outcome
                    stream.on_reply(reply)
                    moved = time.monotonic()  # from the last Ack on it is the server's disk that takes time
                    self.progress = max(self.progress, stream.held + stream.acked)
        except DamagedFrame as error:
            self._on_damage(error, stream.held)
            raise ConnectionError(str(error)) from error
        except Stalled:
            self._patience = min(2 * self._patience, SLOWEST * self._lines.network.progress_timeout)
            raise
        finally:
            stream.stop()
        raise ConnectionError("the push ended without an outcome")

    def _on_damage(self, error: DamagedFrame, held: int) -> None:
        self._damaged = self._damaged + 1 if held == self._damaged_at else 1
        self._damaged_at = held
        if self._damaged >= MAX_DAMAGED:
            raise DamagedFrame(
                f"{error}; so it went {self._damaged} times in a row. Something on the way changes bytes: a proxy, a "
                "network card, or the memory of one of the machines. TLS would show which"
            ) from error


class _PushStream:
    """The request side of one attempt: the header, then the frames that the server lacks."""

    def __init__(self, lines: Lines, header: pb.PushHeader, frames: Sequence[Packed | bytes]) -> None:
        self._lines = lines
        self._header = header
        self._frames = frames
        self._have: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        self._window = threading.Semaphore(PUSH_WINDOW_FRAMES)
        self._stopped = threading.Event()
        self.held = 0
        """Frames that the server had at the start."""
        self.acked = 0
        """Frames that it has taken in since."""
        self.sent = 0
        """Bytes."""

    def start(self, stub: Any, watch: Watch) -> object:
        return stub.Push(self._requests(watch))

    def _requests(self, watch: Watch) -> Iterator[bytes]:
        yield self._counted(pb.PushRequest(header=self._header).SerializeToString())
        have = self._have.get()
        for index, frame in enumerate(self._frames):
            if index in have:
                continue
            self._window.acquire()
            message = frame_message(frame)
            self._lines.before_sending(len(message), watch, self._stopped)
            if self._stopped.is_set():
                return
            yield self._counted(message)
            watch.moved()

    def on_reply(self, reply: pb.PushReply) -> None:
        if reply.HasField("have"):
            self.held = len(reply.have.frames)
            self._have.put(set(reply.have.frames))
        elif reply.HasField("ack"):
            for _ in range(reply.ack.frames - self.acked):
                self._window.release()
            self.acked = reply.ack.frames

    def stop(self) -> None:
        """Let the request thread end, wherever it waits."""
        self._stopped.set()
        self._have.put(set())
        self._window.release()

    def _counted(self, message: bytes) -> bytes:
        self._lines.sent(len(message))
        self.sent += len(message)
        return message


def split_push(
    header: pb.PushHeader, frames: Sequence[Packed | bytes], count: int
) -> list[tuple[pb.PushHeader, Sequence[Packed | bytes]]]:
    """The push as up to `count` of about equal size, each with its own parts of the fragment."""
    count = min(count, len(frames))
    ends = list(itertools.accumulate(len(f) for f in frames))
    # The frame whose middle lies beyond the i-th share of the bytes begins the next stripe.
    middles = [end - len(frame) / 2 for end, frame in zip(ends, frames, strict=True)]
    owner = [min(count - 1, int(middle * count / ends[-1])) for middle in middles]
    stripes: list[tuple[pb.PushHeader, Sequence[Packed | bytes]]] = []
    for number in sorted(set(owner)):
        chosen = [i for i, own in enumerate(owner) if own == number]
        share = pb.PushHeader()
        share.CopyFrom(header)
        del share.parts[:], share.frame_digests[:]
        share.frame_digests.extend(header.frame_digests[i] for i in chosen)
        share.parts.extend(_parts(header, [frame_blocks(frames[i]) for i in chosen]))
        stripes.append((share, [frames[i] for i in chosen]))
    return stripes


def _parts(header: pb.PushHeader, ranges: Sequence[tuple[int, int]]) -> list[pb.Part]:
    """The ranges of blocks (first, count), joined where they follow one another in one part of the header: each part
    has a grid of frames of its own."""
    parts: list[pb.Part] = []
    begins = {p.first_block for p in header.parts}
    for first, count in ranges:
        last = parts[-1] if parts else None
        if last is not None and last.first_block + last.num_blocks == first and first not in begins:
            last.num_blocks += count
        else:
            parts.append(pb.Part(first_block=first, num_blocks=count))
    return parts


def most_telling(outcomes: Sequence[pb.Outcome]) -> pb.Outcome:
    """Of the outcomes of one push's stripes, that of the whole; PART_HELD when none of them says it."""
    return min(outcomes, key=lambda o: _TELLING.index(o.kind) if o.kind in _TELLING else -1)
