"""The codec's operations on flat arrays: what `reference` states, at memory speed.

Arrays are C-contiguous and little-endian; `x`, `u`, `acc`, `out`, `theta`, `momentum`, `residual` are float32[n]
with n a multiple of 64, `scales` and `codes` are uint8 of the sizes that `Format.spec` gives. Operations release
the interpreter lock, use one thread, and give the same bits however the arrays are cut at blocks.

Legal scales and codes are those that `encode` can write, and the stray code 8 of e3m0 and mxfp4, which reads as
zero. On others (see `validate`) the operations do not fail, but what they compute is of no use.

The loops are C functions of addresses in `uniform`, `minifloat`, `twobit` and `plain`, one `Loops` a format:

- encode(x, scales, codes, blocks, tie, shift) returns the first block with a refused value, or -1.
- accumulate(scales, codes, blocks, weight, acc): acc += weight*decoded.
- feedback(u, scales, codes, residual, theta, blocks, tie, shift) encodes u, and then residual = u - decoded,
  theta -= decoded. Returns as encode does; the blocks before a refused one have been dealt with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diloco_proto.codec import minifloat, plain, twobit, uniform
from diloco_proto.codec.digest import sum_blocks
from diloco_proto.codec.errors import CorruptFrame, UnencodableValue
from diloco_proto.codec.formats import BLOCK, Bytes, Encoded, Floats, Format
from diloco_proto.codec.native import Kernel
from diloco_proto.codec.passes import STEP, accumulate_into_blocks, encode_difference_blocks, sum_squares


@dataclass(frozen=True, slots=True)
class Loops:
    """The compiled loops of one format and the two numbers that tell int4 and int3 apart."""

    encode: Kernel
    accumulate: Kernel
    feedback: Kernel
    tie: int = 0
    shift: int = 0


_NIBBLES: Final = (Format.INT4, Format.INT3)
"""Formats of four-bit integers."""

_LOOPS: Final = {
    Format.FP32: Loops(plain.encode_fp32, plain.accumulate_fp32, plain.feedback_fp32),
    Format.BF16: Loops(plain.encode_bf16, plain.accumulate_bf16, plain.feedback_bf16),
    Format.INT8: Loops(uniform.encode_int8, uniform.accumulate_int8, uniform.feedback_int8, 0x7E0000, 6),
    Format.INT4: Loops(uniform.encode_nibble, uniform.accumulate_nibble, uniform.feedback_nibble, 0x600000, 2),
    Format.INT3: Loops(uniform.encode_nibble, uniform.accumulate_nibble, uniform.feedback_nibble, 0x400000, 1),
    Format.E3M0: Loops(minifloat.encode_e3m0, minifloat.accumulate_e3m0, minifloat.feedback_e3m0),
    Format.MXFP4: Loops(minifloat.encode_mxfp4, minifloat.accumulate_mxfp4, minifloat.feedback_mxfp4),
    Format.INT2: Loops(twobit.encode_int2, twobit.accumulate_int2, twobit.feedback_int2),
    Format.TERNARY: Loops(twobit.encode_ternary, twobit.accumulate_ternary, twobit.feedback_ternary),
}


def loops_of(fmt: Format) -> Loops:
    """The loops of a format, for compiled code that calls them by address."""
    return _LOOPS[fmt]


def encode(fmt: Format, x: Floats, scales: Bytes, codes: Bytes) -> int:
    """Encode x. Returns the index of the first refused value (NaN, Inf, magnitude >= 2^126), or -1.

    After a refusal the contents of scales and codes are unspecified.
    """
    blocks = _check(fmt, x, scales, codes)
    loops = _LOOPS[fmt]
    bad = loops.encode(_at(x), _at(scales), _at(codes), blocks, loops.tie, loops.shift)
    return _refused(x, bad)


def encode_difference(
    fmt: Format,
    base: Floats,
    local: Floats,
    scales: Bytes,
    codes: Bytes,
    residual: Floats | None = None,
    left_out: Floats | None = None,
) -> int:
    """Encode u = base - local, or u = (base - local) + residual: one float32 operation after the other, in one pass.

    With `left_out`, left_out = u - decoded, what error feedback adds next time; it may be the array `residual`. Returns
    as `encode` does, the index of a refused u. After a refusal the contents of scales, codes and left_out are
    unspecified.
    """
    blocks = _check(fmt, base, scales, codes)
    assert _blocks(local) == blocks
    for optional in (residual, left_out):
        assert optional is None or _blocks(optional) == blocks
    loops, spec = _LOOPS[fmt], fmt.spec
    scratch = np.zeros(2 * STEP * BLOCK, np.float32)
    bad: int = encode_difference_blocks(
        loops.encode.address,
        loops.feedback.address,
        _at(base),
        _at(local),
        0 if residual is None else _at(residual),
        0 if left_out is None else _at(left_out),
        _at(scales),
        _at(codes),
        blocks,
        spec.scale_bytes,
        spec.code_bytes,
        loops.tie,
        loops.shift,
        _at(scratch),
    )
    if bad < 0:
        return -1
    u = base[bad * BLOCK : (bad + 1) * BLOCK] - local[bad * BLOCK : (bad + 1) * BLOCK]
    if residual is not None:
        u += residual[bad * BLOCK : (bad + 1) * BLOCK]
    return bad * BLOCK + _refused(u, 0)


def decode(fmt: Format, scales: Bytes, codes: Bytes, out: Floats) -> None:
    """out = decoded."""
    _accumulate_into(fmt, scales, codes, 1.0, None, out, 0, 0)


def decode_into(fmt: Format, scales: Bytes, codes: Bytes, out: Floats, first_block: int = 0) -> int:
    """out = decoded; returns its digest, as of a range that begins at block `first_block` of its fragment."""
    return _accumulate_into(fmt, scales, codes, 1.0, None, out, first_block, sum_blocks.address)


def subtract_into(fmt: Format, scales: Bytes, codes: Bytes, base: Floats, out: Floats, first_block: int = 0) -> int:
    """out = base - decoded, and its digest, as `decode_into`. `out` may be `base`, but not overlap it otherwise."""
    assert base.size == out.size
    return _accumulate_into(fmt, scales, codes, -1.0, base, out, first_block, sum_blocks.address)


def accumulate(fmt: Format, scales: Bytes, codes: Bytes, weight: float, acc: Floats) -> None:
    """acc += weight*decoded: `weight` rounded to float32, one float32 product and one float32 sum a value.

    The products of a block in which weight*scale is under 2^-126, no normal float32, are 0. |weight| is at most 2.
    """
    blocks = _check(fmt, acc, scales, codes)
    _LOOPS[fmt].accumulate(_at(scales), _at(codes), blocks, weight, _at(acc))


def subtract(fmt: Format, scales: Bytes, codes: Bytes, theta: Floats) -> None:
    """theta -= decoded: what a worker does with an update."""
    accumulate(fmt, scales, codes, -1.0, theta)


def encode_feedback(fmt: Format, u: Floats, scales: Bytes, codes: Bytes, residual: Floats, theta: Floats) -> int:
    """Encode u; residual = u - decoded; theta -= decoded. The arrays must not overlap.

    Returns the index of the first refused value or -1. After a refusal the blocks before that value have been
    dealt with, the others are as they were.
    """
    blocks = _check(fmt, u, scales, codes)
    assert _check(fmt, residual, scales, codes) == _check(fmt, theta, scales, codes) == blocks
    loops = _LOOPS[fmt]
    bad = loops.feedback(_at(u), _at(scales), _at(codes), _at(residual), _at(theta), blocks, loops.tie, loops.shift)
    return _refused(u, bad)


def nesterov_(acc: Floats, momentum: Floats, residual: Floats, mu: float, lr: float) -> None:
    """momentum = mu*momentum + acc; acc = lr*(acc + mu*momentum) + residual. All in float32.

    A momentum under 2^-100 becomes +0: values that get no gradient must not decay into denormals, which are
    slow on some machines and zero on others.
    """
    assert acc.size == momentum.size == residual.size
    plain.nesterov(_at(acc), _at(momentum), _at(residual), 0, _blocks(acc), mu, lr)


def sgd_(acc: Floats, residual: Floats, lr: float) -> None:
    """acc = lr*acc + residual, in float32."""
    assert acc.size == residual.size
    plain.sgd(_at(acc), 0, _at(residual), 0, _blocks(acc), 0.0, lr)


def sum_of_squares(fmt: Format, scales: Bytes, codes: Bytes) -> float:
    """Sum of the squares of the decoded values, in float64 and in a fixed order.

    Of each block the squares (exact in float64) of values j and j + 32 are added, then j and j + 16, and so on; then
    the blocks' sums, in their order.
    """
    if fmt in _NIBBLES:
        return float(uniform.squares_nibble(_at(scales), _at(codes), scales.size))
    spec = fmt.spec
    scratch = np.empty(STEP * BLOCK, np.float32)
    places = _LOOPS[fmt].accumulate.address, _at(scales), _at(codes)
    sizes = codes.size // spec.code_bytes, spec.scale_bytes, spec.code_bytes
    return float(sum_squares(*places, *sizes, _at(scratch)))


def flush_(x: Floats) -> int:
    """Magnitudes under 2^-100, and -0, become +0, in place.

    Returns the index of the first refused value or -1; after a refusal what comes before it has been flushed.
    """
    return _refused(x, plain.flush(_at(x), _blocks(x)))


def largest_magnitude(x: Floats) -> float:
    """The largest magnitude in x; Inf or NaN if there is an Inf or NaN. 0 for an empty array."""
    return float(np.int32(plain.peak(_at(x), _blocks(x))).view(np.float32))


def validate(fmt: Format, scales: Bytes, codes: Bytes) -> None:
    """Raises CorruptFrame unless every decoded value will be finite and of magnitude below 2^127.

    That is: scale bytes are 0 or from the format's `min_scale` to its `max_scale`; int8, int4 and int3 codes lie
    within +-q_max, ternary ones within +-1; fp32 values are below 2^126 in magnitude and bf16 values, which
    `encode` may have rounded up, at most 2^126. All int2 codes are legal. The stray code 8 of e3m0 and mxfp4
    passes: it reads as zero.
    """
    spec = fmt.spec
    if spec.scale_bytes and scales.size:
        lowest = int((scales - np.uint8(1)).min()) + 1  # 0 wraps to 256: it is legal
        highest = int(scales.max())
        if lowest < spec.min_scale or highest > spec.max_scale:
            bad = lowest if lowest < spec.min_scale else highest
            raise CorruptFrame(f"{fmt.label} scale byte {bad} is neither 0 nor in {spec.min_scale}..{spec.max_scale}")
    if not _codes_legal(fmt, codes):
        raise CorruptFrame(f"{fmt.label} codes hold a value that no encoder writes")


def encode_fragment(fmt: Format, x: Floats) -> Encoded:
    """Encode float32[n] of any length; the last block is padded with zeros. Raises UnencodableValue."""
    assert x.dtype == np.float32
    assert x.ndim == 1
    x = np.pad(x, (0, -x.size % BLOCK)) if x.size % BLOCK else np.ascontiguousarray(x)
    encoded = empty_encoded(fmt, x.size // BLOCK)
    bad = encode(fmt, x, encoded.scales, encoded.codes)
    if bad >= 0:
        raise UnencodableValue(bad)
    return encoded


def decode_fragment(encoded: Encoded) -> Floats:
    """The values: a new float32[64 * num_blocks]."""
    out = np.empty(encoded.num_blocks * BLOCK, np.float32)
    decode(encoded.format, encoded.scales, encoded.codes, out)
    return out


def empty_encoded(fmt: Format, num_blocks: int) -> Encoded:
    """Uninitialised scales and codes of so many blocks."""
    spec = fmt.spec
    return Encoded(
        fmt,
        np.empty(num_blocks * spec.scale_bytes, np.uint8),
        np.empty(num_blocks * spec.code_bytes, np.uint8),
    )


def warm_up(formats: Iterable[Format]) -> None:
    """Compile, or load from numba's cache, all that operations on these formats need, but for outer steps."""
    needed = {plain.flush, plain.peak, sum_blocks}
    needed |= {encode_difference_blocks, accumulate_into_blocks, sum_squares}
    for fmt in formats:
        loops = _LOOPS[fmt]
        needed |= {loops.encode, loops.accumulate, loops.feedback}
        if fmt in _NIBBLES:
            needed |= {plain.stray_nibbles, uniform.squares_nibble}
        if fmt is Format.TERNARY:
            needed.add(twobit.stray_pairs)
    for needed_kernel in needed:
        assert needed_kernel.address


