"""Kernels of the formats without scales, fp32 and bf16, and those that know no format at all.

`scales_at`, `tie` and `shift` are not used.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from diloco_proto.codec.native import (
    ADDRESS,
    FLOAT32,
    INT32,
    INT64,
    as_bits,
    as_float,
    carray,
    inlined,
    kernel,
    pointer,
)
from diloco_proto.codec.pieces import (
    ACCUMULATE,
    ENCODE,
    FEEDBACK,
    FLUSHED,
    MAGNITUDE,
    REFUSED,
    block_peak,
    f32,
    i32,
)

ONES: Final = np.uint64(0x1111111111111111)
LOWER: Final = np.uint64(0x7777777777777777)
HIGHEST: Final = np.uint64(0x8888888888888888)
"""The lowest, the lower three and the highest bits of sixteen nibbles."""

OPTIMIZER: Final = (INT64, ADDRESS, ADDRESS, ADDRESS, ADDRESS, INT64, FLOAT32, FLOAT32)
"""One signature for all; an optimizer leaves the arrays alone that it has no use for, so any address will do."""


@inlined
def flushed(bits: np.int32) -> np.int32:
    """The same bits, or those of +0 for a magnitude under 2^-100."""
    return bits if i32(bits & MAGNITUDE) >= FLUSHED else i32(0)


@inlined
def bf16(bits: np.int32) -> np.int32:
    """The float's bits rounded to their upper 16, to even."""
    v = flushed(bits)
    even = i32(i32(v >> i32(16)) & i32(1))
    return i32(i32(i32(v + i32(0x7FFF)) + even) >> i32(16))


@kernel(*ENCODE)
def encode_fp32(x_at: int, scales_at: int, codes_at: int, blocks: int, tie: np.int32, shift: np.int32) -> int:
    """fp32."""
    bits = carray(pointer(x_at), blocks * 64, i32)
    codes = carray(pointer(codes_at), blocks * 64, i32)
    for b in range(blocks):
        o = b * 64
        if block_peak(bits, o) >= REFUSED:
            return b
        for i in range(64):
            codes[o + i] = flushed(bits[o + i])
    return -1


@kernel(*ACCUMULATE)
def accumulate_fp32(scales_at: int, codes_at: int, blocks: int, weight: np.float32, acc_at: int) -> int:
    """fp32."""
    codes = carray(pointer(codes_at), blocks * 64, f32)
    acc = carray(pointer(acc_at), blocks * 64, f32)
    for b in range(blocks):
        o = b * 64
        for i in range(64):
            acc[o + i] += weight * codes[o + i]
    return -1


@kernel(*FEEDBACK)
def feedback_fp32(
    u_at: int,
    scales_at: int,
    codes_at: int,
    residual_at: int,
    theta_at: int,
    blocks: int,
    tie: np.int32,
    shift: np.int32,
) -> int:
    """fp32."""
    u = carray(pointer(u_at), blocks * 64, f32)
    bits = carray(pointer(u_at), blocks * 64, i32)
    codes = carray(pointer(codes_at), blocks * 64, i32)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    theta = carray(pointer(theta_at), blocks * 64, f32)
    for b in range(blocks):
        o = b * 64
        if block_peak(bits, o) >= REFUSED:
            return b
        for i in range(64):
            code = flushed(bits[o + i])
            codes[o + i] = code
            residual[o + i] = u[o + i] - as_float(code)
            theta[o + i] -= as_float(code)
    return -1


@kernel(*ENCODE)
def encode_bf16(x_at: int, scales_at: int, codes_at: int, blocks: int, tie: np.int32, shift: np.int32) -> int:
    """bf16."""
    bits = carray(pointer(x_at), blocks * 64, i32)
    codes = carray(pointer(codes_at), blocks * 64, np.uint16)
    for b in range(blocks):
        o = b * 64
        if block_peak(bits, o) >= REFUSED:
            return b
        for i in range(64):
            codes[o + i] = bf16(bits[o + i])
    return -1


@kernel(*ACCUMULATE)
def accumulate_bf16(scales_at: int, codes_at: int, blocks: int, weight: np.float32, acc_at: int) -> int:
    """bf16."""
    codes = carray(pointer(codes_at), blocks * 64, np.uint16)
    acc = carray(pointer(acc_at), blocks * 64, f32)
    for b in range(blocks):
        o = b * 64
        for i in range(64):
            value = as_float(i32(i32(codes[o + i]) << i32(16)))
            acc[o + i] += weight * value
    return -1


