"""Frames: an encoded fragment cut into self-contained pieces of about 1 MiB, for wire and journal.

Little endian. A header of 32 bytes:

     0  4s   magic "DLF1"
     4  u8   format
     5  u8   flags: bit 0, the scales are a zstd frame; bit 1, the codes are one; all others 0
     6  u16  0
     8  u32  first block: the place of this frame's first block within the fragment
    12  u32  number of blocks, 1 to the format's `frame_blocks`
    16  u32  stored bytes of scales
    20  u32  stored bytes of codes
    24  u64  xxh3_64 (seed 0) of bytes 0..23 followed by the body

and the body: the scales, then the codes. The decoded size of each follows from the format and the number of
blocks. A section is stored as a zstd frame (RFC 8878) only where that is smaller; such a frame states its
content size and needs no dictionary, and both that and the size are checked before anything is decompressed.

What differs in its statistics is compressed apart, with a Huffman table each: scales and codes; and of fp32 and bf16
the bytes of the values by their significance. There a compressed section of codes holds the lowest bytes of all values,
then their second bytes, and so on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import xxhash
import zstandard

from diloco_proto.codec.errors import CorruptFrame
from diloco_proto.codec.formats import BLOCK, Bytes, Encoded, Format
from diloco_proto.codec.kernels import validate
from diloco_proto.packed import Packed

MAGIC: Final = b"DLF1"
HEADER_BYTES: Final = 32
_HEAD: Final = struct.Struct("<4sBBHIIII")
_SUM: Final = struct.Struct("<Q")
_SCALES_ZSTD: Final = 1
_CODES_ZSTD: Final = 2
_U32: Final = 1 << 32

LEVEL: Final = 1
"""zstd's. Level 3 saves another 1 % of the least compressible formats, nothing of the others, and takes longer."""

_WORTH: Final = {
    Format.FP32: 50e6,
    Format.BF16: 110e6,
    Format.INT8: 40e6,
    Format.INT4: 100e6,
    Format.INT3: 200e6,
    Format.E3M0: 40e6,
    Format.MXFP4: 30e6,
    Format.INT2: 45e6,
    Format.TERNARY: 80e6,
}
"""Bytes a second of a link at which one core compresses and decompresses in the time that the saved bytes would take.
Measured by benchmarks/wire.py; processors differ by a factor of two."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, verified. The arrays are views of the frame's bytes where it was not compressed."""

    format: Format
    first_block: int
    num_blocks: int
    scales: Bytes
    """uint8[num_blocks], or uint8[0] for fp32 and bf16."""
    codes: Bytes
    """uint8[num_blocks * format.spec.code_bytes]."""
    checksum: int
    """The xxh3 field."""

    @property
    def encoded(self) -> Encoded:
        """Scales and codes as the codec's operations take them."""
        return Encoded(self.format, self.scales, self.codes)


def worth_level(fmt: Format, bytes_per_second: float | None) -> int | None:
    """The `level` for `pack_frames` on a link of this rate: None where compression takes longer than it saves.

    An unknown rate is taken for a slow one.
    """
    return LEVEL if bytes_per_second is None or bytes_per_second < _WORTH[fmt] else None


def pack_frames(encoded: Encoded, first_block: int = 0, level: int | None = LEVEL) -> list[bytes]:
    """The frames of `encoded`, as by `pack`."""
    return [bytes(packed) for packed in pack(encoded, first_block, level)]


def pack(encoded: Encoded, first_block: int = 0, level: int | None = LEVEL) -> list[Packed]:
    """The frames of `encoded`, whose first block is block `first_block` of its fragment. They are views of it.

    Frame i begins at block first_block + i * frame_blocks; only the last may be shorter. `level` is zstd's;
    None stores everything as it is.
    """
    spec = encoded.format.spec
    assert first_block >= 0
    assert first_block + encoded.num_blocks <= _U32
    compressor = None if level is None else _compressor(level)
    return [
        _pack(encoded.part(start, start + spec.frame_blocks), first_block + start, compressor)
        for start in range(0, encoded.num_blocks, spec.frame_blocks)
    ]


