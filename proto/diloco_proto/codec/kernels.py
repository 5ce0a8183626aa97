"""The codec's operations on flat arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from diloco_proto.codec import reference
from diloco_proto.codec.errors import CorruptFrame, UnencodableValue
from diloco_proto.codec.formats import BLOCK, Bytes, Encoded, Floats, Format


def encode(fmt: Format, x: Floats, scales: Bytes, codes: Bytes) -> int:
    """Encode float32[n] into scales and codes. Returns the first refused index or -1."""
    bad = reference.first_refused(x)
    if bad < 0:
        scales[:], codes[:] = reference.encode(fmt, x)
    return bad


def decode(fmt: Format, scales: Bytes, codes: Bytes, out: Floats) -> None:
    """out[:] = the decoded values."""
    out[:] = reference.decode(fmt, scales, codes)


def accumulate(fmt: Format, scales: Bytes, codes: Bytes, weight: float, acc: Floats) -> None:
    """acc += weight * decoded."""
    acc[:] = reference.accumulate(fmt, scales, codes, weight, acc)


def subtract(fmt: Format, scales: Bytes, codes: Bytes, theta: Floats) -> None:
    """theta -= decoded."""
    theta -= reference.decode(fmt, scales, codes)


def encode_feedback(
    fmt: Format, u: Floats, scales: Bytes, codes: Bytes, residual: Floats, theta: Floats
) -> int:
    """Encode u; residual = u - decoded; theta -= decoded. Returns the first refused index or -1."""
    bad = reference.first_refused(u)
    if bad < 0:
        scales[:], codes[:], residual[:], theta[:] = reference.encode_feedback(fmt, u, theta)
    return bad


def nesterov_(acc: Floats, momentum: Floats, residual: Floats, mu: float, lr: float) -> None:
    """momentum = mu*momentum + acc; acc = lr*(acc + mu*momentum) + residual."""
    momentum[:], acc[:] = reference.nesterov(acc, momentum, residual, mu, lr)


def sgd_(acc: Floats, residual: Floats, lr: float) -> None:
    """acc = lr*acc + residual."""
    acc[:] = reference.sgd(acc, residual, lr)


def sum_of_squares(fmt: Format, scales: Bytes, codes: Bytes) -> float:
    """Sum of the squares of the decoded values, in float64."""
    return float(np.sum(reference.decode(fmt, scales, codes).astype(np.float64) ** 2))


def flush_(x: Floats) -> int:
    """Magnitudes under 2^-100 become +0, in place. Returns the first refused index or -1."""
    bad = reference.first_refused(x)
    if bad < 0:
        x[:] = reference.flush(x)
    return bad


def validate(fmt: Format, scales: Bytes, codes: Bytes) -> None:
    """Raises CorruptFrame unless scales and codes are legal in their format."""
    if scales.size and scales.max() > fmt.spec.max_scale:
        raise CorruptFrame(f"{fmt.label}: scale byte {scales.max()} is above {fmt.spec.max_scale}")


def encode_fragment(fmt: Format, x: Floats) -> Encoded:
    """Encode float32[n] of any length, padded with zeros to whole blocks. Raises UnencodableValue."""
    x = np.ascontiguousarray(np.pad(x, (0, -x.size % BLOCK)))
    blocks = x.size // BLOCK
    scales = np.empty(blocks * fmt.spec.scale_bytes, np.uint8)
    codes = np.empty(blocks * fmt.spec.code_bytes, np.uint8)
    bad = encode(fmt, x, scales, codes)
    if bad >= 0:
        raise UnencodableValue(bad)
    return Encoded(fmt, scales, codes)


def decode_fragment(encoded: Encoded) -> Floats:
    """float32[64 * num_blocks]."""
    out = np.empty(encoded.num_blocks * BLOCK, np.float32)
    decode(encoded.format, encoded.scales, encoded.codes, out)
    return out


def warm_up(formats: Iterable[Format]) -> None:
    """Compile what a process needs for these formats."""
