"""The outer optimizers and the commit of a round: pure arrays, in place, one pass over the memory.

    m <- mu*m + g              g = sum of coef_i * decode(c_i),  coef_i = float32(w_i / sum of w)
    u <- lr*(g + mu*m) + e     q = encode(u)     e <- u - decode(q)     theta <- theta - decode(q)

"nesterov" is torch.optim.SGD(nesterov=True), as in DiLoCo (arXiv 2311.08105), on the mean of the contributions;
"sgd" has no momentum: u <- lr*g + e. The quantized update is what is applied, so theta is what every worker
that applies the same update holds; what quantization left out stays in the residual e for the next round.

All arithmetic is float32, one rounding an operation, contributions in the order given. A momentum under 2^-100
becomes zero. The bits do not depend on the number of threads or on how the work is cut.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diloco_proto.codec import BLOCK, Encoded, Format, UnencodableValue, kernels
from diloco_proto.codec.formats import Floats
from diloco_proto.codec.native import ADDRESS, FLOAT32, INT32, INT64, call_kernel, carray, kernel, pointer
from diloco_proto.codec.plain import nesterov, sgd

LIMIT: Final = 2.0**126
"""No value of the state may reach it: no format could hold it."""
STEP: Final = 12
"""Blocks that go through all stages together: 768 values, of which all arrays fit in the first level cache."""
TASK: Final = 1 << 14
"""Blocks a thread takes at a time: a million values, about a millisecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSettings:
    """What an outer step is made of."""

    optimizer: str
    """"nesterov", or "sgd" (plain, without momentum)."""
    lr: float
    momentum: float
    """In [0, 1); not used by "sgd"."""
    downlink: Format
    """How the update is encoded."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Upper bounds of the magnitudes in a state's arrays, and of the u of the step that led there."""

    theta: float
    momentum: float
    residual: float
    update: float = 0.0

    def after(self, mean: float, mu: float, lr: float) -> Bounds:
        """The bounds after a step on a mean of at most this magnitude.

        The slack covers the float32 roundings. Every format has a code within |u|/2 of u, zero at the least
        for what is flushed; so |u - decoded| <= |u|/2 and |decoded| <= 1.5*|u|.
        """
        slack = 1.001
        momentum = slack * (mu * self.momentum + mean)
        update = slack * (lr * (mean + mu * momentum) + self.residual)
        return Bounds(slack * (self.theta + 1.5 * update), momentum, update / 2 + 2.0**-100, update)

    def safe(self) -> bool:
        """False if a value may have overflowed, or is none."""
        return all(b < LIMIT for b in (self.theta, self.momentum, self.residual, self.update))


@dataclass(slots=True)
class FragmentState:
    """A fragment's global parameters and its optimizer's state. `commit` changes the arrays in place.

    float32[n] each, contiguous, n a multiple of 64: 12 bytes a parameter, 8 without momentum.
    """

    theta: Floats
    momentum: Floats | None
    """None for "sgd"."""
    residual: Floats
    bounds: Bounds | None = field(default=None, init=False, repr=False)
    """Kept up to date by `commit`. Set to None after writing larger values to the arrays by other means."""

    def measure(self) -> Bounds:
        """The bounds, taken from the arrays."""
        momentum = 0.0 if self.momentum is None else kernels.largest_magnitude(self.momentum)
        return Bounds(kernels.largest_magnitude(self.theta), momentum, kernels.largest_magnitude(self.residual))