def read_frame(data: bytes | bytearray | memoryview, *, intact: bool = False) -> Frame:
    """The frame in `data`, all of it checked: lengths, checksum, compression, legal scales and codes. The checksum is
    taken for right if the caller has found it so (`is_intact`).

    Raises CorruptFrame, saying what was wrong.
    """
    view = memoryview(data).cast("B")
    fmt, flags, first_block, num_blocks, scale_bytes, code_bytes = _read_header(view)
    if len(view) != HEADER_BYTES + scale_bytes + code_bytes:
        raise CorruptFrame(f"frame has {len(view)} bytes, its header says {HEADER_BYTES + scale_bytes + code_bytes}")
    checksum = frame_checksum(view)
    if not intact and checksum != _checksum(view[: _HEAD.size], view[HEADER_BYTES:]):
        raise CorruptFrame("frame checksum does not match its bytes")
    split = HEADER_BYTES + scale_bytes
    scales = _section("scales", view[HEADER_BYTES:split], bool(flags & _SCALES_ZSTD), num_blocks * fmt.spec.scale_bytes)
    codes = _section("codes", view[split:], bool(flags & _CODES_ZSTD), num_blocks * fmt.spec.code_bytes)
    if flags & _CODES_ZSTD and not fmt.spec.scale_bytes:
        codes = _from_planes(codes, fmt.spec.code_bytes // BLOCK)
    validate(fmt, scales, codes)
    return Frame(fmt, first_block, num_blocks, scales, codes, checksum)


def frame_checksum(data: Packed | bytes | bytearray | memoryview) -> int:
    """The xxh3 field of a frame's header, unchecked. Raises CorruptFrame if there is no whole header."""
    return int(_SUM.unpack_from(_head_of(data), _HEAD.size)[0])


def frame_blocks(data: Packed | bytes | bytearray | memoryview) -> tuple[int, int]:
    """(first block, number of blocks) of a frame, by its header, unchecked. Raises CorruptFrame likewise."""
    first_block, num_blocks = _HEAD.unpack_from(_head_of(data))[4:6]
    return int(first_block), int(num_blocks)


def _head_of(data: Packed | bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
    if len(data) < HEADER_BYTES:
        raise CorruptFrame(f"frame has {len(data)} bytes, fewer than its header's {HEADER_BYTES}")
    return data.head if isinstance(data, Packed) else data


def is_compressed(data: bytes | bytearray | memoryview) -> bool:
    """Whether any of its sections is, by its header, unchecked: reading it takes several times as long then."""
    return len(data) >= HEADER_BYTES and bool(data[5] & (_SCALES_ZSTD | _CODES_ZSTD))


def is_intact(data: bytes | bytearray | memoryview) -> bool:
    """Whether the bytes are those that some sender gave this checksum: what is wrong with them now was then, too."""
    view = memoryview(data).cast("B")
    return len(view) >= HEADER_BYTES and _checksum(view[: _HEAD.size], view[HEADER_BYTES:]) == frame_checksum(view)


def contribution_digest(frames: Iterable[Frame | bytes]) -> int:
    """Sum mod 2^64 of the frames' checksums, so that the digests of an island's parts can be added."""
    sums = (f.checksum if isinstance(f, Frame) else frame_checksum(f) for f in frames)
    return sum(sums) % (1 << 64)


def _compressor(level: int) -> zstandard.ZstdCompressor:
    """A compressor for codes, where nearly all there is to gain is in the Huffman stage.

    Short matches cost more than they save: with the longest minimum and the smallest table, sparse codes come
    out up to 6 % smaller and up to twice as fast than by the level's own settings, dense ones the same.
    Negative levels leave the Huffman stage out.
    """
    return zstandard.ZstdCompressor(compression_params=_parameters(level))


@lru_cache
def _parameters(level: int) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters.from_level(level, min_match=7, hash_log=6)


def _pack(encoded: Encoded, first_block: int, compressor: zstandard.ZstdCompressor | None) -> Packed:
    fmt, flags = encoded.format, 0
    sections: list[bytes | memoryview] = [encoded.scales.data, encoded.codes.data]
    if compressor is not None:
        loose = list(sections)
        if not fmt.spec.scale_bytes:
            loose[1] = _to_planes(encoded.codes, fmt.spec.code_bytes // BLOCK).data
        for i, bit in enumerate((_SCALES_ZSTD, _CODES_ZSTD)):
            squeezed = compressor.compress(loose[i])
            if len(squeezed) < len(sections[i]):
                sections[i] = squeezed
                flags |= bit
    sizes = len(sections[0]), len(sections[1])
    head = _HEAD.pack(MAGIC, fmt, flags, 0, first_block, encoded.num_blocks, *sizes)
    return Packed(head + _SUM.pack(_checksum(head, *sections)), *sections)


def _to_planes(codes: Bytes, width: int) -> Bytes:
    """The lowest bytes of all values of `width` bytes, then their second bytes, and so on."""
    values = codes.view(f"<u{width}")
    planes = np.empty((width, values.size), np.uint8)
    for i in range(width):
        planes[i] = values >> 8 * i
    return planes.ravel()


def _from_planes(planes: Bytes, width: int) -> Bytes:
    codes = np.empty((planes.size // width, width), np.uint8)
    for i, plane in enumerate(planes.reshape(width, -1)):
        codes[:, i] = plane
    return codes.ravel()


def _checksum(*pieces: bytes | memoryview) -> int:
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.intdigest()


def _read_header(view: memoryview) -> tuple[Format, int, int, int, int, int]:
    """(format, flags, first block, blocks, stored scale bytes, stored code bytes), each within its bounds."""
    if len(view) < HEADER_BYTES:
        raise CorruptFrame(f"frame has {len(view)} bytes, fewer than its header's {HEADER_BYTES}")
    magic, number, flags, zero, first_block, num_blocks, scale_bytes, code_bytes = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise CorruptFrame(f"frame begins with {magic!r}, not {MAGIC!r}")
    if flags & ~(_SCALES_ZSTD | _CODES_ZSTD) or zero:
        raise CorruptFrame(f"frame has unknown flags {flags:#x} or a non-zero reserved field {zero:#x}")
    try:
        fmt = Format(number)
    except ValueError:
        raise CorruptFrame(f"frame has unknown format {number}") from None
    if not 1 <= num_blocks <= fmt.spec.frame_blocks:
        raise CorruptFrame(f"frame has {num_blocks} blocks; {fmt.label} allows 1 to {fmt.spec.frame_blocks}")
    if first_block + num_blocks > _U32:
        raise CorruptFrame(f"frame ends at block {first_block + num_blocks}, beyond 2^32")
    return fmt, flags, first_block, num_blocks, scale_bytes, code_bytes


def _section(name: str, stored: memoryview, squeezed: bool, size: int) -> Bytes:
    """uint8[size]: a section's bytes, decompressed if need be."""
    if not squeezed:
        if len(stored) != size:
            raise CorruptFrame(f"frame stores {len(stored)} bytes of {name}, needs {size}")
        return np.frombuffer(stored, np.uint8)
    if len(stored) >= size:
        raise CorruptFrame(f"frame stores {len(stored)} bytes of compressed {name}, no fewer than {size}")
    try:
        parameters = zstandard.get_frame_parameters(stored)
        if parameters.content_size != size:
            raise CorruptFrame(f"zstd frame of {name} declares {parameters.content_size} bytes, needs {size}")
        raw = zstandard.ZstdDecompressor().decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptFrame(f"zstd frame of {name}: {error}") from error
    if len(raw) != size:
        raise CorruptFrame(f"zstd frame of {name} held {len(raw)} bytes, needs {size}")
    return np.frombuffer(raw, np.uint8)
