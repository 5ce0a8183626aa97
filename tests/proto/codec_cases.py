"""Inputs on which codecs go wrong, for the tests of the kernels."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from diloco_proto.codec import BLOCK, Format
from diloco_proto.codec.formats import Bytes, Floats

BELOW_LIMIT = float(np.nextafter(np.float32(2.0**126), np.float32(0)))

TIES = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.5, 3.0, 3.5, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 63.5, 126.5, 127.0]

scales = st.integers(-149, 125)

single_values = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-BELOW_LIMIT, BELOW_LIMIT, width=32),
    st.builds(
        lambda t, e, s: s * np.ldexp(t, e), st.sampled_from(TIES), st.integers(-140, 118), st.sampled_from([1, -1])
    ),
    st.sampled_from([0.0, -0.0, 2.0**-100, -(2.0**-100), 2.0**-101, 1e-45, BELOW_LIMIT, -BELOW_LIMIT]),
)


@st.composite
def vectors(draw: st.DrawFn, max_blocks: int = 3) -> Floats:
    """float32[64 * 1..max_blocks]: values of one size a block, so that every code occurs, and a few strange ones."""
    blocks = draw(st.integers(1, max_blocks))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = np.empty((blocks, BLOCK))
    for row in x:
        row[:] = _block(
            draw(st.sampled_from(["normal", "ties", "grid", "constant", "mean", "zero", "sparse", "lone", "bits"])),
            draw(scales),
            rng,
        )
    flat = x.ravel()
    for value in draw(st.lists(single_values, max_size=4)):
        flat[rng.integers(flat.size)] = value
    return np.clip(flat, -BELOW_LIMIT, BELOW_LIMIT).astype(np.float32)


def _block(kind: str, exponent: int, rng: np.random.Generator) -> np.ndarray:
    unit = np.ldexp(1.0, exponent)
    if kind == "normal":
        return rng.standard_normal(BLOCK) * unit
    if kind == "ties":
        return rng.choice([-1, 1], BLOCK) * rng.choice(TIES, BLOCK) * unit
    if kind == "grid":  # multiples of a small step: ties of every format, bf16's too
        step = rng.choice([8, 32, 256])
        return rng.integers(-5 * step, 5 * step, BLOCK, endpoint=True) / step * unit
    if kind == "constant":
        return np.full(BLOCK, rng.standard_normal() * unit)
    if kind == "mean":  # at, or next to, where int2 and ternary change their scale
        step = np.spacing(np.float32(1)) * rng.integers(-1, 2)
        return rng.permutation(np.repeat([0.5, 1.5], 32)) * rng.choice([17 / 16, 7 / 8, 1]) * (1 + step) * unit
    if kind == "lone":
        return np.where(np.arange(BLOCK) < rng.integers(1, 5), rng.standard_normal(BLOCK), 0.0) * unit
    if kind == "sparse":
        return np.where(rng.random(BLOCK) < 0.1, rng.standard_t(2, BLOCK), -0.0) * unit
    if kind == "bits":
        bits = rng.integers(0, 2**32, BLOCK, dtype=np.uint32)
        values = bits.view(np.float32)
        return np.where(np.abs(values) < 2.0**126, values, np.float32(1))
    return np.zeros(BLOCK)


@st.composite
def legal_codes(draw: st.DrawFn, fmt: Format) -> tuple[Bytes, Bytes]:
    """(scales, codes) of 1..3 blocks: anything that passes `validate`, stray codes of zero blocks included."""
    spec = fmt.spec
    blocks = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if not spec.scale_bytes:
        bits = rng.integers(0, 2**32, blocks * BLOCK, dtype=np.uint32)
        values = np.where(np.abs(bits.view(np.float32)) < 2.0**126, bits.view(np.float32), np.float32(-0.0))
        codes = values.view(np.uint8) if fmt is Format.FP32 else values.view(np.uint16)[1::2].copy().view(np.uint8)
        return np.empty(0, np.uint8), codes
    bytes_ = st.one_of(
        st.just(0), st.sampled_from([spec.min_scale, spec.max_scale]), st.integers(spec.min_scale, spec.max_scale)
    )
    scale = np.array(draw(st.lists(bytes_, min_size=blocks, max_size=blocks)), np.uint8)
    if fmt is Format.INT8:
        return scale, rng.integers(-127, 128, blocks * 64).astype(np.int8).view(np.uint8)
    if fmt is Format.INT2:
        return scale, rng.integers(0, 256, blocks * 16).astype(np.uint8)
    if fmt is Format.TERNARY:
        crumbs = rng.choice([0, 1, 3], (4, blocks * 16))
        return scale, sum(crumbs[i] << 2 * i for i in range(4)).astype(np.uint8)
    low, high = (-spec.q_max, spec.q_max + 1) if spec.q_max else (0, 16)
    nibbles = rng.integers(low, high, (2, blocks * 32)) & 15
    return scale, (nibbles[0] | nibbles[1] << 4).astype(np.uint8)
