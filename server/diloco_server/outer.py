"""The outer optimizers and the commit of a round: pure arrays, in place, one pass over the memory.

    g = sum of coef_i * decode(c_i)        coef_i = float32(scale_i * w_i / sum of w)
    u = what the optimizer makes of g      q = encode(u)     e <- u - decode(q)     theta <- theta - decode(q)

"nesterov" is torch.optim.SGD(nesterov=True), as in DiLoCo (arXiv 2311.08105), on the mean of the contributions;
"sgd" has no momentum:

    nesterov    m <- mu*m + g     u <- lr*(g + mu*m) + e
    sgd         u <- lr*g + e

"delayed-nesterov" (arXiv 2401.09135, c = 0) makes a step of every single contribution, of relative weight w; its
momentum takes a step with every N-th, so that N steps together are one Nesterov step on their mean:

    a = coef * decode(c)          coef = float32(scale * w / N)
    not the N-th    b <- b + a                              u <- lr*a + e
    the N-th        m <- mu*m + (b + a)     b <- 0          u <- lr*(a + mu*m) + e

The quantized update is what is applied, so theta is what every worker that applies the same update holds; what
quantization left out stays in the residual e for the next step.

All arithmetic is float32, one rounding an operation, contributions in the order given. A momentum m or a buffer b
under 2^-100 becomes zero. The bits do not depend on the number of threads or on how the work is cut.
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
from diloco_proto.codec.digest import sum_blocks
from diloco_proto.codec.formats import Floats
from diloco_proto.codec.native import Kernel
from diloco_proto.codec.plain import delayed_push, delayed_step, nesterov, sgd

from .fused import STEP, commit_blocks, source

DELAYED: Final = "delayed-nesterov"

LIMIT: Final = 2.0**126
"""No value of the state may reach it: no format could hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSettings:
    """What an outer step is made of."""

    optimizer: str
    """"nesterov", "sgd" (plain, without momentum) or "delayed-nesterov" (each contribution a step of its own)."""
    lr: float
    momentum: float
    """In [0, 1); not used by "sgd"."""
    downlink: Format
    """How the update is encoded; not int2 or ternary."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Upper bounds of the magnitudes in a state's arrays, and of the u of the step that led there."""

    theta: float
    momentum: float
    residual: float
    buffer: float = 0.0
    update: float = 0.0

    def after(self, g: float, mu: float, lr: float, last: bool = True) -> Bounds:
        """The bounds after a step on a g of at most this magnitude. `last`: the momentum takes a step.

        The slack covers the float32 roundings. Every format of updates has a code within |u|/2 of u, zero at the
        least for what is flushed; so |u - decoded| <= |u|/2 and |decoded| <= 1.5*|u|.
        """
        slack = 1.001
        momentum, buffer, push = self.momentum, slack * (self.buffer + g), 0.0
        if last:
            momentum, buffer = slack * (mu * momentum + buffer), 0.0
            push = mu * momentum
        update = slack * (lr * (g + push) + self.residual)
        return Bounds(slack * (self.theta + 1.5 * update), momentum, update / 2 + 2.0**-100, buffer, update)

    def safe(self) -> bool:
        """False if a value may have overflowed, or is none."""
        return all(b < LIMIT for b in (self.theta, self.momentum, self.residual, self.buffer, self.update))


