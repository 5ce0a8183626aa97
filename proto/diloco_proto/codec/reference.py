"""The codec in plain numpy: the oracle of the kernels and the shortest full statement of the rules.

Everything is done by value in float64, where each step below is exact, but for a block's mean; nothing here shares
code with the kernels, which work on the float's bits.

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
- int2 and ternary start from the mean magnitude of the block: in float32, magnitudes under 2^-100 taken for 0 and
  each divided by 64, those of values j and j + 32 are added, then of j and j + 16, and so on to j and j + 1. s is the
  power of two with mean/s in (17/32, 17/16] for int2, (7/16, 7/8] for ternary; but with 2^E the power of two
  in amax, for int2 s >= 2^(E-3), for ternary s >= 2^(E-1) and s < 2*amax.
- int2: code -2, -1, 0, 1 is (code + 0.5)*s, so x <= -s, -s < x < 0, 0 <= x <= s and s < x. It has no zero: a value of
  0 in a block that is not all zeros becomes s/2.
- ternary: code -1, 0, 1 is code*s; 0 for |x| <= s/2. Both in two's complement.
- Packing is planar: byte j of an int8 block is value j; byte j (0..31) of a 4-bit or int3 block holds value j in its
  low nibble and value j + 32 in its high nibble; byte j (0..15) of an int2 or ternary block holds, from the lowest
  bits up, values j, j + 16, j + 32 and j + 48.

Encoding what was decoded gives the same bytes again, unless a value was rounded up to 2^126, which is refused. This
does not hold for int2 and ternary: the mean of what was decoded may call for another scale.

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

_TABLES = {
    Format.E3M0: np.array([0.0, *(2.0 ** (c - 7) for c in range(1, 8))]),
    Format.MXFP4: np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
}


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
    exponent, live = _scale_exponents(fmt, blocks)
    units = np.where(live[:, None], np.ldexp(blocks, -exponent[:, None]), 0.0)
    scales = np.where(live, exponent + 127, 0).astype(np.uint8)
    if fmt.spec.q_max:
        codes = np.rint(units).astype(np.int64)
    elif fmt is Format.INT2:
        codes = (units > -1).astype(np.int64) + (units >= 0) + (units > 1) - 2
    elif fmt is Format.TERNARY:
        codes = (units > 0.5).astype(np.int64) - (units < -0.5)
    else:
        magnitude = _nearest(_TABLES[fmt], np.abs(units))
        codes = magnitude + np.where((units < 0) & (magnitude > 0), 8, 0)
    return scales, _pack(fmt, codes)


def decode(fmt: Format, scales: Bytes, codes: Bytes) -> Floats:
    """float32[n] of legal scales and codes; never -0."""
    if fmt is Format.FP32:
        return codes.view("<f4") + np.float32(0)
    if fmt is Format.BF16:
        return (codes.view("<u2").astype(np.uint32) << 16).view(np.float32) + np.float32(0)
    code = unpack(fmt, codes)
    if fmt in _TABLES:
        table = _TABLES[fmt]
        units = np.where(code > 8, -table[code & 7], table[code & 7])
    else:
        bits = _code_bits(fmt)
        units = np.where(code >= 1 << (bits - 1), code - (1 << bits), code).astype(np.float64)
        if fmt is Format.INT2:
            units += 0.5
    exponent = scales.astype(np.int64)[:, None] - 127
    values = np.where(scales[:, None] == 0, 0.0, np.ldexp(units, exponent))
    return values.astype(np.float32).ravel() + np.float32(0)


def accumulate(fmt: Format, scales: Bytes, codes: Bytes, weight: float, acc: Floats) -> Floats:
    """acc + weight*decoded: one float32 product, one float32 sum.

    The products of a block are 0 where weight*scale is under 2^-126: kernels multiply the scale first.
    """
    values = decode(fmt, scales, codes)
    if fmt.spec.scale_bytes:
        factor = np.ldexp(np.abs(np.float64(np.float32(weight))), scales.astype(np.int64) - 127)
        values = np.where(np.repeat(factor < 2.0**-126, BLOCK), np.float32(0), values)
    return acc + np.float32(weight) * values


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


def delayed_nesterov(
    part: Floats, momentum: Floats, buffer: Floats, residual: Floats, mu: float, lr: float, last: bool
) -> tuple[Floats, Floats, Floats]:
    """(momentum, buffer, u) of a push, the `last` of its window or not (arXiv 2401.09135, c = 0). In float32.

    buffer = buffer + part; u = lr*part + residual. The last push instead: m = mu*m + (buffer + part), flushed;
    buffer = 0; u = lr*(part + mu*m) + residual. A buffer that is kept is flushed.
    """
    total = buffer + part
    if not last:
        return momentum, flush(total), sgd(part, residual, lr)
    momentum = flush(np.float32(mu) * momentum + total)
    return momentum, np.zeros_like(buffer), np.float32(lr) * (part + np.float32(mu) * momentum) + residual


def sum_of_squares(fmt: Format, scales: Bytes, codes: Bytes) -> float:
    """In float64: the squares of a block are added by halves, then the blocks' sums in their order."""
    lanes = decode(fmt, scales, codes).astype(np.float64).reshape(-1, BLOCK) ** 2
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    total = 0.0
    for block in lanes[:, 0].tolist():  # `sum` would compensate for rounding
        total += block
    return total


