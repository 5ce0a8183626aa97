"""What travels: contributions as streams, and how much there was."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from diloco_client.landing import Landing, PulledItem, Target
from diloco_client.pulling import join_stripes
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Encoded, frame_checksum, pack_frames
from diloco_proto.frame_messages import read_pull

Parcel = tuple[pb.PushHeader, list[bytes]]
"""What one stream carries."""

Brought = tuple[pb.Item, list[bytes]]
"""One item of a pull, and the messages with its frames."""


@dataclass(slots=True)
class Traffic:
    """Bytes of frames, and the parameters that contributions and updates were made of."""

    up: int = 0
    down: int = 0
    contributions: int = 0
    contributed: int = 0
    updates: int = 0
    updated: int = 0

    def push(self, header: pb.PushHeader, frames: list[bytes], parameters: int) -> None:
        """Frames of a fragment of so many parameters went up."""
        size = sum(map(len, frames))
        self.up += size
        if header.purpose == pb.PURPOSE_CONTRIBUTION:
            self.contributions += size
            self.contributed += parameters

    def pull(self, brought: list[Brought], parameters: int) -> int:
        """These came down; returns their bytes."""
        sizes = [sum(map(len, messages)) for _, messages in brought]
        updates = [size for size, (item, _) in zip(sizes, brought, strict=True) if item.kind == pb.ITEM_UPDATE]
        self.down += sum(sizes)
        self.updates += sum(updates)
        self.updated += len(updates) * parameters
        return sum(sizes)


def parcels_of(header: pb.PushHeader, encoded: Encoded, parts: int) -> list[Parcel]:
    """A contribution as `parts` streams: each brings the header and its own share of the blocks."""
    if parts == 1:
        return [(header, pack_frames(encoded))]
    spec, parcels = encoded.format.spec, []
    bounds = [encoded.num_blocks * i // parts for i in range(parts + 1)]
    for first, end in pairwise(bounds):
        scales = encoded.scales[first * spec.scale_bytes : end * spec.scale_bytes]
        codes = encoded.codes[first * spec.code_bytes : end * spec.code_bytes]
        frames = pack_frames(Encoded(encoded.format, scales, codes), first)
        part = pb.PushHeader()
        part.CopyFrom(header)
        del part.parts[:], part.frame_digests[:]
        part.parts.add(first_block=first, num_blocks=end - first)
        part.frame_digests.extend(frame_checksum(frame) for frame in frames)
        parcels.append((part, frames))
    return parcels


def land(brought: list[Brought], target: Target) -> list[PulledItem]:
    """What of a pull a worker has in the end."""
    landing = Landing(target)
    for item, messages in brought:
        landing.take(pb.PullReply(item=item))
        for message in messages:
            landing.take(read_pull(message))
    return join_stripes([landing.finish()], target)
