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
BY_THE_MEAN = [Format.INT2, Format.TERNARY]
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


@pytest.mark.parametrize("fmt", [f for f in Format if f not in BY_THE_MEAN], ids=lambda f: f.label)
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
@given(x=vectors())
def test_no_block_gets_an_error_larger_than_its_values(fmt: Format, x: Floats) -> None:
    """In squares: a residual cannot grow by being encoded."""
    values = x.astype(np.float64).reshape(-1, BLOCK)
    error = values - decode_fragment(encode_fragment(fmt, x)).astype(np.float64).reshape(-1, BLOCK)
    live = np.abs(values).max(axis=1) >= 2.0**-100
    assert ((error**2).sum(axis=1) <= (values**2).sum(axis=1)).all()
    assert (error == values)[~live].all()


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
    if fmt is Format.INT2:  # has no zero: half the scale instead
        assert all(v == np.ldexp(0.5, int(encoded.scales[-1]) - 127) for v in values[size:])
    else:
        assert not values[size:].any()
    validate(fmt, encoded.scales, encoded.codes)
    assert sum_of_squares(fmt, encoded.scales, encoded.codes) == pytest.approx(np.sum(values.astype(float) ** 2))


@FORMATS
def test_extreme_scales_are_the_stated_limits(fmt: Format) -> None:
    constant = np.full(64, 2.0**-100, np.float32)
    lone = np.where(np.arange(64) < 1, constant, np.float32(0))
    smallest, largest = (encode_fragment(fmt, x) for x in (lone, np.full(64, BELOW_LIMIT, np.float32)))
    if fmt.spec.scale_bytes:
        assert (smallest.scales[0], largest.scales[0]) == (fmt.spec.min_scale, fmt.spec.max_scale)
    if fmt not in BY_THE_MEAN:
        assert np.array_equal(decode_fragment(smallest), lone)
    if fmt is not Format.INT2:
        assert np.array_equal(decode_fragment(encode_fragment(fmt, constant)), constant)
    for encoded in (smallest, largest):
        values = decode_fragment(encoded).astype(np.float64)
        assert np.abs(values).max() < 2.0**127
        assert not np.fmod(values, 2.0**-123).any()
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
    x = np.full(64, 0.9375, np.float32)
    x[[0, 16, 32, 48]] = 1.0, -1.0, 0.0, np.nextafter(np.float32(1), np.float32(2))
    x[[1, 17, 33, 49]] = -0.0, -1e-45, 1e-45, np.nextafter(np.float32(-1), np.float32(0))
    encoded = encode_fragment(Format.INT2, x)
    assert encoded.scales.tolist() == [127]
    assert encoded.codes[:3].tolist() == [0b01_00_10_00, 0b11_00_11_00, 0]
    half = np.float32(0.5)
    x[[0, 16, 32, 48]] = half, -half, 0.0, np.nextafter(half, np.float32(1))
    x[[1, 17, 33, 49]] = np.nextafter(-half, np.float32(-1)), -1.75, 1.75, -0.0
    encoded = encode_fragment(Format.TERNARY, np.where(np.abs(x) == 0.9375, np.float32(0.75), x))
    assert encoded.scales.tolist() == [127]
    assert encoded.codes[:3].tolist() == [0b01_00_00_00, 0b00_01_11_11, 0b01_01_01_01]


def constant(value: float) -> Floats:
    return np.full(BLOCK, value, np.float32)


def scale_byte(fmt: Format, x: Floats) -> int:
    return int(encode_fragment(fmt, x).scales[0])


def test_scales_by_the_mean_change_where_documented() -> None:
    above = 1 + 2.0**-23
    assert [scale_byte(Format.INT2, constant(v)) for v in (1.0, 17 / 16, 17 / 16 * above, 2.0)] == [127, 127, 128, 128]
    halves = np.repeat(np.float32([0.5, 1.5]), 32)
    assert [scale_byte(Format.TERNARY, halves * np.float32(v)) for v in (7 / 8, 7 / 8 * above)] == [127, 128]
    # the bounds: a lone value, and a block of one magnitude, which must not come out as nothing
    lone = np.where(np.arange(BLOCK) == 9, np.float32(1), np.float32(0))
    assert (scale_byte(Format.INT2, lone), scale_byte(Format.TERNARY, lone)) == (124, 126)
    assert [scale_byte(Format.TERNARY, constant(v)) for v in (0.9, 1.0, above)] == [127, 127, 128]


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("fmt", BY_THE_MEAN, ids=lambda f: f.label)
def test_the_scale_rule_is_near_the_best_power_of_two(fmt: Format, kind: str) -> None:
    """5 % of the squared error is what the rule may cost on these (docs/log.md)."""
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((4000, BLOCK)) if kind == "gaussian" else rng.laplace(size=(4000, BLOCK))
    x = (unit * 2.0 ** rng.uniform(0, 1, (4000, 1))).astype(np.float32)
    encoded = encode_fragment(fmt, x.ravel())
    errors = []
    for shift in (0, -2, -1, 1, 2):
        s = np.ldexp(1.0, encoded.scales.astype(int) - 127 + shift)[:, None]
        if fmt is Format.INT2:
            nearest = np.copysign(np.where(np.abs(x) > s, 1.5, 0.5) * s, x)
        else:
            nearest = np.copysign(np.where(np.abs(x) > s / 2, s, 0), x)
        errors.append(((x - nearest) ** 2).sum(axis=1) / (x.astype(np.float64) ** 2).sum(axis=1))
    taken = x - decode_fragment(encoded).reshape(x.shape)
    assert (taken.astype(np.float64) ** 2).sum() == pytest.approx(
        (errors[0] * (x.astype(np.float64) ** 2).sum(1)).sum()
    )
    assert errors[0].mean() < 1.05 * np.min(errors, axis=0).mean()


@FORMATS
def test_bits_a_parameter_and_frame_size(fmt: Format) -> None:
    bits = {"fp32": 32, "bf16": 16, "int8": 8.125, "int2": 2.125, "ternary": 2.125}.get(fmt.label, 4.125)
    assert fmt.spec.bits == bits
    assert encode_fragment(fmt, np.zeros(64 * 8, np.float32)).nbytes == bits * 64
    assert fmt.spec.frame_blocks * fmt.spec.code_bytes == 2**20
    assert Format.from_label(fmt.label) is fmt


def test_unknown_format_names_the_choices() -> None:
    with pytest.raises(ValueError, match="fp32, bf16, int8, int4, int3, e3m0, mxfp4, int2, ternary"):
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
        (Format.INT2, None, b"\xaa"),
        *((Format.TERNARY, bytes([2 << 2 * i]), bytes([3 << 2 * i])) for i in range(4)),
        (Format.TERNARY, b"\xd9", b"\xdd\x77"),
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


@pytest.mark.parametrize("fmt", [Format.INT4, Format.INT3], ids=lambda f: f.label)
def test_validate_looks_at_every_nibble(fmt: Format) -> None:
    scales, codes = np.full(2, 127, np.uint8), np.zeros(64, np.uint8)
    for at in range(codes.size):
        for byte in range(256):
            codes[at] = byte
            nibbles = (byte & 15, byte >> 4)
            if all((n ^ 8) - 8 in range(-fmt.spec.q_max, fmt.spec.q_max + 1) for n in nibbles):
                validate(fmt, scales, codes)
            else:
                with pytest.raises(CorruptFrame):
                    validate(fmt, scales, codes)
        codes[at] = 0x11 * (at % fmt.spec.q_max)


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
