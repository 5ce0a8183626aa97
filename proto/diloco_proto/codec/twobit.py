"""Kernels of the formats of two bits a value: int2 and ternary. `tie` and `shift` are not used.

Both take their scale from the block's mean magnitude, for the least squared error over a whole block: with so few
codes, a scale that reaches the largest magnitude leaves nothing for the others. The scale s is the power of two
with mean/s in (r/2, r]. Where s and 2*s have the same expected squared error, r is

                                int2      ternary
    Gaussian                    1.148     0.949
    Laplace                     0.950     0.721
    Student t, 3 degrees        0.866     0.684
    taken                       17/16     7/8

and what is taken has 4 % more squared error than the best power of two of each block on the first two, 6 and 7 % on
the third (docs/log.md). The bounds by the largest magnitude are for blocks of few values that are not zero, or of
one magnitude, of which the mean says little.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from diloco_proto.codec.native import (
    ADDRESS,
    INT32,
    INT64,
    as_bits,
    carray,
    inlined,
    kernel,
    mean_magnitude,
    pointer,
)
from diloco_proto.codec.pieces import (
    ACCUMULATE,
    ENCODE,
    FEEDBACK,
    FLUSHED,
    MAGNITUDE,
    MANTISSA,
    REFUSED,
    block_peak,
    f32,
    factor,
    i32,
    power,
    u8,
)

ABOVE_ALL: Final = i32(255 << 23)
GROUP: Final = 4
"""Blocks of which int2 finds the scales before the codes."""
INT2_TIE: Final = i32(0x080000)
"""Mantissa of 17/16."""
TERNARY_TIE: Final = i32(0x600000)
"""Mantissa of 14/8, which is 7/8 of the next power of two."""


@inlined
def block_mean(at: int, o: int) -> np.int32:
    """Bits of the mean magnitude of the 64 values from o on; those under 2^-100 count as zeros."""
    bits: np.int32 = as_bits(mean_magnitude(at + o * 4, FLUSHED))
    return bits


@inlined
def int2_scale(top: np.int32, mean: np.int32) -> np.int32:
    """The scale byte of a block with these bits of its largest and its mean magnitude.

    At least an eighth of the power of two in the largest: then a block's squared error is less than its squares
    even if all but one are zeros, which int2 does not have.
    """
    byte = i32(i32(mean >> i32(23)) + i32(i32(mean & MANTISSA) > INT2_TIE))
    least = i32(i32(top >> i32(23)) - i32(3))
    byte = byte if byte > least else least
    return byte if top >= FLUSHED else i32(0)


@inlined
def ternary_scale(top: np.int32, mean: np.int32) -> np.int32:
    """The same. At least half the power of two in the largest, and less than twice the largest, so that it is not 0."""
    byte = i32(i32(i32(mean >> i32(23)) + i32(1)) + i32(i32(mean & MANTISSA) > TERNARY_TIE))
    exponent = i32(top >> i32(23))
    least = i32(exponent - i32(1))
    most = i32(exponent + i32(i32(top & MANTISSA) > i32(0)))
    byte = byte if byte > least else least
    byte = byte if byte < most else most
    return byte if top >= FLUSHED else i32(0)


@inlined
def int2_unit(scale: np.int32) -> np.int32:
    """Bits of the scale; in a block of zeros, of what no magnitude exceeds."""
    return i32(scale << i32(23)) if scale > i32(0) else ABOVE_ALL


@inlined
def int2_floor(scale: np.int32) -> np.int32:
    """A magnitude up to this has no sign: zero has none, in a block of zeros no value has."""
    return i32(0) if scale > i32(0) else ABOVE_ALL


@inlined
def int2_code(bits: np.int32, unit: np.int32, floor: np.int32) -> np.int32:
    """The code of a float: below zero 2 or 3, the lower from -s down; else 0 or 1, the upper above s.

    By comparing integers: what x/s - 0.5 would round to is not the nearest for the smallest x.
    """
    magnitude = i32(bits & MAGNITUDE)
    below = bits < i32(0) and magnitude > floor
    beyond = i32(magnitude - unit) if below else i32(unit - magnitude)
    low = i32(i32(beyond >> i32(31)) & i32(1))
    return i32(low | i32(2)) if below else low


@inlined
def int2_value(code: np.int32, s: np.float32) -> Any:
    """(c + 0.5) * s. Bits above the second do not matter."""
    return f32(f32(i32(i32(code << i32(30)) >> i32(30))) + f32(0.5)) * s


@inlined
def ternary_half(scale: np.int32) -> np.int32:
    """Bits of half the scale: nothing at or under it is more than zero."""
    return i32(i32(scale - i32(1)) << i32(23)) if scale > i32(0) else ABOVE_ALL


@inlined
def ternary_code(bits: np.int32, half: np.int32) -> np.int32:
    """The code of a float: 0, 1 or 3."""
    code = i32(i32(i32(bits >> i32(30)) & i32(2)) | i32(1))
    return code if i32(bits & MAGNITUDE) > half else i32(0)


@inlined
def ternary_value(code: np.int32, s: np.float32) -> Any:
    """c * s. Bits above the second do not matter."""
    return f32(i32(i32(code << i32(30)) >> i32(30))) * s


@inlined
def four(a: np.int32, b: np.int32, c: np.int32, d: np.int32) -> np.int32:
    """Four codes as a byte."""
    return i32(i32(a | i32(b << i32(2))) | i32(i32(c << i32(4)) | i32(d << i32(6))))


@kernel(*ENCODE)
def encode_int2(x_at: int, scales_at: int, codes_at: int, blocks: int, tie: np.int32, shift: np.int32) -> int:
    """int2. The scales of a few blocks are found first, for each takes long: else the codes would wait for it."""
    scales = carray(pointer(scales_at), blocks, u8)
    for first in range(0, blocks, GROUP):
        some = min(GROUP, blocks - first)
        for k in range(some):
            b = first + k
            top = block_peak(carray(pointer(x_at + b * 256), 64, i32), 0)
            if top >= REFUSED:
                return b
            scales[b] = int2_scale(top, block_mean(x_at, b * 64))
        for k in range(some):
            b = first + k
            bits = carray(pointer(x_at + b * 256), 64, i32)
            codes = carray(pointer(codes_at + b * 16), 16, u8)
            scale = i32(scales[b])
            unit, floor = int2_unit(scale), int2_floor(scale)
            for j in range(16):
                codes[j] = four(
                    int2_code(bits[j], unit, floor),
                    int2_code(bits[j + 16], unit, floor),
                    int2_code(bits[j + 32], unit, floor),
                    int2_code(bits[j + 48], unit, floor),
                )
    return -1


@kernel(*ACCUMULATE)
def accumulate_int2(scales_at: int, codes_at: int, blocks: int, weight: np.float32, acc_at: int) -> int:
    """int2."""
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 16, u8)
    acc = carray(pointer(acc_at), blocks * 64, f32)
    for b in range(blocks):
        o, p = b * 64, b * 16
        s = factor(weight, i32(scales[b]))
        for j in range(16):
            code = i32(codes[p + j])
            v0 = int2_value(code, s)
            v1 = int2_value(i32(code >> i32(2)), s)
            v2 = int2_value(i32(code >> i32(4)), s)
            v3 = int2_value(i32(code >> i32(6)), s)
            acc[o + j] += v0
            acc[o + j + 16] += v1
            acc[o + j + 32] += v2
            acc[o + j + 48] += v3
    return -1


@kernel(*FEEDBACK)
def feedback_int2(
    u_at: int,
    scales_at: int,
    codes_at: int,
    residual_at: int,
    theta_at: int,
    blocks: int,
    tie: np.int32,
    shift: np.int32,
) -> int:
    """int2."""
    u = carray(pointer(u_at), blocks * 64, f32)
    bits = carray(pointer(u_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 16, u8)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    theta = carray(pointer(theta_at), blocks * 64, f32)
    for b in range(blocks):
        o, p = b * 64, b * 16
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = int2_scale(top, block_mean(u_at, o))
        unit, floor, s = int2_unit(scale), int2_floor(scale), power(scale)
        scales[b] = scale
        for j in range(16):
            c0 = int2_code(bits[o + j], unit, floor)
            c1 = int2_code(bits[o + j + 16], unit, floor)
            c2 = int2_code(bits[o + j + 32], unit, floor)
            c3 = int2_code(bits[o + j + 48], unit, floor)
            codes[p + j] = four(c0, c1, c2, c3)
            d0, d1, d2, d3 = int2_value(c0, s), int2_value(c1, s), int2_value(c2, s), int2_value(c3, s)
            residual[o + j] = u[o + j] - d0
            residual[o + j + 16] = u[o + j + 16] - d1
            residual[o + j + 32] = u[o + j + 32] - d2
            residual[o + j + 48] = u[o + j + 48] - d3
            theta[o + j] -= d0
            theta[o + j + 16] -= d1
            theta[o + j + 32] -= d2
            theta[o + j + 48] -= d3
    return -1


@kernel(*ENCODE)
def encode_ternary(x_at: int, scales_at: int, codes_at: int, blocks: int, tie: np.int32, shift: np.int32) -> int:
    """ternary."""
    bits = carray(pointer(x_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 16, u8)
    for b in range(blocks):
        o, p = b * 64, b * 16
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = ternary_scale(top, block_mean(x_at, o))
        half = ternary_half(scale)
        scales[b] = scale
        for j in range(16):
            codes[p + j] = four(
                ternary_code(bits[o + j], half),
                ternary_code(bits[o + j + 16], half),
                ternary_code(bits[o + j + 32], half),
                ternary_code(bits[o + j + 48], half),
            )
    return -1


@kernel(*ACCUMULATE)
def accumulate_ternary(scales_at: int, codes_at: int, blocks: int, weight: np.float32, acc_at: int) -> int:
    """ternary."""
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 16, u8)
    acc = carray(pointer(acc_at), blocks * 64, f32)
    for b in range(blocks):
        o, p = b * 64, b * 16
        s = factor(weight, i32(scales[b]))
        for j in range(16):
            code = i32(codes[p + j])
            v0 = ternary_value(code, s)
            v1 = ternary_value(i32(code >> i32(2)), s)
            v2 = ternary_value(i32(code >> i32(4)), s)
            v3 = ternary_value(i32(code >> i32(6)), s)
            acc[o + j] += v0
            acc[o + j + 16] += v1
            acc[o + j + 32] += v2
            acc[o + j + 48] += v3
    return -1


@kernel(*FEEDBACK)
def feedback_ternary(
    u_at: int,
    scales_at: int,
    codes_at: int,
    residual_at: int,
    theta_at: int,
    blocks: int,
    tie: np.int32,
    shift: np.int32,
) -> int:
    """ternary."""
    u = carray(pointer(u_at), blocks * 64, f32)
    bits = carray(pointer(u_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 16, u8)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    theta = carray(pointer(theta_at), blocks * 64, f32)
    for b in range(blocks):
        o, p = b * 64, b * 16
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = ternary_scale(top, block_mean(u_at, o))
        half, s = ternary_half(scale), power(scale)
        scales[b] = scale
        for j in range(16):
            c0 = ternary_code(bits[o + j], half)
            c1 = ternary_code(bits[o + j + 16], half)
            c2 = ternary_code(bits[o + j + 32], half)
            c3 = ternary_code(bits[o + j + 48], half)
            codes[p + j] = four(c0, c1, c2, c3)
            d0, d1, d2, d3 = ternary_value(c0, s), ternary_value(c1, s), ternary_value(c2, s), ternary_value(c3, s)
            residual[o + j] = u[o + j] - d0
            residual[o + j + 16] = u[o + j + 16] - d1
            residual[o + j + 32] = u[o + j + 32] - d2
            residual[o + j + 48] = u[o + j + 48] - d3
            theta[o + j] -= d0
            theta[o + j + 16] -= d1
            theta[o + j + 32] -= d2
            theta[o + j + 48] -= d3
    return -1


@kernel(INT32, ADDRESS, INT64)
def stray_pairs(codes_at: int, blocks: int) -> np.int32:
    """Not 0 if a ternary code is 2."""
    codes = carray(pointer(codes_at), blocks * 16, u8)
    found = i32(0)
    for b in range(blocks):
        p = b * 16
        for j in range(16):
            byte = i32(codes[p + j])
            found = i32(found | i32(i32(byte >> i32(1)) & i32(~byte)))
    return i32(found & i32(0x55))
