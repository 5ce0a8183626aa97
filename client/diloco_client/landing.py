"""Where what a pull brings becomes parameters: a snapshot's frames as they come, an update's once it is whole.

A snapshot is as large as the parameters, so it must not pile up beside them. An update is small. To decode it meanwhile
would slow down its reading, by which the server judges the link; and it may be put on top of another one in its place,
which cannot be undone.
"""

from __future__ import annotations

from dataclasses import dataclass

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, CorruptFrame, decode_into, is_intact, read_frame, subtract_into
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import DamagedFrame
from diloco_proto.frame_messages import Data, frame_message_bytes


class StripesDiffer(Exception):
    """The stripes of a pull cannot be put together: it has to be made in one."""


@dataclass(slots=True)
class PulledItem:
    """One update or snapshot: what of it has come."""

    kind: pb.ItemKind
    version: int
    digest: int
    """Of the whole fragment at this version, by the server's word."""
    num_frames: int = 0
    """Those that are here."""
    blocks: range = range(0)
    """Of the fragment, those that have been decoded."""
    found: int = 0
    """Digest of what has become of these blocks."""
    nbytes: int = 0
    """Of the messages that brought it."""


@dataclass(frozen=True)
class Target:
    """A fragment's parameters, or those of a range of its blocks, that a pull is to bring. The stripes of one pull may
    write to it at once: never the same blocks, as long as all bring items of one kind."""

    base: Floats | None
    """float32[length]: what updates are subtracted from, and not changed; None where only a snapshot will do."""
    theta: Floats
    """float32[length], another array: where they come to. Of no use before the pull has succeeded."""
    first_block: int = 0

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.first_block + self.theta.size // BLOCK)

    def land(self, item: PulledItem, data: Data, base: Floats | None) -> None:
        """Decode the item's next frame, an update's on top of `base`, which may be `theta`. Raises CorruptFrame."""
        frame = read_frame(data, intact=True)
        first, stop = frame.first_block, frame.first_block + frame.num_blocks
        wanted = item.blocks.stop if item.blocks else first
        if first != wanted or first < self.blocks.start or stop > self.blocks.stop:
            raise CorruptFrame(f"a frame holds blocks {first} to {stop}; {wanted} was next, of {self.blocks}")
        its = frame.format, frame.scales, frame.codes
        here = slice((first - self.first_block) * BLOCK, (stop - self.first_block) * BLOCK)
        if item.kind == pb.ITEM_SNAPSHOT:
            found = decode_into(*its, self.theta[here], first)
        elif base is None:
            raise CorruptFrame("an update came where only a snapshot will do")
        else:
            found = subtract_into(*its, base[here], self.theta[here], first)
        item.blocks = range(item.blocks.start if item.blocks else first, stop)
        item.found = (item.found + found) % (1 << 64)


class Landing:
    """What one stream has brought so far, over all its attempts."""

    def __init__(self, target: Target, *, striped: bool = False) -> None:
        """`striped`: others bring the rest of the target."""
        self._target = target
        self._striped = striped
        self._kind: pb.ItemKind | None = None
        self._items: list[PulledItem] = []
        self._missing = 0
        """Frames of the last item still to come."""
        self._undecoded: list[Data] = []
        """Of the last item."""

    @property
    def position(self) -> tuple[int, int]:
        """Version and frame that come next."""
        return (self._items[-1].version, self._items[-1].num_frames) if self._items else (0, 0)

    def resume(self, request: pb.PullRequest) -> pb.PullRequest:
        """The request for what is missing."""
        current = pb.PullRequest()
        current.CopyFrom(request)
        whole = self._items[:-1] if self._missing else self._items
        if whole and not request.snapshot:
            current.since_version = whole[-1].version
        if self._missing:
            current.skip_frames = self._items[-1].num_frames
            current.item_version = self._items[-1].version
        return current

    def take(self, reply: pb.PullReply | memoryview) -> int:
        """Returns the bytes of the message.

        Raises DamagedFrame for a frame that is not as it was sent, CorruptFrame for one that should never have been,
        ConnectionError when the reply makes no sense, StripesDiffer.
        """
        if not isinstance(reply, memoryview):
            if not reply.HasField("item"):
                raise ConnectionError("the server sent neither an item nor a frame")
            self._begin(reply.item)
            size = reply.ByteSize()
        elif not self._missing:
            raise ConnectionError("the server sent a frame that belongs to no item")
        else:
            self._land(reply)
            size = frame_message_bytes(len(reply))
        self._items[-1].nbytes += size
        return size

    def _begin(self, item: pb.Item) -> None:
        last = self._items[-1] if self._items else None
        resumed = self._missing and last is not None and (last.kind, last.version) == (item.kind, item.version)
        if self._striped and self._kind not in (None, item.kind):
            # Snapshots are cut into other frames than updates, and so into other stripes: two would write to one block.
            raise StripesDiffer("an update has given way to a snapshot, or a snapshot to an update")
        self._kind = item.kind
        if not resumed:
            if item.kind == pb.ITEM_SNAPSHOT:
                self._items.clear()
            elif self._missing:
                self._items.pop()
            self._undecoded.clear()
            self._items.append(PulledItem(item.kind, item.version, item.digest))
        self._missing = item.frames

    def _land(self, data: memoryview) -> None:
        *former, item = self._items
        if not is_intact(data):
            raise DamagedFrame(f"frame {item.num_frames} of the way to version {item.version} arrived damaged")
        self._undecoded.append(data)
        item.num_frames += 1
        self._missing -= 1
        if item.kind == pb.ITEM_UPDATE and self._missing:
            return
        for frame in self._undecoded:
            self._target.land(item, frame, self._target.theta if former else self._target.base)
        self._undecoded.clear()
        if former and item.blocks != former[-1].blocks:
            raise CorruptFrame(f"{item.blocks} came of version {item.version}, {former[-1].blocks} of the one before")

    def finish(self) -> list[PulledItem]:
        if self._missing:
            raise ConnectionError(f"the pull ended {self._missing} frames early")
        return self._items
