"""The codec in plain numpy: the oracle of the kernels and the shortest full statement of the rules.

Everything is done by value in float64, where each step below is exact; nothing here shares code with the
kernels, which work on the float's bits.

- A value that is NaN, infinite or of magnitude >= 2^126 is refused.
- fp32: a magnitude under 2^-100 becomes +0; the codes are the little-endian float32.
- bf16: likewise, then rounding to the nearest multiple, ties to even; little-endian uint16.
- All others: a block whose largest magnitude `amax` is under 2^-100 has scale byte 0 and code 0 throughout.
- int8, int4, int3 (q_max = 127, 7, 3): s is the smallest power of two with q_max*s >= amax, the scale byte
  log2(s) + 127; a value's code is x/s rounded to the nearest integer, ties to even, in two's complement.
- e3m0 (Streaming DiLoCo, arXiv 2501.18512; the scale rule is ours): s is amax rounded to the nearest power of
  two, a tie (1.5*2^k) down. Code c = 1..7 is s*2^(c-7), code 0 is zero, bit 3 is the sign.
- mxfp4 (E2M1 of OCP Microscaling v1.0, section 6.3, with blocks of 64): s = 2^(floor(log2 amax) - 2); codes
  0..7 are s*(0, 0.5, 1, 1.5, 2, 3, 4, 6), bit 3 is the sign.
- e3m0 and mxfp4 round to the nearest value, ties to the even code, and saturate at code 7. Zero has the one
  code 0; a decoder reads the stray code 8 as +0.
- Packing: byte j of an int8 block is value j; byte j (0..31) of a 4-bit or int3 block holds value j in its
  low nibble and value j + 32 in its high nibble.

Encoding what was decoded gives the same bytes again, unless a value was rounded up to 2^126, which is refused.

Every decoded value, and theta if its magnitudes under 2^-100 were flushed to begin with, is a multiple of 2^-123
(the last place of 2^-100): so what is left by subtracting updates from theta is never a denormal, and settings
that treat those as zero change nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diloco_proto.codec.formats import BLOCK, Bytes, Floats, Format

REFUSED = 2.0**126
FLUSHED = 2.0**-100

_E3M0 = np.array([0.0, *(2.0 ** (c - 7) for c in range(1, 8))])
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def first_refused(x: Floats) -> int:
    """Index of the first value that no format holds, or -1."""
    bad = ~(np.abs(x) < REFUSED)
    return int(np.argmax(bad)) if bad.any() else -1


def flush(x: Floats) -> Floats:
    """A copy of x with every magnitude under 2^-100, and -0, made +0."""
    return np.where(np.abs(x) < FLUSHED, np.float32(0), x)


def encode(fmt: Format, x: Floats) -> tuple[Bytes, Bytes]:
    """(scales, codes) of float32[n], n a multiple of 64. The caller has checked `first_refused`."""
    if fmt is Format.FP32:
        return np.empty(0, np.uint8), flush(x).astype("<f4").view(np.uint8)
    if fmt is Format.BF16:
        return np.empty(0, np.uint8), _bf16(flush(x)).view(np.uint8)
    blocks = x.astype(np.float64).reshape(-1, BLOCK)
    exponent, live = _scale_exponents(fmt, np.abs(blocks).max(axis=1))
    units = np.where(live[:, None], np.ldexp(blocks, -exponent[:, None]), 0.0)
    scales = np.where(live, exponent + 127, 0).astype(np.uint8)
    if fmt.spec.q_max:
        codes = np.rint(units).astype(np.int64)
    else:
        magnitude = _nearest(_E3M0 if fmt is Format.E3M0 else _E2M1, np.abs(units))
        codes = magnitude + np.where((units < 0) & (magnitude > 0), 8, 0)
    return scales, _pack(fmt, codes)


def decode(fmt: Format, scales: Bytes, codes: Bytes) -> Floats:
    """float32[n] of legal scales and codes; never -0."""
    if fmt is Format.FP32:
        return codes.view("<f4") + np.float32(0)
    if fmt is Format.BF16:
        return (codes.view("<u2").astype(np.uint32) << 16).view(np.float32) + np.float32(0)
    code = _unpack(fmt, codes)
    if fmt.spec.q_max:
        bits = 8 if fmt is Format.INT8 else 4
        units = np.where(code >= 1 << (bits - 1), code - (1 << bits), code).astype(np.float64)
    else:
        table = _E3M0 if fmt is Format.E3M0 else _E2M1
        units = np.where(code > 8, -table[code & 7], table[code & 7])
    exponent = scales.astype(np.int64)[:, None] - 127
    values = np.where(scales[:, None] == 0, 0.0, np.ldexp(units, exponent))
    return values.astype(np.float32).ravel() + np.float32(0)


def accumulate(fmt: Format, scales: Bytes, codes: Bytes, weight: float, acc: Floats) -> Floats:
    """acc + weight*decoded: one float32 product, one float32 sum."""
    return acc + np.float32(weight) * decode(fmt, scales, codes)


def encode_feedback(fmt: Format, u: Floats, theta: Floats) -> tuple[Bytes, Bytes, Floats, Floats]:
    """(scales, codes, residual, theta) with residual = u - decoded and theta = theta - decoded."""
    scales, codes = encode(fmt, u)
    decoded = decode(fmt, scales, codes)
    return scales, codes, u - decoded, theta - decoded


def nesterov(mean: Floats, momentum: Floats, residual: Floats, mu: float, lr: float) -> tuple[Floats, Floats]:
    """(momentum, u): m = mu*m + mean, flushed under 2^-100; u = lr*(mean + mu*m) + residual. In float32."""
    momentum = flush(np.float32(mu) * momentum + mean)
    return momentum, np.float32(lr) * (mean + np.float32(mu) * momentum) + residual


def sgd(mean: Floats, residual: Floats, lr: float) -> Floats:
    """u = lr*mean + residual, in float32."""
    return np.float32(lr) * mean + residual


def sum_of_squares(fmt: Format, scales: Bytes, codes: Bytes) -> float:
    """In float64: lane j sums value j of each block in the order of the blocks; then lanes are added by halves."""
    squares = decode(fmt, scales, codes).astype(np.float64).reshape(-1, BLOCK) ** 2
    lanes = np.zeros(BLOCK)
    for block in squares:
        lanes += block
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return float(lanes[0])


def _scale_exponents(fmt: Format, amax: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """log2 of each block's scale, and whether the block is more than zeros."""
    live = amax >= FLUSHED
    mantissa, exponent = np.frexp(np.where(live, amax, 1.0))
    power = exponent.astype(np.int64) - 1  # amax = (2*mantissa) * 2^power, 2*mantissa in [1, 2)
    if fmt is Format.E3M0:
        return power + (2 * mantissa > 1.5), live
    if fmt is Format.MXFP4:
        return power - 2, live
    power -= fmt.spec.q_max.bit_length()
    while (short := np.ldexp(float(fmt.spec.q_max), power) < np.where(live, amax, 1.0)).any():
        power += short
    return power, live


def _nearest(table: NDArray[np.float64], magnitude: NDArray[np.float64]) -> NDArray[np.int64]:
    """The code of the nearest entry of an ascending table; ties to the even code."""
    middle = (table[1:] + table[:-1]) / 2
    code = np.searchsorted(middle, magnitude, side="left")  # how many middles lie strictly below
    tie = middle[np.minimum(code, middle.size - 1)] == magnitude
    return np.where(tie & (code % 2 == 1), code + 1, code)


def _pack(fmt: Format, codes: NDArray[np.int64]) -> Bytes:
    if fmt is Format.INT8:
        return (codes & 0xFF).astype(np.uint8).ravel()
    low, high = codes[:, :32] & 0xF, codes[:, 32:] & 0xF
    return (low | high << 4).astype(np.uint8).ravel()


def _unpack(fmt: Format, codes: Bytes) -> NDArray[np.int64]:
    if fmt is Format.INT8:
        return codes.reshape(-1, BLOCK).astype(np.int64)
    pairs = codes.reshape(-1, BLOCK // 2).astype(np.int64)
    return np.concatenate([pairs & 0xF, pairs >> 4], axis=1)


def _bf16(x: Floats) -> NDArray[np.uint16]:
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
