"""Pulls: updates or a snapshot down, every frame checked as it comes, resumed at the frame where it broke.

A pull may travel as several stripes, each over a connection of its own: every one brings a share of each item's frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, CorruptFrame, decode_into, is_intact, read_frame, subtract_into
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import DamagedFrame
from diloco_proto.frame_messages import Data, frame_message_bytes

from .lines import Lines
from .pushing import MAX_DAMAGED, SLOWEST
from .retry import Stalled


@dataclass(slots=True)
class PulledItem:
    """One update or snapshot, its frames still encoded."""

    kind: pb.ItemKind
    version: int
    digest: int
    frames: list[Data] = field(default_factory=list)
    nbytes: int = 0
    """Bytes of the messages that brought it."""

    def apply(self, base: Floats | None, theta: Floats, first_block: int = 0) -> int:
        """Write a fragment's parameters at this item's version, or a part of them from block `first_block` on,
        float32[length], to `theta`; returns their digest. An update is on top of `base`, which may be `theta`.

        Raises CorruptFrame unless the frames are whole and cover theta in order; it is of no use then.
        """
        end = value = 0
        for data in self.frames:
            frame = read_frame(data, intact=True)
            stop = end + frame.num_blocks * BLOCK
            wanted = first_block + end // BLOCK
            if frame.first_block != wanted or stop > theta.size:
                raise CorruptFrame(f"a frame begins at block {frame.first_block}, not at {wanted}")
            its, out = (frame.format, frame.scales, frame.codes), theta[end:stop]
            if self.kind == pb.ITEM_SNAPSHOT:
                value += decode_into(*its, out, wanted)
            else:
                assert base is not None
                value += subtract_into(*its, base[end:stop], out, wanted)
            end = stop
        if end != theta.size:
            raise CorruptFrame(f"the frames end at block {end // BLOCK} of {theta.size // BLOCK}")
        return value % (1 << 64)


class PullStripe:
    """One stream of a pull, over all its attempts."""

    def __init__(self, lines: Lines, name: str, request: pb.PullRequest) -> None:
        self._lines = lines
        self._name = name
        self._request = pb.PullRequest()
        self._request.CopyFrom(request)
        self._reader = _Reader()
        self._patience = lines.network.progress_timeout
        self.progress = 0
        self._damaged = 0
        self._damaged_at = (0, 0)

    def attempt(self) -> list[PulledItem]:
        """Pull what is missing. Raises ConnectionError for what another attempt may mend, or a typed error."""
        current = self._reader.resume(self._request)
        self._lines.sent(current.ByteSize())
        try:
            with self._lines.call(self._name, lambda stub, _: stub.Pull(current), self._patience) as (call, watch):
                for reply in call:
                    watch.moved()
                    size = self._reader.take(reply)
                    self._lines.received(size)
                    self.progress += 1
                    self._lines.after_receiving(size, watch)
        except DamagedFrame as error:
            self._on_damage(error)
            raise ConnectionError(str(error)) from error
        except Stalled:
            self._patience = min(2 * self._patience, SLOWEST * self._lines.network.progress_timeout)
            raise
        return self._reader.finish()

    def _on_damage(self, error: DamagedFrame) -> None:
        at = self._reader.position
        self._damaged = self._damaged + 1 if at == self._damaged_at else 1
        self._damaged_at = at
        if self._damaged < MAX_DAMAGED:
            return
        if self._request.snapshot:
            raise DamagedFrame(
                f"{error}; so it went {self._damaged} times in a row. Something on the way changes bytes: a proxy, a "
                "network card, or the memory of one of the machines. TLS would show which"
            ) from error
        self._request.snapshot = True  # perhaps it is the server's copy of the update
        self._reader = _Reader()
        self._damaged = 0


class _Reader:
    """What a stream has brought so far, over all its attempts."""

    def __init__(self) -> None:
        self._items: list[PulledItem] = []
        self._missing = 0
        """Frames of the last item still to come."""

    @property
    def position(self) -> tuple[int, int]:
        """Version and frame that come next."""
        return (self._items[-1].version, len(self._items[-1].frames)) if self._items else (0, 0)

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

    def take(self, reply: pb.PullReply | memoryview) -> int:
        """Returns the bytes of the message. Raises DamagedFrame for a frame that is not as it was sent."""
        if not isinstance(reply, memoryview):
            if not reply.HasField("item"):
                raise ConnectionError("the server sent neither an item nor a frame")
            self._begin(reply.item)
            size = reply.ByteSize()
        elif not self._missing:
            raise ConnectionError("the server sent a frame that belongs to no item")
        elif not is_intact(reply):
            item = self._items[-1]
            raise DamagedFrame(f"frame {len(item.frames)} of the way to version {item.version} arrived damaged")
        else:
            self._items[-1].frames.append(reply)
            self._missing -= 1
            size = frame_message_bytes(len(reply))
        self._items[-1].nbytes += size
        return size

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


def split_pull(request: pb.PullRequest, count: int) -> list[pb.PullRequest]:
    """The pull as `count` of them, each for its share of every item's frames."""
    stripes = []
    for number in range(count):
        share = pb.PullRequest()
        share.CopyFrom(request)
        share.stripe, share.stripes = number, count
        stripes.append(share)
    return stripes


def join_stripes(stripes: Sequence[list[PulledItem]]) -> list[PulledItem] | None:
    """The items that all stripes have a share of, put together; None if they do not fit, since the fragment moved on
    between them in a way that only a new pull can follow."""
    if any(item.kind != pb.ITEM_UPDATE for items in stripes for item in items):
        if len({tuple((i.kind, i.version) for i in items) for items in stripes}) > 1:
            return None
    elif any(stripes) and not all(stripes):
        return None
    return [
        PulledItem(
            shares[0].kind,
            shares[0].version,
            shares[0].digest,
            [frame for share in shares for frame in share.frames],
            sum(share.nbytes for share in shares),
        )
        for shares in zip(*stripes, strict=False)  # a stripe that came later may know of a further version
    ]
