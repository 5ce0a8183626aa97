"""Operations made in one pass, against the same ones made one after the other, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from codec_cases import legal_codes, vectors
from hypothesis import assume, given
from hypothesis import strategies as st

from diloco_proto.codec import (
    BLOCK,
    Encoded,
    Format,
    accumulate,
    decode,
    decode_into,
    digest,
    encode,
    encode_difference,
    encode_fragment,
    reference,
    subtract,
    subtract_into,
    sum_of_squares,
    warm_up,
)
from diloco_proto.codec.formats import Floats
from diloco_proto.codec.kernels import empty_encoded
from diloco_proto.codec.passes import STEP

FORMATS = pytest.mark.parametrize("fmt", list(Format), ids=lambda f: f.label)
SIZES = pytest.mark.parametrize("blocks", [0, 1, STEP - 1, STEP, STEP + 1, 5 * STEP + 3])


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up(Format)


def noise(blocks: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(blocks * BLOCK) * 2.0 ** rng.integers(-6, 6)).astype(np.float32)


def same(a: Encoded, b: Encoded) -> bool:
    return (a.scales.tobytes(), a.codes.tobytes()) == (b.scales.tobytes(), b.codes.tobytes())


@FORMATS
@SIZES
def test_encode_difference(fmt: Format, blocks: int) -> None:
    base, local = noise(blocks, 1), noise(blocks, 2)
    out = empty_encoded(fmt, blocks)
    assert encode_difference(fmt, base, local, out.scales, out.codes) == -1
    assert same(out, encode_fragment(fmt, base - local))


@FORMATS
@SIZES
@pytest.mark.parametrize("in_place", [False, True])
def test_encode_difference_with_feedback(fmt: Format, blocks: int, in_place: bool) -> None:
    base, local, residual = noise(blocks, 1), noise(blocks, 2), noise(blocks, 3)
    u = (base - local) + residual
    wanted = encode_fragment(fmt, u)
    wanted_left = u - reference.decode(fmt, wanted.scales, wanted.codes)
    out, left_out = empty_encoded(fmt, blocks), residual if in_place else np.full_like(residual, np.nan)
    assert encode_difference(fmt, base, local, out.scales, out.codes, residual, left_out) == -1
    assert same(out, wanted)
    assert left_out.tobytes() == wanted_left.tobytes()


@FORMATS
@given(u=vectors(), seed=st.integers(0, 1000))
def test_difference_of_strange_values(fmt: Format, u: Floats, seed: int) -> None:
    base = np.random.default_rng(seed).choice([u, -u, np.zeros_like(u)], axis=0)
    delta = base - u
    assume(np.abs(delta).max() < 2.0**126)
    out, left_out = empty_encoded(fmt, u.size // BLOCK), np.empty_like(u)
    assert encode_difference(fmt, base, u, out.scales, out.codes, left_out=left_out) == -1
    assert same(out, encode_fragment(fmt, delta))
    assert left_out.tobytes() == (delta - reference.decode(fmt, out.scales, out.codes)).tobytes()


@FORMATS
@pytest.mark.parametrize("place", ["local", "residual", "difference"])
@pytest.mark.parametrize("at", [0, 63, STEP * BLOCK, (2 * STEP + 1) * BLOCK + 7])
def test_a_difference_that_no_format_holds(fmt: Format, place: str, at: int) -> None:
    base, local, residual = (noise(2 * STEP + 2, seed) for seed in (1, 2, 3))
    if place == "local":
        local[at] = np.nan
    elif place == "residual":
        residual[at] = -np.inf
    else:
        base[at], local[at] = 2.0**125, -(2.0**125)
    local[at + 1 :: 50] = np.nan
    out, left_out = empty_encoded(fmt, base.size // BLOCK), np.empty_like(base)
    assert encode_difference(fmt, base, local, out.scales, out.codes, residual, left_out) == at
    if place != "residual":
        assert encode_difference(fmt, base, local, out.scales, out.codes) == at


@FORMATS
@SIZES
@pytest.mark.parametrize("first", [0, 12345])
def test_subtract_into(fmt: Format, blocks: int, first: int) -> None:
    base, update = noise(blocks, 1), encode_fragment(fmt, noise(blocks, 2))
    wanted = base.copy()
    subtract(fmt, update.scales, update.codes, wanted)
    before, out = base.copy(), np.full_like(base, np.nan)
    assert subtract_into(fmt, update.scales, update.codes, base, out, first) == digest(wanted, first)
    assert out.tobytes() == wanted.tobytes()
    assert base.tobytes() == before.tobytes()
    assert subtract_into(fmt, update.scales, update.codes, base, base, first) == digest(wanted, first)
    assert base.tobytes() == wanted.tobytes()


@FORMATS
@given(data=st.data(), first=st.integers(0, 2**32 - 4))
def test_decode_into(fmt: Format, data: st.DataObject, first: int) -> None:
    scales, codes = data.draw(legal_codes(fmt))
    wanted = reference.decode(fmt, scales, codes)
    out = np.full_like(wanted, np.nan)
    assert decode_into(fmt, scales, codes, out, first) == digest(wanted, first)
    assert out.tobytes() == wanted.tobytes()
    theta = np.float32(0) - wanted[::-1]  # as theta has no -0
    assert subtract_into(fmt, scales, codes, theta, out, first) == digest(theta - wanted, first)
    assert out.tobytes() == (theta - wanted).tobytes()


@FORMATS
@pytest.mark.parametrize("offset", range(17))
def test_wherever_an_array_begins(fmt: Format, offset: int) -> None:
    """Arrays that begin at a multiple of 16 bytes are written past the caches, others not."""
    blocks = STEP + 2
    encoded, base = encode_fragment(fmt, noise(blocks, 1)), noise(blocks, 2)
    wanted = reference.decode(fmt, encoded.scales, encoded.codes)
    around = np.full(blocks * BLOCK + 64, 7.0, np.float32)
    out = around[offset : offset + blocks * BLOCK]
    assert decode_into(fmt, encoded.scales, encoded.codes, out) == digest(wanted)
    assert out.tobytes() == wanted.tobytes()
    assert subtract_into(fmt, encoded.scales, encoded.codes, base, out) == digest(base - wanted)
    assert out.tobytes() == (base - wanted).tobytes()
    assert (around[:offset] == 7.0).all()
    assert (around[offset + blocks * BLOCK :] == 7.0).all()


@FORMATS
def test_digests_of_parts_add_up(fmt: Format) -> None:
    """As frames come in, each is applied and digested; together they are the fragment."""
    blocks = 3 * STEP + 5
    base, update = noise(blocks, 1), encode_fragment(fmt, noise(blocks, 2))
    out, total = np.empty_like(base), 0
    for first, stop in ((0, 5), (5, 5 + STEP), (5 + STEP, blocks)):
        part, cut = update.part(first, stop), slice(first * BLOCK, stop * BLOCK)
        total += subtract_into(fmt, part.scales, part.codes, base[cut], out[cut], first)
    assert total % 2**64 == digest(out)


@FORMATS
@SIZES
def test_decode_of_many_blocks(fmt: Format, blocks: int) -> None:
    encoded = encode_fragment(fmt, noise(blocks, 1))
    out = np.full(blocks * BLOCK, np.nan, np.float32)
    decode(fmt, encoded.scales, encoded.codes, out)
    assert out.tobytes() == reference.decode(fmt, encoded.scales, encoded.codes).tobytes()
    assert sum_of_squares(fmt, encoded.scales, encoded.codes) == reference.sum_of_squares(
        fmt, encoded.scales, encoded.codes
    )


@pytest.mark.parametrize("fmt", [f for f in Format if f.spec.scale_bytes], ids=lambda f: f.label)
@given(data=st.data(), exponent=st.integers(-149, -1), sign=st.sampled_from([1.0, -1.3]))
def test_tiny_weights(fmt: Format, data: st.DataObject, exponent: int, sign: float) -> None:
    """Weight times scale may be no normal number: such products are zeros, whatever becomes of denormals."""
    scales, codes = data.draw(legal_codes(fmt))
    acc = np.random.default_rng(0).standard_normal(scales.size * BLOCK).astype(np.float32) * np.float32(2.0**-118)
    weight = float(np.float32(sign * 2.0**exponent))
    wanted = reference.accumulate(fmt, scales, codes, weight, acc)
    accumulate(fmt, scales, codes, weight, acc)
    assert acc.tobytes() == wanted.tobytes()


def test_encode_difference_reads_only() -> None:
    base, local = noise(9, 1), noise(9, 2)
    for array in (base, local):
        array.flags.writeable = False
    out, plain = (empty_encoded(Format.INT4, 9) for _ in range(2))
    assert encode_difference(Format.INT4, base, local, out.scales, out.codes) == -1
    assert encode(Format.INT4, base - local, plain.scales, plain.codes) == -1
    assert same(out, plain)
