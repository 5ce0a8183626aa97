"""The compiled loop of an outer step: decode, mean, optimizer, encode and residual in one pass over the memory."""

from __future__ import annotations

from typing import Final

import numpy as np

from diloco_proto.codec import Encoded, kernels
from diloco_proto.codec.native import ADDRESS, FLOAT32, INT32, INT64, call_kernel, carray, kernel, pointer, prefetch

STEP: Final = 6
"""Blocks that go through all stages together: few enough that the processor begins with one stage while it still
computes another."""


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
    *(ADDRESS, ADDRESS),
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
    digest: int,
    digest_at: int,
) -> int:
    """Commit `blocks` blocks, of which the first is block `start` of the contributions.

    All other addresses are those of the first block's data. sources: int64[count, 5], see `source`; momentum_at
    and buffer_at are 0 where the optimizer has none; `feedback` and `optimizer` are addresses of kernels;
    scratch: float32[64*STEP]; `digest` is the kernel `sum_blocks`, whose sum over the new theta is added to uint64[1]
    at digest_at. Returns the first block whose u is refused, or -1.

    While contributions are decoded, which takes little from memory, the state is on its way into the cache.
    """
    sources = carray(pointer(sources_at), (count, 5), np.int64)
    coefs = carray(pointer(coefficients_at), count, np.float32)
    scratch = carray(pointer(scratch_at), STEP * 64, np.float32)
    total = carray(pointer(digest_at), 1, np.uint64)
    for b in range(0, blocks, STEP):
        some = min(STEP, blocks - b)
        theta, residual = theta_at + b * 256, residual_at + b * 256
        momentum = momentum_at + b * 256 if momentum_at != 0 else residual
        for line in range(0, some * 256, 64):
            prefetch(momentum + line)
            prefetch(residual + line)
            prefetch(theta + line)
        for i in range(some * 64):
            scratch[i] = np.float32(0)
        for i in range(count):
            scales = sources[i, 1] + (start + b) * sources[i, 3]
            codes = sources[i, 2] + (start + b) * sources[i, 4]
            call_kernel(sources[i, 0], (scales, codes, some, coefs[i], scratch_at))
        call_kernel(optimizer, (scratch_at, momentum, residual, buffer_at + b * 256, some, mu, lr))
        scales = scales_at + b * scale_bytes
        codes = codes_at + b * code_bytes
        bad = call_kernel(feedback, (scratch_at, scales, codes, residual, theta, some, tie, shift))
        if bad >= 0:
            return int(b + bad)
        total[0] += np.uint64(call_kernel(digest, (theta, some, start + b)))
    return -1
