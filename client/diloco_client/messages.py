"""What a worker puts before the frames that it pushes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Encoded, Format, Packed, frame_checksum, pack
from diloco_proto.codec.formats import Floats
from diloco_proto.wire import codec_to_pb

from .flights import Flight
from .spans import Span


def seed_push(identity: pb.PushHeader, span: Span, theta: Floats) -> tuple[pb.PushHeader, list[Packed]]:
    """Header and frames of what this process holds of a fragment, as version 0. `identity` has run, worker and
    generation."""
    codes = theta.view(np.uint8)
    frames = pack(Encoded(Format.FP32, codes[:0], codes), span.first_block)
    return _header(identity, pb.PURPOSE_SEED, span, Format.FP32, frames), frames


def contribution_header(
    identity: pb.PushHeader, flight: Flight, span: Span, fmt: Format, frames: Sequence[Packed | bytes]
) -> pb.PushHeader:
    """Of a contribution, or this process's part of it."""
    header = _header(identity, pb.PURPOSE_CONTRIBUTION, span, fmt, frames)
    header.base_version = flight.base.version
    header.tokens = flight.tokens
    header.steps = flight.steps
    header.since_version = flight.since_version
    return header


def _header(
    identity: pb.PushHeader, purpose: pb.Purpose, span: Span, fmt: Format, frames: Sequence[Packed | bytes]
) -> pb.PushHeader:
    header = pb.PushHeader(
        purpose=purpose,
        fragment=span.fragment.index,
        codec=codec_to_pb(fmt),
        parts=[span.part],
        frame_digests=[frame_checksum(frame) for frame in frames],
    )
    header.MergeFrom(identity)
    return header
