"""Every kernel against the plain numpy oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_cases import BELOW_LIMIT, legal_codes, vectors
from hypothesis import given
from hypothesis import strategies as st

from diloco_proto.codec import (
    BLOCK,
    CorruptFrame,
    Format,
    UnencodableValue,
    accumulate,
    decode,
    decode_fragment,
    encode,
    encode_feedback,
    encode_fragment,
    flush_,
    kernels,
    nesterov_,
    reference,
    sgd_,
    subtract,
    sum_of_squares,
    validate,
    warm_up,
)
from diloco_proto.codec.formats import Bytes, Floats

FORMATS = pytest.mark.parametrize("fmt", list(Format), ids=lambda f: f.label)
WITH_SCALES = [f for f in Format if f.spec.scale_bytes]
weights = st.floats(-1, 1, width=32)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up(Format)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


@FORMATS
@given(x=vectors())
def test_encode(fmt: Format, x: Floats) -> None:
    encoded = encode_fragment(fmt, x)
    scales, codes = reference.encode(fmt, x)
    assert same(encoded.scales, scales)
    assert same(encoded.codes, codes)
    validate(fmt, scales, codes)


@FORMATS
@given(data=st.data(), weight=weights)
def test_decode_accumulate_subtract(fmt: Format, data: st.DataObject, weight: float) -> None:
    scales, codes = data.draw(legal_codes(fmt))
    validate(fmt, scales, codes)
    expected = reference.decode(fmt, scales, codes)
    acc = np.random.default_rng(0).standard_normal(expected.size).astype(np.float32)
    out = np.full_like(acc, np.nan)
    decode(fmt, scales, codes, out)
    assert same(out, expected)
    assert np.abs(out).max() < 2.0**127
    theta, total = acc.copy(), acc.copy()
    subtract(fmt, scales, codes, theta)
    assert same(theta, acc - expected)
    accumulate(fmt, scales, codes, weight, total)
    assert same(total, reference.accumulate(fmt, scales, codes, weight, acc))
    assert sum_of_squares(fmt, scales, codes) == reference.sum_of_squares(fmt, scales, codes)


@FORMATS
@given(u=vectors(), seed=st.integers(0, 1000))
def test_encode_feedback(fmt: Format, u: Floats, seed: int) -> None:
    theta = np.random.default_rng(seed).standard_normal(u.size).astype(np.float32)
    wanted = reference.encode_feedback(fmt, u, theta)
    out, residual = kernels.empty_encoded(fmt, u.size // BLOCK), np.empty_like(u)
    assert encode_feedback(fmt, u, out.scales, out.codes, residual, theta) == -1
    for got, want in zip((out.scales, out.codes, residual, theta), wanted, strict=True):
        assert same(got, want)


@FORMATS
@given(x=vectors())
def test_encoding_again_gives_the_same_bytes(fmt: Format, x: Floats) -> None:
    once = encode_fragment(fmt, x)
    values = decode_fragment(once)
    if np.abs(values).max() >= 2.0**126:  # rounded up to a value that is refused
        return
    again = encode_fragment(fmt, values)
    assert same(again.scales, once.scales)
    assert same(again.codes, once.codes)


@FORMATS
@given(
    x=vectors(), bad=st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, 2.0**126, -(2.0**127)]), at=st.floats(0, 0.999)
)
def test_refuses_what_no_format_holds(fmt: Format, x: Floats, bad: float, at: float) -> None:
    index = int(at * x.size)
    x[index] = bad
    x[index + 1 :] = np.where(np.arange(x.size - index - 1) % 3 == 0, np.float32(np.nan), x[index + 1 :])
    with pytest.raises(UnencodableValue) as error:
        encode_fragment(fmt, x)
    assert error.value.index == index
    assert flush_(x.copy()) == index
    out, residual, theta = kernels.empty_encoded(fmt, x.size // BLOCK), np.zeros_like(x), np.zeros_like(x)
    assert encode(fmt, x, out.scales, out.codes) == index
    assert encode_feedback(fmt, x, out.scales, out.codes, residual, theta) == index
    assert not theta[index // BLOCK * BLOCK :].any()


@FORMATS
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_any_length_is_padded_with_zeros(fmt: Format, size: int) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    encoded = encode_fragment(fmt, x)
    padded = np.concatenate([x, np.zeros(-size % BLOCK, np.float32)])
    scales, codes = reference.encode(fmt, padded) if size else (encoded.scales, encoded.codes)
    assert encoded.num_blocks == -(-size // BLOCK)
    assert same(encoded.scales, scales)
    assert same(encoded.codes, codes)
    values = decode_fragment(encoded)
    assert values.size == padded.size
    assert not values[size:].any()
    validate(fmt, encoded.scales, encoded.codes)
    assert sum_of_squares(fmt, encoded.scales, encoded.codes) == pytest.approx(np.sum(values.astype(float) ** 2))


@FORMATS
def test_extreme_scales_are_the_stated_limits(fmt: Format) -> None:
    smallest, largest = (encode_fragment(fmt, np.full(64, v, np.float32)) for v in (2.0**-100, BELOW_LIMIT))
    if fmt.spec.scale_bytes:
        assert (smallest.scales[0], largest.scales[0]) == (fmt.spec.min_scale, fmt.spec.max_scale)
    assert np.array_equal(decode_fragment(smallest), np.full(64, 2.0**-100, np.float32))
    assert not decode_fragment(encode_fragment(fmt, np.full(64, 2.0**-100 * 0.999, np.float32))).any()


def test_codes_are_as_documented() -> None:
    x = np.zeros(64, np.float32)
    x[0], x[32], x[1], x[33] = 7, -7, 2.5, 3.5  # int4 with scale 1: ties go to 2 and 4
    encoded = encode_fragment(Format.INT4, x)
    assert encoded.scales.tolist() == [127]
    assert encoded.codes[:3].tolist() == [0x97, 0x42, 0]
    x[:4] = 1.0, 1.5, 0.75, -(2.0**-7)
    x[32], x[33] = -1.0, 2.0**-6  # e3m0: 1.5 is a tie, down; half the smallest is nothing
    encoded = encode_fragment(Format.E3M0, x)
    assert encoded.scales.tolist() == [127]
    assert encoded.codes[:4].tolist() == [0xF7, 0x17, 0x06, 0x00]
    x[:5] = 6.0, 5.0, 7.9, 0.25, -0.75
    encoded = encode_fragment(Format.MXFP4, x[:32])
    assert encoded.scales.tolist() == [127]
    assert encoded.codes[:5].tolist() == [7, 6, 7, 0, 0xA]


@FORMATS
def test_bits_a_parameter_and_frame_size(fmt: Format) -> None:
    bits = {"fp32": 32, "bf16": 16, "int8": 8.125}.get(fmt.label, 4.125)
    assert fmt.spec.bits == bits
    assert encode_fragment(fmt, np.zeros(64 * 8, np.float32)).nbytes == bits * 64
    assert fmt.spec.frame_blocks * fmt.spec.code_bytes == 2**20
    assert Format.from_label(fmt.label) is fmt


def test_unknown_format_names_the_choices() -> None:
    with pytest.raises(ValueError, match="fp32, bf16, int8, int4, int3, e3m0, mxfp4"):
        Format.from_label("INT4")


@pytest.mark.parametrize("fmt", WITH_SCALES, ids=lambda f: f.label)
def test_validate_refuses_scales(fmt: Format) -> None:
    encoded = encode_fragment(fmt, np.ones(64 * 5, np.float32))
    for byte in (0, fmt.spec.min_scale, fmt.spec.max_scale):
        encoded.scales[3] = byte
        validate(fmt, encoded.scales, encoded.codes)
    for byte in (1, fmt.spec.min_scale - 1, fmt.spec.max_scale + 1, 255):
        encoded.scales[3] = byte
        with pytest.raises(CorruptFrame, match=f"scale byte {byte} "):
            validate(fmt, encoded.scales, encoded.codes)


@pytest.mark.parametrize(
    ("fmt", "bad", "good"),
    [
        (Format.INT8, b"\x80", b"\x81"),
        (Format.INT4, b"\x08", b"\x79"),
        (Format.INT4, b"\x80", b"\x97"),
        (Format.INT3, b"\x04", b"\x3d"),
        (Format.INT3, b"\xc0", b"\xd3"),
        (Format.BF16, np.array([0x7E81, 0xFF80], "<u2").tobytes(), np.array([0x7E80, 0xFE80], "<u2").tobytes()),
        (Format.FP32, np.array([2.0**126], "<f4").tobytes(), np.array([-BELOW_LIMIT], "<f4").tobytes()),
        (Format.FP32, np.array([np.nan], "<f4").tobytes(), np.array([1e-45], "<f4").tobytes()),
        (Format.E3M0, None, b"\x88"),
        (Format.MXFP4, None, b"\x88"),
    ],
)
def test_validate_refuses_codes(fmt: Format, bad: bytes | None, good: bytes) -> None:
    encoded = encode_fragment(fmt, np.ones(64 * 3, np.float32))
    for code, legal in ((good, True), (bad, False)):
        if code is None:
            continue
        encoded.codes[-len(code) :] = np.frombuffer(code, np.uint8)
        if legal:
            validate(fmt, encoded.scales, encoded.codes)
        else:
            with pytest.raises(CorruptFrame, match=fmt.label):
                validate(fmt, encoded.scales, encoded.codes)


@given(x=vectors())
def test_flush(x: Floats) -> None:
    expected = reference.flush(x)
    assert flush_(x) == -1
    assert same(x, expected)
    assert not np.signbit(x[x == 0]).any()


@given(
    a=vectors(), seed=st.integers(0, 1000), mu=st.floats(0, 0.9990234375, width=32), lr=st.floats(0.125, 4, width=32)
)
def test_nesterov_and_sgd(a: Floats, seed: int, mu: float, lr: float) -> None:
    rng = np.random.default_rng(seed)
    a = np.clip(a, -(2.0**100), 2.0**100)
    m, e = (a * rng.standard_normal(a.size).astype(np.float32) for _ in range(2))
    acc, momentum = a.copy(), m.copy()
    nesterov_(acc, momentum, e, mu, lr)
    wanted_m, wanted_u = reference.nesterov(a, m, e, mu, lr)
    assert same(momentum, wanted_m)
    assert same(acc, wanted_u)
    acc = a.copy()
    sgd_(acc, e, lr)
    assert same(acc, reference.sgd(a, e, lr))


def test_read_only_input_and_long_arrays() -> None:
    x = np.random.default_rng(0).standard_normal(64 * 3000).astype(np.float32)
    x.flags.writeable = False
    encoded = encode_fragment(Format.INT4, x)
    codes = np.frombuffer(encoded.codes.tobytes(), np.uint8)
    out = np.empty_like(x)
    decode(Format.INT4, encoded.scales, codes, out)
    assert same(out, reference.decode(Format.INT4, encoded.scales, encoded.codes))
    wanted = reference.sum_of_squares(Format.INT4, encoded.scales, codes)
    assert sum_of_squares(Format.INT4, encoded.scales, codes) == wanted


def _cut(array: Bytes, first: int, last: int, per_block: int) -> Bytes:
    return array[first * per_block : last * per_block]


@FORMATS
def test_result_does_not_depend_on_cuts(fmt: Format) -> None:
    x = np.random.default_rng(0).standard_t(3, 64 * 100).astype(np.float32)
    whole, parts = encode_fragment(fmt, x), kernels.empty_encoded(fmt, 100)
    spec = fmt.spec
    for first, last in ((0, 1), (1, 30), (30, 31), (31, 100)):
        scales = _cut(parts.scales, first, last, spec.scale_bytes)
        assert encode(fmt, x[first * 64 : last * 64], scales, _cut(parts.codes, first, last, spec.code_bytes)) == -1
    assert same(whole.scales, parts.scales)
    assert same(whole.codes, parts.codes)


@FORMATS
@given(u=vectors(), seed=st.integers(0, 100))
def test_denormal_settings_do_not_matter(fmt: Format, u: Floats, seed: int) -> None:
    """What is published, and theta after it, are the same where denormals are taken for zeros."""
    theta = (np.random.default_rng(seed).standard_normal(u.size) * 2.0**-99).astype(np.float32)
    assert flush_(theta) == -1
    results = []
    for zero in (False, True):
        out, residual, new = kernels.empty_encoded(fmt, u.size // BLOCK), np.empty_like(u), theta.copy()
        if not torch.set_flush_denormal(zero):
            pytest.skip("this processor has no such setting")
        try:
            assert encode_feedback(fmt, u, out.scales, out.codes, residual, new) == -1
            applied = theta.copy()
            subtract(fmt, out.scales, out.codes, applied)
        finally:
            torch.set_flush_denormal(False)
        assert same(applied, new)
        results.append((out.scales.tobytes(), out.codes.tobytes(), new.tobytes()))
    assert results[0] == results[1]