@kernel(*FEEDBACK)
def feedback_bf16(
    u_at: int,
    scales_at: int,
    codes_at: int,
    residual_at: int,
    theta_at: int,
    blocks: int,
    tie: np.int32,
    shift: np.int32,
) -> int:
    """bf16."""
    u = carray(pointer(u_at), blocks * 64, f32)
    bits = carray(pointer(u_at), blocks * 64, i32)
    codes = carray(pointer(codes_at), blocks * 64, np.uint16)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    theta = carray(pointer(theta_at), blocks * 64, f32)
    for b in range(blocks):
        o = b * 64
        if block_peak(bits, o) >= REFUSED:
            return b
        for i in range(64):
            code = bf16(bits[o + i])
            codes[o + i] = code
            decoded = as_float(i32(code << i32(16)))
            residual[o + i] = u[o + i] - decoded
            theta[o + i] -= decoded
    return -1


@kernel(*OPTIMIZER)
def nesterov(
    acc_at: int, momentum_at: int, residual_at: int, buffer_at: int, blocks: int, mu: np.float32, lr: np.float32
) -> int:
    """m = mu*m + acc, flushed; acc = lr*(acc + mu*m) + residual."""
    acc = carray(pointer(acc_at), blocks * 64, f32)
    momentum = carray(pointer(momentum_at), blocks * 64, f32)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    for i in range(blocks * 64):
        m = as_float(flushed(as_bits(f32(mu * momentum[i] + acc[i]))))
        momentum[i] = m
        acc[i] = lr * (acc[i] + mu * m) + residual[i]
    return -1


@kernel(*OPTIMIZER)
def sgd(
    acc_at: int, momentum_at: int, residual_at: int, buffer_at: int, blocks: int, mu: np.float32, lr: np.float32
) -> int:
    """acc = lr*acc + residual."""
    acc = carray(pointer(acc_at), blocks * 64, f32)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    for i in range(blocks * 64):
        acc[i] = lr * acc[i] + residual[i]
    return -1


@kernel(*OPTIMIZER)
def delayed_push(
    acc_at: int, momentum_at: int, residual_at: int, buffer_at: int, blocks: int, mu: np.float32, lr: np.float32
) -> int:
    """Delayed Nesterov without a momentum step: buffer = buffer + acc, flushed; acc = lr*acc + residual."""
    acc = carray(pointer(acc_at), blocks * 64, f32)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    buffer = carray(pointer(buffer_at), blocks * 64, f32)
    for i in range(blocks * 64):
        buffer[i] = as_float(flushed(as_bits(f32(buffer[i] + acc[i]))))
        acc[i] = lr * acc[i] + residual[i]
    return -1


@kernel(*OPTIMIZER)
def delayed_step(
    acc_at: int, momentum_at: int, residual_at: int, buffer_at: int, blocks: int, mu: np.float32, lr: np.float32
) -> int:
    """With one: m = mu*m + (buffer + acc), flushed; buffer = 0; acc = lr*(acc + mu*m) + residual."""
    acc = carray(pointer(acc_at), blocks * 64, f32)
    momentum = carray(pointer(momentum_at), blocks * 64, f32)
    residual = carray(pointer(residual_at), blocks * 64, f32)
    buffer = carray(pointer(buffer_at), blocks * 64, f32)
    for i in range(blocks * 64):
        m = as_float(flushed(as_bits(f32(mu * momentum[i] + (buffer[i] + acc[i])))))
        momentum[i] = m
        buffer[i] = f32(0)
        acc[i] = lr * (acc[i] + mu * m) + residual[i]
    return -1


@kernel(INT64, ADDRESS, INT64)
def flush(x_at: int, blocks: int) -> int:
    """In place; returns as encode does."""
    bits = carray(pointer(x_at), blocks * 64, i32)
    for b in range(blocks):
        o = b * 64
        if block_peak(bits, o) >= REFUSED:
            return b
        for i in range(64):
            bits[o + i] = flushed(bits[o + i])
    return -1


@kernel(INT32, ADDRESS, INT64)
def peak(x_at: int, blocks: int) -> np.int32:
    """Bits of the largest magnitude; NaN and Inf come out above all numbers."""
    bits = carray(pointer(x_at), blocks * 64, i32)
    top = i32(0)
    for b in range(blocks):
        m = block_peak(bits, b * 64)
        top = m if m > top else top
    return top


@kernel(INT64, ADDRESS, INT64, INT64)
def stray_nibbles(codes_at: int, blocks: int, q_max: int) -> int:
    """Not 0 if a code of blocks of nibbles is beyond +-q_max, which is 7 or 3.

    Sixteen codes at a time, in nibbles that give no carry to the next: t = (code + q_max) mod 16 is at most 2*q_max for
    a legal code, so t + (15 - 2*q_max) overflows four bits for the others.
    """
    words = carray(pointer(codes_at), blocks * 4, np.uint64)
    q = np.uint64(q_max) * ONES
    rest = np.uint64(15 - 2 * q_max) * ONES
    found = np.uint64(0)
    for i in range(blocks * 4):
        t = ((words[i] & LOWER) + q) ^ (words[i] & HIGHEST)
        up = (t & LOWER) + (rest & LOWER)
        found |= (t & up) | ((t | up) & rest)
    return int((found & HIGHEST) >> np.uint64(3))
