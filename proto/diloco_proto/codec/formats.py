"""The block formats: names, numbers and sizes. A pure table; the arithmetic is in `reference` and `kernels`.

A fragment is a flat float32 vector whose length is a multiple of BLOCK. A block of 64 values has one scale
byte, a biased power of two (E8M0 of the OCP Microscaling formats v1.0: 2^(byte - 127)), and the codes of its
values. fp32 and bf16 have no scales: their scale array has length zero.

Scale byte 0 is kept for the block of zeros (it does not mean 2^-127): whatever the codes, its values are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 64

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Format(IntEnum):
    """How values travel. The numbers are those of the wire."""

    FP32 = 1
    BF16 = 2
    INT8 = 3
    INT4 = 4
    INT3 = 5
    E3M0 = 6
    MXFP4 = 7
    INT2 = 8
    TERNARY = 9

    @property
    def label(self) -> str:
        """The name in options, logs and documents: lower case."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> Format:
        """The format of a lower-case name. Raises ValueError, naming the choices, for any other text."""
        for fmt in cls:
            if fmt.label == label:
                return fmt
        raise ValueError(f"unknown format {label!r}: choose one of {', '.join(f.label for f in cls)}")

    @property
    def spec(self) -> FormatSpec:
        """The sizes and limits of this format."""
        return _SPECS[self]


@dataclass(frozen=True, slots=True)
class FormatSpec:
    """Sizes and limits of one format."""

    code_bytes: int
    """Bytes of codes a block."""
    scale_bytes: int
    """Bytes of scales a block: 0 or 1."""
    min_scale: int
    """Lowest legal scale byte besides 0: the lowest that `encode` picks, for a largest magnitude of 2^-100."""
    max_scale: int
    """Highest legal scale byte: the highest that `encode` picks, just under 2^126. All its codes are under 2^127."""
    q_max: int
    """Largest integer code of the uniform formats; 0 for the others."""
    top: float
    """Largest magnitude of a code, in units of the scale; 0 for formats without scales."""

    @property
    def bits(self) -> float:
        """Bits a parameter before entropy coding, scales included."""
        return 8 * (self.code_bytes + self.scale_bytes) / BLOCK

    @property
    def frame_blocks(self) -> int:
        """Most blocks a frame may hold: about 1 MiB of codes."""
        return (1 << 20) // self.code_bytes


_SPECS: Final = {
    Format.FP32: FormatSpec(256, 0, 0, 0, 0, 0.0),
    Format.BF16: FormatSpec(128, 0, 0, 0, 0, 0.0),
    Format.INT8: FormatSpec(64, 1, 21, 247, 127, 127.0),
    Format.INT4: FormatSpec(32, 1, 25, 251, 7, 7.0),
    Format.INT3: FormatSpec(32, 1, 26, 252, 3, 3.0),
    Format.E3M0: FormatSpec(32, 1, 27, 253, 0, 1.0),
    Format.MXFP4: FormatSpec(32, 1, 25, 250, 0, 6.0),
    Format.INT2: FormatSpec(16, 1, 24, 253, 0, 1.5),
    Format.TERNARY: FormatSpec(16, 1, 26, 253, 0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One fragment, or one part of it, in a format. Value `64*b + i` belongs to block b."""

    format: Format
    scales: Bytes
    """uint8[num_blocks], or uint8[0] for fp32 and bf16."""
    codes: Bytes
    """uint8[num_blocks * format.spec.code_bytes]."""

    def __post_init__(self) -> None:
        spec = self.format.spec
        assert self.scales.dtype == np.uint8
        assert self.codes.dtype == np.uint8
        assert self.codes.size % spec.code_bytes == 0
        assert self.scales.size == self.num_blocks * spec.scale_bytes

    @property
    def num_blocks(self) -> int:
        """Blocks of 64 values."""
        return self.codes.size // self.format.spec.code_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of scales and codes together."""
        return self.scales.size + self.codes.size

    def part(self, first: int, stop: int) -> Encoded:
        """Blocks `first` up to `stop`, or to the end, as views."""
        spec = self.format.spec
        scales = self.scales[first * spec.scale_bytes : stop * spec.scale_bytes]
        return Encoded(self.format, scales, self.codes[first * spec.code_bytes : stop * spec.code_bytes])
