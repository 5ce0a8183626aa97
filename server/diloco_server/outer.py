"""The outer optimizers and the commit of a round: pure arrays."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from diloco_proto.codec import (
    BLOCK,
    Encoded,
    Format,
    UnencodableValue,
    accumulate,
    encode_feedback,
    nesterov_,
    sgd_,
)
from diloco_proto.codec.formats import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSettings:
    """What the outer step is made of."""

    optimizer: str
    """"nesterov", or "sgd" (plain, without momentum)."""
    lr: float
    momentum: float
    downlink: Format


@dataclass(slots=True)
class FragmentState:
    """A fragment's global parameters and its optimizer's state, float32[n] each; commit changes them in place."""

    theta: Floats
    momentum: Floats | None
    """None for "sgd"."""
    residual: Floats


def coefficients(weights: Sequence[float]) -> list[np.float32]:
    """w_i / sum(w), computed in float64, rounded to float32."""
    total = sum(float(w) for w in weights)
    assert total > 0
    return [np.float32(w / total) for w in weights]


def commit(
    state: FragmentState,
    contributions: Sequence[Encoded],
    weights: Sequence[float],
    settings: OuterSettings,
    threads: Executor | None = None,
) -> Encoded:
    """One outer step; returns the update, which has been subtracted from theta."""
    n = state.theta.size
    acc = np.zeros(n, np.float32)
    for c, w in zip(contributions, coefficients(weights), strict=True):
        accumulate(c.format, c.scales, c.codes, float(w), acc)
    if state.momentum is None:
        sgd_(acc, state.residual, settings.lr)
    else:
        nesterov_(acc, state.momentum, state.residual, settings.momentum, settings.lr)
    spec = settings.downlink.spec
    scales = np.empty(n // BLOCK * spec.scale_bytes, np.uint8)
    codes = np.empty(n // BLOCK * spec.code_bytes, np.uint8)
    bad = encode_feedback(settings.downlink, acc, scales, codes, state.residual, state.theta)
    if bad >= 0:
        raise UnencodableValue(bad)
    return Encoded(settings.downlink, scales, codes)