def _scale_exponents(fmt: Format, blocks: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """log2 of each block's scale, and whether the block is more than zeros."""
    amax = np.abs(blocks).max(axis=1)
    live = amax >= FLUSHED
    mantissa, exponent = np.frexp(np.where(live, amax, 1.0))
    power = exponent.astype(np.int64) - 1  # amax = (2*mantissa) * 2^power, 2*mantissa in [1, 2)
    if fmt is Format.INT2:
        return np.maximum(_least_covering(17 / 16, blocks, live), power - 3), live
    if fmt is Format.TERNARY:
        by_mean = _least_covering(7 / 8, blocks, live)
        return np.clip(by_mean, power - 1, power + (2 * mantissa > 1)), live
    if fmt is Format.E3M0:
        return power + (2 * mantissa > 1.5), live
    if fmt is Format.MXFP4:
        return power - 2, live
    power -= fmt.spec.q_max.bit_length()
    while (short := np.ldexp(float(fmt.spec.q_max), power) < np.where(live, amax, 1.0)).any():
        power += short
    return power, live


def _least_covering(r: float, blocks: NDArray[np.float64], live: NDArray[np.bool_]) -> NDArray[np.int64]:
    """log2 of the least power of two s with mean <= r*s for the mean magnitude of a block."""
    lanes = np.where(np.abs(blocks) < FLUSHED, 0.0, np.abs(blocks)).astype(np.float32) / np.float32(BLOCK)
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    mantissa, exponent = np.frexp(np.where(live, lanes[:, 0], 1.0).astype(np.float64) / r)
    return np.asarray(exponent - (mantissa == 0.5), np.int64)


def _nearest(table: NDArray[np.float64], magnitude: NDArray[np.float64]) -> NDArray[np.int64]:
    """The code of the nearest entry of an ascending table; ties to the even code."""
    middle = (table[1:] + table[:-1]) / 2
    code = np.searchsorted(middle, magnitude, side="left")  # how many middles lie strictly below
    tie = middle[np.minimum(code, middle.size - 1)] == magnitude
    return np.where(tie & (code % 2 == 1), code + 1, code)


def _code_bits(fmt: Format) -> int:
    return 8 * fmt.spec.code_bytes // BLOCK


def _pack(fmt: Format, codes: NDArray[np.int64]) -> Bytes:
    bits = _code_bits(fmt)
    planes = (codes & ((1 << bits) - 1)).reshape(-1, 8 // bits, fmt.spec.code_bytes)
    shifts = bits * np.arange(8 // bits)[:, None]
    packed: NDArray[np.int64] = (planes << shifts).sum(axis=1)
    return packed.astype(np.uint8).ravel()


def unpack(fmt: Format, codes: Bytes) -> NDArray[np.int64]:
    """int64[blocks, 64]: the codes of a format with scales, as unsigned numbers."""
    bits = _code_bits(fmt)
    packed = codes.reshape(-1, fmt.spec.code_bytes).astype(np.int64)
    return np.concatenate([packed >> bits * i & ((1 << bits) - 1) for i in range(8 // bits)], axis=1)


def _bf16(x: Floats) -> NDArray[np.uint16]:
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
