"""Block formats with power-of-two scales, frames of them, and the digest of parameters."""

from diloco_proto.codec.digest import digest
from diloco_proto.codec.errors import CorruptFrame, UnencodableValue
from diloco_proto.codec.formats import BLOCK, Encoded, Format, FormatSpec
from diloco_proto.codec.frames import (
    Frame,
    contribution_digest,
    frame_blocks,
    frame_checksum,
    is_intact,
    pack_frames,
    read_frame,
)
from diloco_proto.codec.kernels import (
    accumulate,
    decode,
    decode_fragment,
    encode,
    encode_feedback,
    encode_fragment,
    flush_,
    nesterov_,
    sgd_,
    subtract,
    sum_of_squares,
    validate,
    warm_up,
)

__all__ = [
    "BLOCK",
    "CorruptFrame",
    "Encoded",
    "Format",
    "FormatSpec",
    "Frame",
    "UnencodableValue",
    "accumulate",
    "contribution_digest",
    "decode",
    "decode_fragment",
    "digest",
    "encode",
    "encode_feedback",
    "encode_fragment",
    "flush_",
    "frame_blocks",
    "frame_checksum",
    "is_intact",
    "nesterov_",
    "pack_frames",
    "read_frame",
    "sgd_",
    "subtract",
    "sum_of_squares",
    "validate",
    "warm_up",
]
