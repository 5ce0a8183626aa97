"""What of each fragment this process holds: all of it, but for the ranks of an island, of which each holds its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK
from diloco_proto.manifest import Fragment, Slot


@dataclass(frozen=True, slots=True)
class Piece:
    """Of one tensor's values, those within a span: `begin` up to `end` of the span's own flat values."""

    slot: Slot
    begin: int
    end: int
    skipped: int
    """Values of the tensor before these."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of a fragment's blocks; it may be empty."""

    fragment: Fragment
    first_block: int
    num_blocks: int

    @classmethod
    def whole(cls, fragment: Fragment) -> Span:
        return cls(fragment, 0, fragment.num_blocks)

    @property
    def length(self) -> int:
        """Values, padding included."""
        return self.num_blocks * BLOCK

    @property
    def start(self) -> int:
        """The first value, within the fragment."""
        return self.first_block * BLOCK

    @property
    def part(self) -> pb.Part:
        return pb.Part(first_block=self.first_block, num_blocks=self.num_blocks)

    @property
    def is_whole(self) -> bool:
        return self.num_blocks == self.fragment.num_blocks

    @property
    def parameters(self) -> int:
        """Values that are not padding."""
        return sum(piece.end - piece.begin for piece in self.pieces())

    def pieces(self) -> Iterator[Piece]:
        """Of all tensors that have values within, in order."""
        for slot in self.fragment.slots:
            begin, end = max(slot.offset, self.start), min(slot.end, self.start + self.length)
            if begin < end:
                yield Piece(slot, begin - self.start, end - self.start, begin - slot.offset)