@dataclass(slots=True)
class FragmentState:
    """A fragment's global parameters and its optimizer's state. `commit` changes the arrays in place.

    float32[n] each, contiguous, n a multiple of 64: 12 bytes a parameter, 8 for "sgd", 16 for "delayed-nesterov".
    """

    theta: Floats
    momentum: Floats | None
    """None for "sgd"."""
    residual: Floats
    buffer: Floats | None = None
    """Sum since the last momentum step; only for "delayed-nesterov", as are the two counters."""
    buffered: int = 0
    """Contributions since the last momentum step."""
    window: int = 1
    """N of the current window; of no meaning while `buffered` is 0."""
    digest: int = field(default=0, init=False)
    """Of theta, since the last `commit`."""
    bounds: Bounds | None = field(default=None, init=False, repr=False)
    """Kept up to date by `commit`. Set to None after writing larger values to the arrays by other means."""

    def measure(self) -> Bounds:
        """The bounds, taken from the arrays."""
        arrays = (self.theta, self.momentum, self.residual, self.buffer)
        return Bounds(*(0.0 if a is None else kernels.largest_magnitude(a) for a in arrays))

    def arrays(self) -> dict[str, Floats]:
        """By name, those that this optimizer has."""
        named = {"theta": self.theta, "momentum": self.momentum, "residual": self.residual, "buffer": self.buffer}
        return {name: array for name, array in named.items() if array is not None}

    def part(self, cut: slice) -> FragmentState:
        """A range of the arrays, as views."""
        momentum = None if self.momentum is None else self.momentum[cut]
        buffer = None if self.buffer is None else self.buffer[cut]
        return FragmentState(self.theta[cut], momentum, self.residual[cut], buffer)

    def copy(self) -> FragmentState:
        """With arrays of its own."""
        momentum = None if self.momentum is None else self.momentum.copy()
        buffer = None if self.buffer is None else self.buffer.copy()
        return FragmentState(self.theta.copy(), momentum, self.residual.copy(), buffer, self.buffered, self.window)


def commit(
    state: FragmentState,
    contributions: Sequence[Encoded],
    weights: Sequence[float],
    settings: OuterSettings,
    take: Callable[[int, Encoded], None],
    threads: Executor | None = None,
    *,
    blocks: int,
    scales: Sequence[float] | None = None,
    delay: int = 1,
) -> None:
    """One outer step on the weighted mean of the contributions.

    take(first block, part) gets the update, already subtracted from theta: `blocks` blocks at a time, while they are in
    the cache; from all threads, in any order. The new theta's digest is in the state.

    Contributions cover the fragment, are legal (`codec.validate`, as every frame read is) and may be in
    different formats. Their order matters to the last bit: the caller sorts them. Weights are >= 0 and not all
    zero. `scales` (default all 1) shrink single contributions and leave the others' shares as they are. With
    `threads` the executor's idle threads help; the caller may be one of them.

    "delayed-nesterov" takes one contribution at a time; its weight is relative to the usual one. `delay`, its N,
    is heeded when a window begins and holds until its end.

    Raises UnencodableValue, before anything of the state has changed or been taken, if the step would make a value of
    the state or of the update NaN, infinite or of magnitude 2^126 or more; its index is that of the first such
    value. How it knows: bounds of the magnitudes in the state are carried from step to step, and the
    contributions' come from their scales, at next to no cost. Only when these leave the possibility of an
    overflow, which takes contributions near 2^100, the step is first rehearsed on copies of so many blocks.
    """
    delayed = settings.optimizer == DELAYED
    assert delay >= 1
    assert len(contributions) == 1 or not delayed
    window = state.window if state.buffered else delay
    last = not delayed or state.buffered + 1 >= window
    shares = coefficients(weights, scales, float(window) if delayed else None)
    step = _Step(state, contributions, shares, settings, last, blocks)
    bounds = (state.bounds or state.measure()).after(*step.magnitudes)
    if not bounds.safe():
        bounds = state.measure().after(*step.magnitudes)
    certain = bounds.safe()
    if not certain:
        for start in step.starts:
            step.rehearse(start)
    spread(lambda start: take(start, step.run(start)), step.starts, threads)
    state.digest = step.digest
    state.bounds = bounds if certain else None
    if delayed:
        state.window, state.buffered = window, 0 if last else state.buffered + 1


def spread(work: Callable[[int], None], starts: Sequence[int], threads: Executor | None) -> None:
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


def coefficients(
    weights: Sequence[float], scales: Sequence[float] | None = None, total: float | None = None
) -> list[np.float32]:
    """scale_i * w_i / total, in float64 and rounded to float32; total is the sum of w, in order, if not given."""
    whole = sum(float(w) for w in weights) if total is None else total
    assert whole > 0
    by = [1.0] * len(weights) if scales is None else scales
    return [np.float32(s * w / whole) for s, w in zip(by, weights, strict=True)]


def warm_up(formats: Iterable[Format]) -> None:
    """Compile, or load from numba's cache, what commits with these formats need."""
    kernels.warm_up(formats)
    for needed in (commit_blocks, sgd, nesterov, delayed_push, delayed_step):
        assert needed.address