def commit(
    state: FragmentState,
    contributions: Sequence[Encoded],
    weights: Sequence[float],
    settings: OuterSettings,
    threads: Executor | None = None,
) -> Encoded:
    """One outer step on the weighted mean of the contributions; returns the update, already subtracted from theta.

    Contributions cover the fragment, are legal (`codec.validate`, as every frame read is) and may be in
    different formats. Their order matters to the last bit: the caller sorts them. Weights are >= 0 and not all
    zero. With `threads` the executor's idle threads help; the caller may be one of them.

    Raises UnencodableValue, before anything of the state has changed, if the step would make a value of the
    state or of the update NaN, infinite or of magnitude 2^126 or more; its index is that of the first such
    value. How it knows: bounds of the magnitudes in the state are carried from step to step, and the
    contributions' come from their scales, at next to no cost. Only when these leave the possibility of an
    overflow, which takes contributions near 2^100, the step is first rehearsed on copies of a million values at
    a time.
    """
    step = _Step(state, contributions, weights, settings)
    before = state.bounds or state.measure()
    mean = sum(abs(float(k)) * _largest(c) for k, c in zip(step.coefficients, contributions, strict=True))
    mu = 0.0 if state.momentum is None else settings.momentum
    bounds = before.after(mean, mu, settings.lr)
    if not bounds.safe():
        bounds = state.measure().after(mean, mu, settings.lr)
    certain = bounds.safe()
    starts = range(0, step.num_blocks, TASK)
    if not certain:
        for start in starts:
            step.rehearse(start)
    _spread(step.run, starts, threads)
    state.bounds = bounds if certain else None
    return step.update


def _spread(work: Callable[[int], None], starts: Sequence[int], threads: Executor | None) -> None:
    """Call work(start) for each start, here and on threads that are free. It cannot wait for one that is not."""
    todo = deque(starts)

    def drain() -> None:
        while True:
            try:
                start = todo.popleft()
            except IndexError:
                return
            work(start)

    count = 0 if threads is None else min(len(starts), os.cpu_count() or 1) - 1
    helpers = [threads.submit(drain) for _ in range(count)] if threads is not None else []
    try:
        drain()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def coefficients(weights: Sequence[float]) -> list[np.float32]:
    """w_i / sum(w), the sum in order and all in float64, rounded to float32."""
    total = sum(float(w) for w in weights)
    assert total > 0
    return [np.float32(w / total) for w in weights]


def warm_up(formats: Iterable[Format]) -> None:
    """Compile, or load from numba's cache, what commits with these formats need."""
    kernels.warm_up(formats)
    assert _commit_blocks.address


class _Step:
    """One outer step, which can be done range by range of blocks, in any order and by several threads."""

    def __init__(
        self,
        state: FragmentState,
        contributions: Sequence[Encoded],
        weights: Sequence[float],
        settings: OuterSettings,
    ) -> None:
        n = state.theta.size
        arrays = [state.theta, state.residual, *([] if state.momentum is None else [state.momentum])]
        assert all(a.dtype == np.float32 and a.flags.c_contiguous and a.size == n for a in arrays)
        assert n % BLOCK == 0
        assert (settings.optimizer == "sgd") == (state.momentum is None)
        assert contributions
        self.num_blocks = n // BLOCK
        assert all(c.num_blocks == self.num_blocks for c in contributions)
        self.coefficients = np.array(coefficients(weights), np.float32)
        self.update = kernels.empty_encoded(settings.downlink, self.num_blocks)
        self._state = state
        self._settings = settings
        self._sources = np.array([_source(c) for c in contributions], np.int64)
        self._alive = contributions  # the addresses in _sources point into their arrays

    def run(self, start: int) -> None:
        """Commit up to TASK blocks from block `start` on."""
        blocks = min(TASK, self.num_blocks - start)
        state, part = self._state, slice(start * BLOCK, (start + blocks) * BLOCK)
        momentum = None if state.momentum is None else state.momentum[part]
        scratch = np.empty(STEP * BLOCK, np.float32)
        bad = self._run(start, blocks, state.theta[part], momentum, state.residual[part], scratch)
        assert bad < 0

    def rehearse(self, start: int) -> None:
        """Commit the same blocks on copies. Raises UnencodableValue if a value comes out too large."""
        blocks = min(TASK, self.num_blocks - start)
        state, part = self._state, slice(start * BLOCK, (start + blocks) * BLOCK)
        theta, residual = state.theta[part].copy(), state.residual[part].copy()
        momentum = None if state.momentum is None else state.momentum[part].copy()
        scratch = np.empty(STEP * BLOCK, np.float32)
        bad = self._run(start, blocks, theta, momentum, residual, scratch)
        if bad >= 0:  # scratch holds the u of the step in which it stopped
            offset = bad % STEP * BLOCK
            index = bad * BLOCK + _first_over(scratch[offset : offset + BLOCK])
            raise UnencodableValue(start * BLOCK + index)
        found = [_first_over(a) for a in (theta, residual, momentum) if a is not None]
        if max(found) >= 0:
            raise UnencodableValue(start * BLOCK + min(i for i in found if i >= 0))

    def _run(
        self, start: int, blocks: int, theta: Floats, momentum: Floats | None, residual: Floats, scratch: Floats
    ) -> int:
        fmt = self._settings.downlink
        spec, loops = fmt.spec, kernels.loops_of(fmt)
        bad = _commit_blocks(
            self._sources.ctypes.data,
            self.coefficients.ctypes.data,
            len(self._sources),
            start,
            blocks,
            theta.ctypes.data,
            0 if momentum is None else momentum.ctypes.data,
            residual.ctypes.data,
            self.update.scales.ctypes.data + start * spec.scale_bytes,
            self.update.codes.ctypes.data + start * spec.code_bytes,
            spec.scale_bytes,
            spec.code_bytes,
            loops.feedback.address,
            loops.tie,
            loops.shift,
            sgd.address if momentum is None else nesterov.address,
            self._settings.momentum,
            self._settings.lr,
            scratch.ctypes.data,
        )
        return int(bad)