def _accumulate_into(
    fmt: Format,
    scales: Bytes,
    codes: Bytes,
    weight: float,
    base: Floats | None,
    out: Floats,
    first_block: int,
    digest: int,
) -> int:
    blocks = _check(fmt, out, scales, codes)
    spec = fmt.spec
    scratch = np.empty(STEP * BLOCK, np.float32)
    return int(
        accumulate_into_blocks(
            _LOOPS[fmt].accumulate.address,
            digest,
            _at(scales),
            _at(codes),
            0 if base is None else _at(base),
            _at(out),
            blocks,
            spec.scale_bytes,
            spec.code_bytes,
            first_block,
            weight,
            _at(scratch) if (_at(out) | _at(scratch)) % 16 == 0 else 0,
        )
    )


def _codes_legal(fmt: Format, codes: Bytes) -> bool:
    if codes.size == 0:
        return True
    if fmt is Format.FP32:
        return bool(plain.peak(_at(codes), codes.size // fmt.spec.code_bytes) < 0x7E800000)
    if fmt is Format.BF16:
        return bool((codes.view("<u2") & 0x7FFF).max() <= 0x7E80)
    if fmt is Format.INT8:
        return bool(codes.view(np.int8).min() >= -fmt.spec.q_max)
    if fmt in _NIBBLES:
        return bool(plain.stray_nibbles(_at(codes), codes.size // fmt.spec.code_bytes, fmt.spec.q_max) == 0)
    if fmt is Format.TERNARY:
        return bool(twobit.stray_pairs(_at(codes), codes.size // fmt.spec.code_bytes) == 0)
    return True


def _check(fmt: Format, x: Floats, scales: Bytes, codes: Bytes) -> int:
    """The number of blocks, the same in all three."""
    blocks = _blocks(x)
    spec = fmt.spec
    assert scales.dtype == np.uint8
    assert codes.dtype == np.uint8
    assert scales.size == blocks * spec.scale_bytes
    assert codes.size == blocks * spec.code_bytes
    return blocks


def _blocks(x: Floats) -> int:
    assert x.dtype == np.float32
    assert x.size % BLOCK == 0
    return x.size // BLOCK


def _at(array: NDArray[Any]) -> int:
    """The address of a contiguous array."""
    assert array.flags.c_contiguous
    return array.ctypes.data


def _refused(x: Floats, block: int) -> int:
    """The index of the first refused value, which is in this block; -1 for block -1."""
    if block < 0:
        return -1
    start = block * BLOCK
    return start + int(np.argmin(np.abs(x[start : start + BLOCK]) < 2.0**126))
