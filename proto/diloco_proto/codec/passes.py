"""Kernels that take several operations over the memory in one pass, for all formats. See `kernels` for their rules.

A few blocks at a time go through all operations while they are in the first-level cache. The operations themselves are
other kernels, called by their addresses.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from diloco_proto.codec.native import (
    ADDRESS,
    FLOAT32,
    FLOAT64,
    INT32,
    INT64,
    UINT64,
    call_kernel,
    carray,
    fence,
    kernel,
    pointer,
    prefetch,
    squares_of_block,
    stream_block,
)
from diloco_proto.codec.pieces import f32

STEP: Final = 4
"""Blocks at a time, 1 KiB of each array: few enough that the processor begins with the next ones meanwhile."""


@kernel(INT64, *(ADDRESS,) * 8, *(INT64,) * 3, INT32, INT32, ADDRESS)
def encode_difference_blocks(
    encode: int,
    feedback: int,
    base_at: int,
    local_at: int,
    residual_at: int,
    left_out_at: int,
    scales_at: int,
    codes_at: int,
    blocks: int,
    scale_bytes: int,
    code_bytes: int,
    tie: np.int32,
    shift: np.int32,
    scratch_at: int,
) -> int:
    """Encode u = base - local, or (base - local) + residual where residual_at is not 0. Returns as encode does.

    Where left_out_at is not 0, also left_out = u - decoded; it may be residual. scratch: float32[2*64*STEP], of which
    the second half holds numbers: `feedback` subtracts what it decodes from something.
    """
    for b in range(0, blocks, STEP):
        some = min(STEP, blocks - b)
        base = carray(pointer(base_at + b * 256), some * 64, f32)
        local = carray(pointer(local_at + b * 256), some * 64, f32)
        u = carray(pointer(scratch_at), some * 64, f32)
        for i in range(some * 64):
            u[i] = base[i] - local[i]
        if residual_at != 0:
            residual = carray(pointer(residual_at + b * 256), some * 64, f32)
            for i in range(some * 64):
                u[i] += residual[i]
        scales, codes = scales_at + b * scale_bytes, codes_at + b * code_bytes
        if left_out_at != 0:
            left_out, nothing = left_out_at + b * 256, scratch_at + STEP * 256
            bad = call_kernel(feedback, (scratch_at, scales, codes, left_out, nothing, some, tie, shift))
        else:
            bad = call_kernel(encode, (scratch_at, scales, codes, some, tie, shift))
        if bad >= 0:
            return int(b + bad)
    return -1


@kernel(UINT64, *(ADDRESS,) * 6, *(INT64,) * 4, FLOAT32, ADDRESS)
def accumulate_into_blocks(
    accumulate: int,
    digest: int,
    scales_at: int,
    codes_at: int,
    base_at: int,
    out_at: int,
    blocks: int,
    scale_bytes: int,
    code_bytes: int,
    first_block: int,
    weight: np.float32,
    scratch_at: int,
) -> np.uint64:
    """out = base + weight*decoded, or weight*decoded where base_at is 0; base may be out. Returns the digest of out,
    whose first block is block `first_block` of its fragment, or 0 where `digest` is 0. scratch: float32[64*STEP]. Where
    it is not 0, and out not base, out is only written, and so past the caches."""
    total = np.uint64(0)
    stream = scratch_at != 0 and base_at != out_at
    for b in range(0, blocks, STEP):
        some = min(STEP, blocks - b)
        here = scratch_at if stream else out_at + b * 256
        out = carray(pointer(here), some * 64, f32)
        if base_at != 0:
            for line in range(0, some * 256, 64):
                prefetch(base_at + (b + STEP) * 256 + line)
        if base_at == 0:
            for i in range(some * 64):
                out[i] = f32(0)
        elif base_at != out_at:
            base = carray(pointer(base_at + b * 256), some * 64, f32)
            for i in range(some * 64):
                out[i] = base[i]
        scales, codes = scales_at + b * scale_bytes, codes_at + b * code_bytes
        call_kernel(accumulate, (scales, codes, some, weight, here))
        if digest != 0:
            total += np.uint64(call_kernel(digest, (here, some, first_block + b)))
        if stream:
            for i in range(some):
                stream_block(out_at + (b + i) * 256, here + i * 256)
    fence()
    return total


@kernel(FLOAT64, *(ADDRESS,) * 3, *(INT64,) * 3, ADDRESS)
def sum_squares(
    accumulate: int, scales_at: int, codes_at: int, blocks: int, scale_bytes: int, code_bytes: int, scratch_at: int
) -> np.float64:
    """The sum of the squares of each block, in the order of the blocks. scratch: float32[64*STEP]."""
    total = np.float64(0)
    scratch = carray(pointer(scratch_at), STEP * 64, f32)
    for b in range(0, blocks, STEP):
        some = min(STEP, blocks - b)
        for i in range(some * 64):
            scratch[i] = f32(0)
        scales, codes = scales_at + b * scale_bytes, codes_at + b * code_bytes
        call_kernel(accumulate, (scales, codes, some, f32(1), scratch_at))
        for i in range(some):
            total += squares_of_block(scratch_at + i * 256)
    return total