def _source(contribution: Encoded) -> tuple[int, int, int, int, int]:
    """What _commit_blocks has to know of a contribution."""
    spec = contribution.format.spec
    scales, codes = contribution.scales, contribution.codes
    assert scales.flags.c_contiguous
    assert codes.flags.c_contiguous
    accumulate = kernels.loops_of(contribution.format).accumulate.address
    return accumulate, scales.ctypes.data, codes.ctypes.data, spec.scale_bytes, spec.code_bytes


def _largest(contribution: Encoded) -> float:
    """A bound of the decoded magnitudes."""
    fmt, spec = contribution.format, contribution.format.spec
    if contribution.num_blocks == 0:
        return 0.0
    if spec.scale_bytes:
        return float(spec.top * 2.0 ** (int(contribution.scales.max()) - 127))
    if fmt is Format.FP32:
        return kernels.largest_magnitude(contribution.codes.view(np.float32))
    bits = (contribution.codes.view("<u2") & 0x7FFF).max().astype(np.uint32)
    return float((bits << np.uint32(16)).view(np.float32))


def _first_over(x: Floats) -> int:
    """Index of the first value that is NaN or not under the limit, or -1."""
    fine: NDArray[np.bool_] = np.abs(x) < LIMIT
    return -1 if fine.all() else int(np.argmin(fine))


@kernel(
    INT64,
    *(ADDRESS, ADDRESS, INT64, INT64, INT64),
    *(ADDRESS, ADDRESS, ADDRESS),
    *(ADDRESS, ADDRESS, INT64, INT64),
    *(ADDRESS, INT32, INT32),
    *(ADDRESS, FLOAT32, FLOAT32, ADDRESS),
)
def _commit_blocks(
    sources_at: int,
    coefficients_at: int,
    count: int,
    start: int,
    blocks: int,
    theta_at: int,
    momentum_at: int,
    residual_at: int,
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

    All other addresses are those of the first block's data. sources: int64[count, 5], see _source; momentum_at
    is 0 for sgd; `feedback` and `optimizer` are addresses of kernels; scratch: float32[64*STEP]. Returns the
    first block whose u is refused, or -1.

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
        if momentum_at != 0:
            call_kernel(optimizer, (scratch_at, momentum, residual, some, mu, lr))
        else:
            call_kernel(optimizer, (scratch_at, residual, some, lr))
        scales = scales_at + b * scale_bytes
        codes = codes_at + b * code_bytes
        bad = call_kernel(feedback, (scratch_at, scales, codes, residual, theta, some, tie, shift))
        if bad >= 0:
            return int(b + bad)
    return -1
