"""A contribution, or the seed of a fragment, while its frames arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Encoded, Format, Frame, empty_encoded
from diloco_proto.errors import InvalidContribution
from diloco_proto.manifest import Fragment


@dataclass(frozen=True, slots=True)
class Place:
    """One frame of a stream: which blocks of the fragment it covers, and its xxh3."""

    first_block: int
    num_blocks: int
    digest: int


@dataclass(frozen=True, slots=True)
class Work:
    """What is behind a contribution: the same in each of its parts."""

    tokens: int = 0
    steps: int = 0
    since_version: int = 0

    @classmethod
    def of(cls, header: pb.PushHeader) -> Work:
        return cls(header.tokens, header.steps, header.since_version)

    def __str__(self) -> str:
        return f"{self.tokens} tokens and {self.steps} steps since version {self.since_version}"


def frame_places(
    fragment: Fragment, fmt: Format, parts: Sequence[tuple[int, int]], digests: Sequence[int]
) -> list[Place]:
    """The frames that cover `parts` (first block, blocks), on the grid that starts anew with each part.

    Raises InvalidContribution unless the parts are in ascending order, disjoint, within the fragment, and as many
    digests are given as there are frames.
    """
    grid: list[tuple[int, int]] = []
    end = 0
    for first, blocks in parts:
        if blocks < 1 or first < end or first + blocks > fragment.num_blocks:
            raise InvalidContribution(
                f"fragment {fragment.index}: blocks {first} to {first + blocks} are out of order or beyond its "
                f"{fragment.num_blocks} blocks"
            )
        end = first + blocks
        grid += [(at, min(fmt.spec.frame_blocks, end - at)) for at in range(first, end, fmt.spec.frame_blocks)]
    if not grid or len(grid) != len(digests):
        raise InvalidContribution(
            f"fragment {fragment.index}: its parts make {len(grid)} frames, but {len(digests)} digests were given"
        )
    return [Place(at, blocks, digest) for (at, blocks), digest in zip(grid, digests, strict=True)]


class Assembly:
    """The encoded fragment as it fills up, from one stream or from several (the ranks of an island).

    `write` may run in any thread: frames of one assembly never overlap, and a stream that brings other bytes
    for the same place gets an assembly of its own. All else belongs to one thread.
    """

    def __init__(
        self, fragment: Fragment, fmt: Format, work: Work = Work(), serial: int = 0, memory: Encoded | None = None
    ) -> None:
        """`memory`: to be filled; else it gets its own."""
        self.serial = serial
        """Under which its frames are kept on disk."""
        self.fragment = fragment
        self.format = fmt
        self.work = work
        self.frames: dict[int, int] = {}
        """First block of each frame held -> its xxh3."""
        self._encoded = memory or empty_encoded(fmt, fragment.num_blocks)
        self._claims: dict[int, Place] = {}
        self.streams = 0
        """How many bring it frames now."""
        self.closed = False
        """It is complete and was taken, or of no use any more: what streams still bring is not needed."""

    @property
    def nbytes(self) -> int:
        return self._encoded.nbytes

    def claim(self, places: Sequence[Place]) -> bool:
        """Announce a stream's frames. False when other bytes were announced for a block of theirs."""
        merged = self._claims | {p.first_block: p for p in places}
        ordered = sorted(merged.values(), key=lambda p: p.first_block)
        overlap = any(a.first_block + a.num_blocks > b.first_block for a, b in pairwise(ordered))
        if overlap or any(self._claims.get(p.first_block, p) != p for p in places):
            return False
        self._claims = merged
        return True

    def held(self, places: Sequence[Place]) -> list[int]:
        """Indices of the frames that need not be sent."""
        return [i for i, p in enumerate(places) if p.first_block in self.frames]

    def add(self, place: Place, frame: Frame) -> None:
        """Take one frame in. Raises InvalidContribution unless it is the one announced for `place`."""
        self.write(place, frame)
        self.hold(place)

    def hold(self, place: Place) -> None:
        """The frame of `place` was written: it need not be sent again."""
        self.frames[place.first_block] = place.digest

    def write(self, place: Place, frame: Frame) -> None:
        """Copy one frame to where it belongs. Raises InvalidContribution unless it is the one announced for `place`."""
        if (frame.format, frame.first_block, frame.num_blocks) != (
            self.format,
            place.first_block,
            place.num_blocks,
        ):
            raise InvalidContribution(
                f"fragment {self.fragment.index}: expected {self.format.label} blocks {place.first_block} to "
                f"{place.first_block + place.num_blocks}, got {frame.format.label} {frame.first_block} to "
                f"{frame.first_block + frame.num_blocks}"
            )
        if frame.checksum != place.digest:
            raise InvalidContribution(
                f"fragment {self.fragment.index}: the frame at block {place.first_block} is not the one announced"
            )
        here = self._encoded.part(place.first_block, place.first_block + place.num_blocks)
        here.scales[:], here.codes[:] = frame.scales, frame.codes

    @property
    def complete(self) -> bool:
        """All blocks of the fragment are here."""
        return sum(self._claims[at].num_blocks for at in list(self.frames)) == self.fragment.num_blocks

    def encoded(self) -> Encoded:
        """The whole fragment, encoded."""
        assert self.complete
        return self._encoded
