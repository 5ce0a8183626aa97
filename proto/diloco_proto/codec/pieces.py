"""What the kernels of all formats share: constants and scales. See `kernels` for their calling rules.

Kernels compute what `reference` states, bit for bit, by other means: on the float's bits, with 32-bit integers
(numba widens integer arithmetic to 64 bits, which halves the speed: hence the many `i32`), and without branches
on values, so that LLVM vectorises them. Loops over a block have a constant length for the same reason.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from diloco_proto.codec.native import ADDRESS, FLOAT32, INT32, INT64, as_bits, as_float, inlined

i32 = np.int32
f32 = np.float32
u8 = np.uint8

SIGN: Final = i32(-0x80000000)
MAGNITUDE: Final = i32(0x7FFFFFFF)
MANTISSA: Final = i32(0x7FFFFF)
REFUSED: Final = i32((126 + 127) << 23)
FLUSHED: Final = i32((127 - 100) << 23)
NORMAL: Final = i32(1 << 23)
ROUND: Final = f32(3 << 22)
"""1.5 * 2^23: added to |v| < 2^22, it leaves v, rounded to even, in the low bits of the sum."""

ENCODE: Final = (INT64, ADDRESS, ADDRESS, ADDRESS, INT64, INT32, INT32)
ACCUMULATE: Final = (INT64, ADDRESS, ADDRESS, INT64, FLOAT32, ADDRESS)
FEEDBACK: Final = (INT64, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, INT64, INT32, INT32)


@inlined
def block_peak(bits: Any, o: int) -> np.int32:
    """Bits of the largest magnitude of the 64 values from o on; NaN and Inf come out above all numbers."""
    top = i32(0)
    for i in range(64):
        m = i32(bits[o + i] & MAGNITUDE)
        top = m if m > top else top
    return top


@inlined
def power(scale: np.int32) -> Any:
    """2^(scale - 127); zero for scale 0."""
    return as_float(i32(scale << i32(23)))


@inlined
def factor(weight: np.float32, scale: np.int32) -> Any:
    """weight * 2^(scale - 127), what to multiply a code with; zero where that is no normal number.

    Since scales are powers of two, code*(weight*scale) and weight*(code*scale) are the same float32.
    """
    bits = as_bits(f32(weight * power(scale)))
    return as_float(bits if i32(bits & MAGNITUDE) >= NORMAL else i32(bits & SIGN))


@inlined
def inverse(scale: np.int32) -> Any:
    """2^(127 - scale); zero for scale 0."""
    return as_float(i32(i32(i32(254) - scale) << i32(23))) if scale > i32(0) else f32(0)
