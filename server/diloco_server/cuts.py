"""The frames of an item as a reader gets them: those of its range of blocks, which cut the first and the last of them.

Frames lie on one grid over the whole fragment, whoever reads. So all but the two at the ends of a range are those that
every reader gets, serialized once; and it costs no more than those two to serve a range.
"""

from __future__ import annotations

from dataclasses import dataclass

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format, pack, read_frame
from diloco_proto.errors import InvalidContribution
from diloco_proto.frame_messages import frame_message, read_pull
from diloco_proto.manifest import Fragment


@dataclass(frozen=True, slots=True)
class Cut:
    """What of frame `number` of the whole fragment is sent: blocks `first` up to, not including, `stop`."""

    number: int
    first: int
    stop: int
    whole: bool
    """It is the frame as it is."""


def asked_for(fragment: Fragment, request: pb.PullRequest) -> tuple[int, int]:
    """The blocks that this reader wants: the first, and the one after the last.

    Raises InvalidContribution for a range that is empty or beyond the fragment.
    """
    if not request.HasField("part"):
        return 0, fragment.num_blocks
    first, stop = request.part.first_block, request.part.first_block + request.part.num_blocks
    if not first < stop <= fragment.num_blocks:
        raise InvalidContribution(
            f"asked for blocks {first} to {stop} of fragment {fragment.index}, which has {fragment.num_blocks}"
        )
    return first, stop


def cuts_of(fragment: Fragment, fmt: Format, request: pb.PullRequest, version: int) -> list[Cut]:
    """What this reader gets of an item that leads to `version`: the frames of its range and stripe, less those that it
    has already."""
    first, stop = asked_for(fragment, request)
    step = fmt.spec.frame_blocks
    low, frames = first // step, -(-stop // step) - first // step
    count = max(1, request.stripes)
    begin, end = frames * request.stripe // count, frames * (request.stripe + 1) // count
    skip = request.skip_frames if request.item_version == version else 0
    return [_cut(low + i, step, first, stop, fragment.num_blocks) for i in range(min(begin + skip, end), end)]


def _cut(number: int, step: int, first: int, stop: int, blocks: int) -> Cut:
    a, b = number * step, min((number + 1) * step, blocks)
    return Cut(number, max(a, first), min(b, stop), first <= a and b <= stop)


def recut(message: bytes, cut: Cut) -> bytes:
    """Of an update's frame, a serialized PullReply, the blocks of `cut`: decoded and framed anew. Heavy."""
    carried = read_pull(message)
    assert isinstance(carried, memoryview)
    frame = read_frame(carried, intact=True)
    (packed,) = pack(frame.encoded.part(cut.first - frame.first_block, cut.stop - frame.first_block), cut.first)
    return frame_message(packed)
