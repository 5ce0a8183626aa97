"""Kernels of the uniform formats: int8, and int4 and int3, which differ only in `tie` and `shift`.

`tie` is the mantissa of q_max and `shift` its exponent: the scale is 2^(exponent of amax - shift), doubled
where the mantissa of amax exceeds that of q_max.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from diloco_proto.codec.native import (
    ADDRESS,
    FLOAT64,
    INT64,
    as_bits,
    carray,
    inlined,
    kernel,
    pointer,
    prefetch,
    squares_of_nibbles,
)
from diloco_proto.codec.pieces import (
    ACCUMULATE,
    ENCODE,
    FEEDBACK,
    FLUSHED,
    MANTISSA,
    REFUSED,
    ROUND,
    block_peak,
    f32,
    factor,
    i32,
    inverse,
    power,
    u8,
)

AHEAD: Final = 4096
"""Bytes of codes that are fetched early where they are all that is read: a processor need not do it by itself."""


@inlined
def scale_byte(top: np.int32, tie: np.int32, shift: np.int32) -> np.int32:
    """The scale byte of a block whose largest magnitude has these bits."""
    if top < FLUSHED:
        return i32(0)
    return i32(i32(i32(top >> i32(23)) - shift) + i32(i32(top & MANTISSA) > tie))


@inlined
def rounded(x: np.float32, inverse_scale: np.float32) -> Any:
    """x / scale rounded to even, plus ROUND: the code is in the low bits."""
    return f32(x * inverse_scale + ROUND)


@inlined
def pair(low: np.float32, high: np.float32) -> np.int32:
    """Two rounded values as a byte of two nibbles."""
    return i32(i32(as_bits(low) & i32(15)) | i32(i32(as_bits(high) & i32(15)) << i32(4)))


@kernel(*ENCODE)
def encode_nibble(x_at: int, scales_at: int, codes_at: int, blocks: int, tie: np.int32, shift: np.int32) -> int:
    """int4 and int3."""
    x = carray(pointer(x_at), blocks * 64, f32)
    bits = carray(pointer(x_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 32, u8)
    for b in range(blocks):
        o, p = b * 64, b * 32
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = scale_byte(top, tie, shift)
        inv = inverse(scale)
        scales[b] = scale
        for j in range(32):
            codes[p + j] = pair(rounded(x[o + j], inv), rounded(x[o + j + 32], inv))
    return -1


@kernel(*ACCUMULATE)
def accumulate_nibble(scales_at: int, codes_at: int, blocks: int, weight: np.float32, acc_at: int) -> int:
    """int4 and int3."""
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 32, u8)
    acc = carray(pointer(acc_at), blocks * 64, f32)
    for b in range(blocks):
        o, p = b * 64, b * 32
        s = factor(weight, i32(scales[b]))
        for j in range(32):
            code = i32(codes[p + j])
            low = f32(i32(i32(code << i32(28)) >> i32(28))) * s
            high = f32(i32(i32(code << i32(24)) >> i32(28))) * s
            acc[o + j] += low
            acc[o + j + 32] += high
    return -1


@kernel(FLOAT64, ADDRESS, ADDRESS, INT64)
def squares_nibble(scales_at: int, codes_at: int, blocks: int) -> np.float64:
    """int4 and int3: what `passes.sum_squares` gives, to the bit. A block's sum is exact whichever way it is made, in
    integers at a quarter of the time."""
    scales = carray(pointer(scales_at), blocks, u8)
    total = np.float64(0)
    for b in range(blocks):
        prefetch(codes_at + b * 32 + AHEAD)
        s = np.float64(power(i32(scales[b])))
        total += np.float64(squares_of_nibbles(codes_at + b * 32)) * (s * s)
    return total


@kernel(*FEEDBACK)
def feedback_nibble(
    u_at: int,
    scales_at: int,
    codes_at: int,
    residual_at: int,
    theta_at: int,
    blocks: int,
    tie: np.int32,
    shift: np.int32,
) -> int:
    """int4 and int3."""
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
        scale = scale_byte(top, tie, shift)
        inv, s = inverse(scale), power(scale)
        scales[b] = scale
        for j in range(32):
            low = rounded(u[o + j], inv)
            high = rounded(u[o + j + 32], inv)
            codes[p + j] = pair(low, high)
            low = f32(low - ROUND) * s
            high = f32(high - ROUND) * s
            residual[o + j] = u[o + j] - low
            residual[o + j + 32] = u[o + j + 32] - high
            theta[o + j] -= low
            theta[o + j + 32] -= high
    return -1


@kernel(*ENCODE)
def encode_int8(x_at: int, scales_at: int, codes_at: int, blocks: int, tie: np.int32, shift: np.int32) -> int:
    """int8."""
    x = carray(pointer(x_at), blocks * 64, f32)
    bits = carray(pointer(x_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 64, u8)
    for b in range(blocks):
        o = b * 64
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = scale_byte(top, tie, shift)
        inv = inverse(scale)
        scales[b] = scale
        for i in range(64):
            codes[o + i] = as_bits(rounded(x[o + i], inv))
    return -1


@kernel(*ACCUMULATE)
def accumulate_int8(scales_at: int, codes_at: int, blocks: int, weight: np.float32, acc_at: int) -> int:
    """int8."""
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 64, np.int8)
    acc = carray(pointer(acc_at), blocks * 64, f32)
    for b in range(blocks):
        o = b * 64
        s = factor(weight, i32(scales[b]))
        for i in range(64):
            acc[o + i] += f32(codes[o + i]) * s
    return -1


@kernel(*FEEDBACK)
def feedback_int8(
    u_at: int,
    scales_at: int,
    codes_at: int,
    residual_at: int,
    theta_at: int,
    blocks: int,
    tie: np.int32,
    shift: np.int32,
) -> int:
    """int8."""
    u = carray(pointer(u_at), blocks * 64, f32)
    bits = carray(pointer(u_at), blocks * 64, i32)
    scales = carray(pointer(scales_at), blocks, u8)
    codes = carray(pointer(codes_at), blocks * 64, u8)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    theta = carray(pointer(theta_at), blocks * 64, f32)
    for b in range(blocks):
        o = b * 64
        top = block_peak(bits, o)
        if top >= REFUSED:
            return b
        scale = scale_byte(top, tie, shift)
        inv, s = inverse(scale), power(scale)
        scales[b] = scale
        for i in range(64):
            code = rounded(u[o + i], inv)
            codes[o + i] = as_bits(code)
            decoded = f32(code - ROUND) * s
            residual[o + i] = u[o + i] - decoded
            theta[o + i] -= decoded
    return -1