class _Step:
    """One outer step, which can be done range by range of blocks, in any order and by several threads."""

    def __init__(
        self,
        state: FragmentState,
        contributions: Sequence[Encoded],
        shares: Sequence[np.float32],
        settings: OuterSettings,
        last: bool,
        blocks: int,
    ) -> None:
        """`blocks`: of a range."""
        n = state.theta.size
        assert all(a.dtype == np.float32 and a.flags.c_contiguous and a.size == n for a in _arrays(state))
        assert n % BLOCK == 0
        assert (settings.optimizer == "sgd") == (state.momentum is None)
        assert (settings.optimizer == DELAYED) == (state.buffer is not None)
        assert settings.downlink not in (Format.INT2, Format.TERNARY)
        assert contributions
        assert all(c.num_blocks * BLOCK == n for c in contributions)
        g = sum(abs(float(k)) * _largest(c) for k, c in zip(shares, contributions, strict=True))
        mu = 0.0 if state.momentum is None else settings.momentum
        self.magnitudes = (g, mu, settings.lr, last)
        """What the bounds after the step depend on."""
        self.starts = range(0, n // BLOCK, blocks)
        """First block of each range."""
        self._state = state
        self._settings = settings
        self._optimizer = _optimizer(state, last)
        self._coefficients = np.array(shares, np.float32)
        self._sources = np.array([source(c) for c in contributions], np.int64)
        self._digests = np.zeros(len(self.starts), np.uint64)
        self._alive = contributions  # the addresses in _sources point into their arrays

    def run(self, start: int) -> Encoded:
        """Commit the range that begins at block `start`; returns its part of the update."""
        part, scratch = self._part(start), np.empty(STEP * BLOCK, np.float32)
        update = kernels.empty_encoded(self._settings.downlink, part.theta.size // BLOCK)
        bad = self._run(start, part, update, scratch, self._digests[start // self.starts.step :])
        assert bad < 0
        return update

    @property
    def digest(self) -> int:
        """Of theta, once all has been run."""
        return int(self._digests.sum())

    def rehearse(self, start: int) -> None:
        """Commit the same range on copies. Raises UnencodableValue if a value comes out too large."""
        part, scratch = self._part(start).copy(), np.empty(STEP * BLOCK, np.float32)
        update = kernels.empty_encoded(self._settings.downlink, part.theta.size // BLOCK)
        bad = self._run(start, part, update, scratch, np.zeros(1, np.uint64))
        if bad >= 0:  # scratch holds the u of the step in which it stopped
            offset = bad % STEP * BLOCK
            index = bad * BLOCK + _first_over(scratch[offset : offset + BLOCK])
            raise UnencodableValue(start * BLOCK + index)
        found = [_first_over(a) for a in _arrays(part)]
        if max(found) >= 0:
            raise UnencodableValue(start * BLOCK + min(i for i in found if i >= 0))

    def _part(self, start: int) -> FragmentState:
        return self._state.part(slice(start * BLOCK, (start + self.starts.step) * BLOCK))

    def _run(
        self, start: int, part: FragmentState, update: Encoded, scratch: Floats, digest: NDArray[np.uint64]
    ) -> int:
        fmt = self._settings.downlink
        spec, loops = fmt.spec, kernels.loops_of(fmt)
        bad = commit_blocks(
            self._sources.ctypes.data,
            self._coefficients.ctypes.data,
            len(self._sources),
            start,
            update.num_blocks,
            part.theta.ctypes.data,
            0 if part.momentum is None else part.momentum.ctypes.data,
            part.residual.ctypes.data,
            0 if part.buffer is None else part.buffer.ctypes.data,
            update.scales.ctypes.data,
            update.codes.ctypes.data,
            spec.scale_bytes,
            spec.code_bytes,
            loops.feedback.address,
            loops.tie,
            loops.shift,
            self._optimizer.address,
            self._settings.momentum,
            self._settings.lr,
            scratch.ctypes.data,
            sum_blocks.address,
            digest.ctypes.data,
        )
        return int(bad)


def _optimizer(state: FragmentState, last: bool) -> Kernel:
    if state.momentum is None:
        return sgd
    if state.buffer is None:
        return nesterov
    return delayed_step if last else delayed_push


def _arrays(state: FragmentState) -> list[Floats]:
    return [a for a in (state.theta, state.momentum, state.residual, state.buffer) if a is not None]


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
