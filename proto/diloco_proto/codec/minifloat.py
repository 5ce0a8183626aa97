"""Kernels of the formats whose codes are small floats: e3m0 and mxfp4. `tie` and `shift` are not used."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from diloco_proto.codec.native import as_bits, as_float, carray, inlined, kernel, pointer
from diloco_proto.codec.pieces import (
    ACCUMULATE,
    ENCODE,
    FEEDBACK,
    FLUSHED,
    MAGNITUDE,
    MANTISSA,
    REFUSED,
    ROUND,
    SIGN,
    block_peak,
    f32,
    factor,
    i32,
    inverse,
    power,
    u8,
)

HALF: Final = i32(126 << 23)
QUARTER: Final = i32(125 << 23)
ONE: Final = i32(127 << 23)
ABOVE_ALL: Final = i32(255 << 23)
E3M0_BIAS: Final = f32(2.0**120)
E3M0_BITS: Final = i32(SIGN | i32(7 << 23))


@inlined
def signed(code: np.int32, bits: np.int32) -> np.int32:
    """A code 1..7 with the sign of a float in bit 3."""
    return i32(code | i32(i32(bits >> i32(28)) & i32(8)))


@inlined
def e3m0_scale(top: np.int32) -> np.int32:
    """The scale byte of a block: its largest magnitude to the nearest power of two, 1.5 down."""
    if top < FLUSHED:
        return i32(0)
    return i32(i32(top >> i32(23)) + i32(i32(top & MANTISSA) > i32(0x400000)))


@inlined
def e3m0_half(scale: np.int32) -> np.int32:
    """Bits of half the smallest code: nothing at or under it is more than zero."""
    return i32(i32(scale - i32(7)) << i32(23)) if scale > i32(0) else ABOVE_ALL


@inlined
def e3m0_code(bits: np.int32, half: np.int32) -> np.int32:
    """The code of a float. As an integer its bits are a piecewise linear log2 in units of 2^-23: 1.5 is 0.5."""
    t = i32(i32(bits & MAGNITUDE) - half)
    even = i32(i32(t >> i32(23)) & i32(1))
    code = i32(i32(i32(t + i32(0x3FFFFF)) + even) >> i32(23))
    code = i32(1) if code < i32(1) else code
    code = i32(7) if code > i32(7) else code
    return signed(code, bits) if t > i32(0) else i32(0)


@inlined
def e3m0_value(code: np.int32, half: np.int32) -> Any:
    """half * 2^c with its sign, which for a block that is not zeros is the value of the code."""
    c = i32(code & i32(7))
    magnitude = i32(half + i32(c << i32(23))) if c > i32(0) else i32(0)
    return as_float(i32(magnitude | i32(i32(code << i32(28)) & SIGN)))


@inlined
def e3m0_unit(code: np.int32) -> Any:
    """2^(c - 7) with its sign; zero for c = 0. As a float's exponent c means 2^(c - 127), or zero.

    Bits above the fourth do not matter.
    """
    return as_float(i32(i32(i32(code << i32(28)) >> i32(5)) & E3M0_BITS)) * E3M0_BIAS


@inlined
def mxfp4_scale(top: np.int32) -> np.int32:
    """The scale byte of a block: the exponent of its largest magnitude less 2."""
    return i32(i32(top >> i32(23)) - i32(2)) if top >= FLUSHED else i32(0)


@inlined
def mxfp4_code(bits: np.int32, inverse_scale: np.float32) -> np.int32:
    """The code of a float. From 1 on one bit of mantissa is kept; below, the step is constant."""
    y = f32(as_float(i32(bits & MAGNITUDE)) * inverse_scale)
    t = as_bits(y)
    even = i32(i32(t >> i32(22)) & i32(1))
    large = i32(i32(i32(t - i32(HALF - i32(0x1FFFFF))) + even) >> i32(22))
    large = i32(7) if large > i32(7) else large
    small = i32(as_bits(f32(y + y + ROUND)) & i32(3))
    code = large if t >= ONE else small
    return signed(code, bits) if t > QUARTER else i32(0)


@inlined
def mxfp4_unit(code: np.int32) -> Any:
    """The value of a code with its sign. Bits above the fourth do not matter."""
    c = i32(code & i32(7))
    magnitude = i32(HALF + i32(c << i32(22)))
    if c < i32(2):
        magnitude = i32(i32(-c) & HALF)
    return as_float(i32(magnitude | i32(i32(code << i32(28)) & SIGN)))


@kernel(*ENCODE)
def encode_e3m0(x_at: int, scales_at: int, codes_at: int, blocks: int, tie: np.int32, shift: np.int32) -> int:
    """e3m0."""
    bits = carray(pointer(x_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 32, u8)
    for b in range(blocks):
        o, p = b * 64, b * 32
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = e3m0_scale(top)
        half = e3m0_half(scale)
        scales[b] = scale
        for j in range(32):
            high = i32(e3m0_code(bits[o + j + 32], half) << i32(4))
            codes[p + j] = i32(e3m0_code(bits[o + j], half) | high)
    return -1


@kernel(*ACCUMULATE)
def accumulate_e3m0(scales_at: int, codes_at: int, blocks: int, weight: np.float32, acc_at: int) -> int:
    """e3m0."""
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 32, u8)
    acc = carray(pointer(acc_at), blocks * 64, f32)
    for b in range(blocks):
        o, p = b * 64, b * 32
        s = factor(weight, i32(scales[b]))
        for j in range(32):
            code = i32(codes[p + j])
            low = e3m0_unit(code) * s
            high = e3m0_unit(i32(code >> i32(4))) * s
            acc[o + j] += low
            acc[o + j + 32] += high
    return -1


@kernel(*FEEDBACK)
def feedback_e3m0(
    u_at: int,
    scales_at: int,
    codes_at: int,
    residual_at: int,
    theta_at: int,
    blocks: int,
    tie: np.int32,
    shift: np.int32,
) -> int:
    """e3m0."""
    u = carray(pointer(u_at), blocks * 64, f32)
    bits = carray(pointer(u_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 32, u8)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    theta = carray(pointer(theta_at), blocks * 64, f32)
    for b in range(blocks):
        o, p = b * 64, b * 32
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = e3m0_scale(top)
        half = e3m0_half(scale)
        scales[b] = scale
        for j in range(32):
            low = e3m0_code(bits[o + j], half)
            high = e3m0_code(bits[o + j + 32], half)
            codes[p + j] = i32(low | i32(high << i32(4)))
            d_low = e3m0_value(low, half)
            d_high = e3m0_value(high, half)
            residual[o + j] = u[o + j] - d_low
            residual[o + j + 32] = u[o + j + 32] - d_high
            theta[o + j] -= d_low
            theta[o + j + 32] -= d_high
    return -1


@kernel(*ENCODE)
def encode_mxfp4(x_at: int, scales_at: int, codes_at: int, blocks: int, tie: np.int32, shift: np.int32) -> int:
    """mxfp4."""
    bits = carray(pointer(x_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 32, u8)
    for b in range(blocks):
        o, p = b * 64, b * 32
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = mxfp4_scale(top)
        inv = inverse(scale)
        scales[b] = scale
        for j in range(32):
            high = i32(mxfp4_code(bits[o + j + 32], inv) << i32(4))
            codes[p + j] = i32(mxfp4_code(bits[o + j], inv) | high)
    return -1


@kernel(*ACCUMULATE)
def accumulate_mxfp4(scales_at: int, codes_at: int, blocks: int, weight: np.float32, acc_at: int) -> int:
    """mxfp4."""
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 32, u8)
    acc = carray(pointer(acc_at), blocks * 64, f32)
    for b in range(blocks):
        o, p = b * 64, b * 32
        s = factor(weight, i32(scales[b]))
        for j in range(32):
            code = i32(codes[p + j])
            low = mxfp4_unit(code) * s
            high = mxfp4_unit(i32(code >> i32(4))) * s
            acc[o + j] += low
            acc[o + j + 32] += high
    return -1


@kernel(*FEEDBACK)
def feedback_mxfp4(
    u_at: int,
    scales_at: int,
    codes_at: int,
    residual_at: int,
    theta_at: int,
    blocks: int,
    tie: np.int32,
    shift: np.int32,
) -> int:
    """mxfp4."""
    u = carray(pointer(u_at), blocks * 64, f32)
    bits = carray(pointer(u_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 32, u8)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    theta = carray(pointer(theta_at), blocks * 64, f32)
    for b in range(blocks):
        o, p = b * 64, b * 32
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = mxfp4_scale(top)
        inv, s = inverse(scale), power(scale)
        scales[b] = scale
        for j in range(32):
            low = mxfp4_code(bits[o + j], inv)
            high = mxfp4_code(bits[o + j + 32], inv)
            codes[p + j] = i32(low | i32(high << i32(4)))
            d_low = mxfp4_unit(low) * s
            d_high = mxfp4_unit(high) * s
            residual[o + j] = u[o + j] - d_low
            residual[o + j + 32] = u[o + j + 32] - d_high
            theta[o + j] -= d_low
            theta[o + j + 32] -= d_high
    return -1
