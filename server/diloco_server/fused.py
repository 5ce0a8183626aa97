"""The compiled loop of an outer step: decode, mean, optimizer, encode and residual in one pass over the memory."""

from __future__ import annotations

from typing import Final

import numpy as np

from diloco_proto.codec import Encoded, kernels
from diloco_proto.codec.native import ADDRESS, FLOAT32, INT32, INT64, call_kernel, carray, kernel, pointer

STEP: Final = 12
"""Blocks that go through all stages together: 768 values, of which all arrays fit in the first level cache."""


def source(contribution: Encoded) -> tuple[int, int, int, int, int]:
    """What commit_blocks has to know of a contribution."""
    spec = contribution.format.spec
    scales, codes = contribution.scales, contribution.codes
    assert scales.flags.c_contiguous
    assert codes.flags.c_contiguous
    accumulate = kernels.loops_of(contribution.format).accumulate.address
    return accumulate, scales.ctypes.data, codes.ctypes.data, spec.scale_bytes, spec.code_bytes


@kernel(
    INT64,
    *(ADDRESS, ADDRESS, INT64, INT64, INT64),
    *(ADDRESS, ADDRESS, ADDRESS, ADDRESS),
    *(ADDRESS, ADDRESS, INT64, INT64),
    *(ADDRESS, INT32, INT32),
    *(ADDRESS, FLOAT32, FLOAT32, ADDRESS),
)
def commit_blocks(
    sources_at: int,
    coefficients_at: int,
    count: int,
    start: int,
    blocks: int,
    theta_at: int,
    momentum_at: int,
    residual_at: int,
    buffer_at: int,
    scales_at: int,
    codes_at: int,
    scale_bytes: int,
    code_bytes: int,
    feedback: int,
    tie: np.int32,
    shift: np.int32,
    optimizer: int,
    mu: np.float32,
    lr: np.float32,
    scratch_at: int,
) -> int:
    """Commit `blocks` blocks, of which the first is block `start` of the contributions.

    All other addresses are those of the first block's data. sources: int64[count, 5], see `source`; momentum_at
    and buffer_at are 0 where the optimizer has none; `feedback` and `optimizer` are addresses of kernels;
    scratch: float32[64*STEP]. Returns the first block whose u is refused, or -1.

    While contributions are decoded, which takes little from memory, the state of the next step is prefetched.
    """
    sources = carray(pointer(sources_at), (count, 5), np.int64)
    coefs = carray(pointer(coefficients_at), count, np.float32)
    for b in range(0, blocks, STEP):
        some = min(STEP, blocks - b)
        theta, residual = theta_at + b * 256, residual_at + b * 256
        momentum = momentum_at + b * 256 if momentum_at != 0 else residual
        next_step = STEP * 256 if b + 2 * STEP <= blocks else 0
        for i in range(count):
            ahead = next_step + (momentum if i % 3 == 0 else (residual if i % 3 == 1 else theta))
            scales = sources[i, 1] + (start + b) * sources[i, 3]
            codes = sources[i, 2] + (start + b) * sources[i, 4]
            keep = np.int32(0) if i == 0 else np.int32(-1)
            call_kernel(sources[i, 0], (scales, codes, some, coefs[i], keep, scratch_at, ahead))
        call_kernel(optimizer, (scratch_at, momentum, residual, buffer_at + b * 256, some, mu, lr))
        scales = scales_at + b * scale_bytes
        codes = codes_at + b * code_bytes
        bad = call_kernel(feedback, (scratch_at, scales, codes, residual, theta, some, tie, shift))
        if bad >= 0:
            return int(b + bad)
    return -1
