"""What a worker puts before the frames that it pushes."""

from __future__ import annotations

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format, frame_checksum
from diloco_proto.manifest import Fragment
from diloco_proto.wire import codec_to_pb

from .flights import Flight


def seed_header(identity: pb.PushHeader, fragment: Fragment, frames: list[bytes]) -> pb.PushHeader:
    """Of a whole fragment's parameters as version 0. `identity` has run, worker and generation."""
    return _header(identity, pb.PURPOSE_SEED, fragment, Format.FP32, frames)


def contribution_header(
    identity: pb.PushHeader, flight: Flight, fragment: Fragment, fmt: Format, frames: list[bytes]
) -> pb.PushHeader:
    """Of a whole contribution."""
    header = _header(identity, pb.PURPOSE_CONTRIBUTION, fragment, fmt, frames)
    header.base_version = flight.base.version
    header.tokens = flight.tokens
    header.steps = flight.steps
    header.since_version = flight.since_version
    return header


def _header(
    identity: pb.PushHeader, purpose: pb.Purpose, fragment: Fragment, fmt: Format, frames: list[bytes]
) -> pb.PushHeader:
    header = pb.PushHeader(
        purpose=purpose,
        fragment=fragment.index,
        codec=codec_to_pb(fmt),
        parts=[pb.Part(first_block=0, num_blocks=fragment.num_blocks)],
        frame_digests=[frame_checksum(frame) for frame in frames],
    )
    header.MergeFrom(identity)
    return header
