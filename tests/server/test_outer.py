"""The outer step: against torch, against the oracle bit for bit, and all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from whole_update import commit

from diloco_proto.codec import BLOCK, Encoded, Format, UnencodableValue, digest, encode_fragment, reference
from diloco_proto.codec.formats import Floats
from diloco_server import outer
from diloco_server.config import DOWNLINK
from diloco_server.fused import STEP
from diloco_server.outer import DELAYED, FragmentState, OuterSettings, coefficients

OPTIMIZERS = ("nesterov", "sgd", DELAYED)
MEANS = ("nesterov", "sgd")
"""Those that make a step of several contributions."""
DOWNLINKS = [Format.from_label(label) for label in DOWNLINK]
FORMAT_PAIRS = [pytest.param(a, b, id=f"{a.label}-{b.label}") for a, b in product(Format, DOWNLINKS)]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    outer.warm_up(Format)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as executor:
        yield executor


def settings(optimizer: str = "nesterov", downlink: Format = Format.FP32, lr: float = 0.7) -> OuterSettings:
    return OuterSettings(optimizer=optimizer, lr=lr, momentum=0.9, downlink=downlink)


def fresh(n: int, optimizer: str = "nesterov", seed: int = 0) -> FragmentState:
    """In the middle of training; of delayed Nesterov between two windows."""
    rng = np.random.default_rng(seed)
    theta, momentum = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    residual = (rng.standard_normal(n) * 1e-3).astype(np.float32)
    buffer = np.zeros(n, np.float32) if optimizer == DELAYED else None
    return FragmentState(theta, None if optimizer == "sgd" else momentum * np.float32(0.01), residual, buffer)


def blank(n: int, optimizer: str = "nesterov") -> FragmentState:
    """Before the first step, with theta zero."""
    state = fresh(n, optimizer)
    for array in (state.theta, state.momentum, state.residual):
        if array is not None:
            array[:] = 0
    return state


def values(n: int, count: int, seed: int = 1) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(n) * 0.01).astype(np.float32) for _ in range(count)]


def contents(state: FragmentState) -> list[object]:
    arrays = (state.theta, state.residual, state.momentum, state.buffer)
    counters = (state.buffered, state.window if state.buffered else 0)
    return [*(a.tobytes() for a in arrays if a is not None), *counters]


def by_the_oracle(
    state: FragmentState,
    contributions: list[Encoded],
    weights: list[float],
    chosen: OuterSettings,
    *,
    scales: list[float] | None = None,
    delay: int = 1,
) -> tuple[bytes, bytes]:
    """One step in plain numpy; changes the state."""
    if state.buffered == 0:
        state.window = delay
    total = float(state.window) if chosen.optimizer == DELAYED else None
    g = np.zeros_like(state.theta)
    for c, k in zip(contributions, coefficients(weights, scales, total), strict=True):
        g = reference.accumulate(c.format, c.scales, c.codes, float(k), g)
    mu, lr, e = chosen.momentum, chosen.lr, state.residual
    if state.momentum is None:
        u = reference.sgd(g, e, lr)
    elif state.buffer is None:
        state.momentum, u = reference.nesterov(g, state.momentum, e, mu, lr)
    else:
        state.buffered = (state.buffered + 1) % state.window
        last = state.buffered == 0
        state.momentum, state.buffer, u = reference.delayed_nesterov(g, state.momentum, state.buffer, e, mu, lr, last)
    scale_bytes, codes, state.residual, state.theta = reference.encode_feedback(chosen.downlink, u, state.theta)
    return scale_bytes.tobytes(), codes.tobytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("uplink", "downlink"), FORMAT_PAIRS)
def test_equals_the_oracle_bit_for_bit(uplink: Format, downlink: Format, optimizer: str) -> None:
    n = BLOCK * (STEP * 2 + 3)
    state, chosen = fresh(n, optimizer), settings(optimizer, downlink)
    oracle = state.copy()
    for step in range(3):
        count = 1 if optimizer == DELAYED else step + 1
        contributions = [encode_fragment(uplink, x) for x in values(n, count, seed=step)]
        weights, scales = [1.0, 2.5, 0.125][:count], [0.75, 1.0, 1.0][:count]
        update = commit(state, contributions, weights, chosen, scales=scales, delay=2)
        expected = by_the_oracle(oracle, contributions, weights, chosen, scales=scales, delay=2)
        assert (update.scales.tobytes(), update.codes.tobytes()) == expected
        assert contents(state) == contents(oracle)
        assert state.digest == digest(oracle.theta)


@pytest.mark.parametrize("optimizer", MEANS)
def test_formats_may_be_mixed(optimizer: str) -> None:
    n = BLOCK * 70
    state, chosen = fresh(n, optimizer), settings(optimizer, Format.INT4)
    oracle = state.copy()
    contributions = [encode_fragment(f, x) for f, x in zip(Format, values(n, len(Format)), strict=True)]
    weights = [float(i + 1) for i in range(len(contributions))]
    commit(state, contributions, weights, chosen)
    by_the_oracle(oracle, contributions, weights, chosen)
    assert contents(state) == contents(oracle)


@pytest.mark.parametrize("optimizer", MEANS)
def test_is_torch_sgd_when_the_downlink_is_fp32(optimizer: str) -> None:
    n, workers = BLOCK * 20, 3
    state = blank(n, optimizer)
    parameter = torch.nn.Parameter(torch.from_numpy(state.theta.copy()))
    momentum = 0.9 if optimizer == "nesterov" else 0.0
    torch_outer = torch.optim.SGD([parameter], lr=0.7, momentum=momentum, nesterov=optimizer == "nesterov")
    for step in range(6):
        deltas = values(n, workers, seed=step)
        commit(state, [encode_fragment(Format.FP32, d) for d in deltas], [1.0] * workers, settings(optimizer))
        parameter.grad = torch.from_numpy(np.mean(deltas, axis=0))
        torch_outer.step()
        np.testing.assert_allclose(state.theta, parameter.detach().numpy(), rtol=2e-6, atol=2e-7)
    if state.momentum is not None:
        buffer = torch_outer.state[parameter]["momentum_buffer"].numpy()
        np.testing.assert_allclose(state.momentum, buffer, rtol=2e-6, atol=2e-7)
    assert not state.residual.any()


def test_special_cases_of_diloco() -> None:
    """Outer SGD with lr 1 is federated averaging; one worker's first Nesterov step moves 1.9 lr delta."""
    n = BLOCK
    state = blank(n, "sgd")
    deltas = [np.full(n, v, np.float32) for v in (1.0, 4.0)]
    commit(state, [encode_fragment(Format.FP32, d) for d in deltas], [3.0, 1.0], settings("sgd", lr=1.0))
    np.testing.assert_array_equal(state.theta, np.full(n, -1.75, np.float32))
    state = blank(n)
    commit(state, [encode_fragment(Format.FP32, deltas[0])], [7.0], settings(lr=0.5))
    np.testing.assert_allclose(state.theta, np.full(n, -0.95, np.float32))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_threads_and_cuts_do_not_matter(optimizer: str, pool: ThreadPoolExecutor) -> None:
    n = BLOCK * 1000
    contributions = [encode_fragment(f, x) for f, x in zip((Format.INT4, Format.E3M0), values(n, 2), strict=True)]
    results = set()
    for blocks, threads in ((None, None), (None, pool), (7, pool), (64, None), (129, pool), (500, pool)):
        state, chosen = fresh(n, optimizer), settings(optimizer, Format.INT3)
        for each in [[c] for c in contributions] if optimizer == DELAYED else [contributions]:
            update = commit(state, each, [1.0, 2.0][: len(each)], chosen, threads, delay=2, blocks=blocks)
        results.add((update.scales.tobytes(), update.codes.tobytes(), *contents(state)))
    assert len(results) == 1


def test_the_update_comes_in_parts() -> None:
    state, whole = fresh(BLOCK * 11), fresh(BLOCK * 11)
    contribution, taken = encode_fragment(Format.INT4, values(BLOCK * 11, 1)[0]), {}
    outer.commit(state, [contribution], [1.0], settings(), taken.__setitem__, blocks=4)
    update = commit(whole, [contribution], [1.0], settings())
    assert {first: part.num_blocks for first, part in taken.items()} == {0: 4, 4: 4, 8: 3}
    assert b"".join(taken[first].codes.tobytes() for first in sorted(taken)) == update.codes.tobytes()


def test_a_thread_of_the_pool_may_commit_with_the_pool() -> None:
    n = BLOCK * 200
    contribution = encode_fragment(Format.INT4, values(n, 1)[0])
    with ThreadPoolExecutor(1) as single:
        state, alone = fresh(n), fresh(n)
        single.submit(commit, state, [contribution], [1.0], settings(), single, blocks=8).result(timeout=30)
    commit(alone, [contribution], [1.0], settings())
    assert contents(state) == contents(alone)


def test_order_is_the_callers_and_weights_are_relative() -> None:
    n = BLOCK * 4
    a, b = (encode_fragment(Format.INT8, x) for x in values(n, 2))
    states = [fresh(n) for _ in range(3)]
    commit(states[0], [a, b], [1.0, 3.0], settings())
    commit(states[1], [a, b], [2.0, 6.0], settings())
    commit(states[2], [a, b], [0.0, 1e300], settings())
    assert contents(states[0]) == contents(states[1])
    alone = fresh(n)
    commit(alone, [b], [5.0], settings())
    assert contents(states[2]) == contents(alone)


def test_an_empty_fragment_is_fine() -> None:
    empty = np.empty(0, np.float32)
    state = FragmentState(empty, empty.copy(), empty.copy())
    update = commit(state, [encode_fragment(Format.INT4, empty)], [1.0], settings(downlink=Format.INT4))
    assert update.num_blocks == 0


def test_residual_makes_up_for_coarse_updates() -> None:
    """A constant gradient, much smaller than its block's largest, arrives in full over the rounds."""
    n = BLOCK
    state = blank(n, "sgd")
    delta = np.full(n, 0.01, np.float32)
    delta[0] = 1.0
    for _ in range(100):
        commit(state, [encode_fragment(Format.FP32, delta)], [1.0], settings("sgd", Format.INT3, lr=1.0))
    np.testing.assert_allclose(state.theta[1:], -1.0, atol=0.26)
    np.testing.assert_allclose(state.theta[1:] - state.residual[1:], -1.0, rtol=1e-3)


def test_momentum_of_untouched_values_ends_at_zero() -> None:
    n = BLOCK
    state = FragmentState(*(np.full(n, v, np.float32) for v in (1.0, 2.0**-95, 0.0)))
    nothing = encode_fragment(Format.INT4, np.zeros(n, np.float32))
    for _ in range(40):
        commit(state, [nothing], [1.0], settings(downlink=Format.INT4))
    assert state.momentum is not None
    assert not state.momentum.any()


def huge(n: int, at: int, value: float) -> Encoded:
    x = values(n, 1)[0]
    x[at] = value
    return encode_fragment(Format.FP32, x)


@pytest.mark.parametrize("downlink", [Format.FP32, Format.INT4, Format.E3M0], ids=lambda f: f.label)
@pytest.mark.parametrize(
    ("optimizer", "before"), [("nesterov", 0), ("sgd", 0), (DELAYED, 0), (DELAYED, 1), (DELAYED, 2)]
)
def test_an_overflow_leaves_the_state_alone(optimizer: str, before: int, downlink: Format) -> None:
    n, at = BLOCK * 300, BLOCK * 290 + 5
    state, chosen = fresh(n, optimizer), settings(optimizer, downlink, lr=8.0)
    usual = [encode_fragment(Format.INT4, values(n, 1)[0])]
    for _ in range(before):
        commit(state, usual, [1.0], chosen, delay=3)
    oracle, was = state.copy(), contents(state)
    taken: dict[int, Encoded] = {}
    with pytest.raises(UnencodableValue) as error:
        # in its third range
        outer.commit(state, [huge(n, at, 2.0**125)], [1.0], chosen, taken.__setitem__, delay=3, blocks=128)
    assert error.value.index == at
    assert contents(state) == was
    assert not taken
    commit(state, usual, [1.0], chosen, delay=2)
    by_the_oracle(oracle, usual, [1.0], chosen, delay=2)
    assert contents(state) == contents(oracle)


def test_the_whole_state_is_kept_in_range() -> None:
    n, at = BLOCK * 10, 77
    state = fresh(n)
    state.theta[at] = 1.5 * 2.0**125
    before = contents(state)
    with pytest.raises(UnencodableValue) as error:
        commit(state, [huge(n, at, -(2.0**124))], [1.0], settings())
    assert error.value.index == at
    assert contents(state) == before
    state, delayed = fresh(n), fresh(n, DELAYED)
    assert state.momentum is not None
    assert delayed.buffer is not None
    state.momentum[at] = delayed.buffer[at] = 1.5 * 2.0**125
    for each, optimizer in ((state, "nesterov"), (delayed, DELAYED)):
        with pytest.raises(UnencodableValue) as error:
            commit(each, [huge(n, at, 2.0**125)], [2.0], settings(optimizer, lr=2.0**-20), delay=2)
        assert error.value.index == at


def test_large_steps_that_do_not_overflow_are_made() -> None:
    """Bounds alone would forbid these: the rehearsal finds that nothing overflows."""
    n = BLOCK * 200
    state, chosen = fresh(n), settings(downlink=Format.INT8, lr=1.0)
    oracle = state.copy()
    opposed = [huge(n, 9, 2.0**124.5), huge(n, 9, -(2.0**124.5))]
    for _ in range(3):
        commit(state, opposed, [1.0, 1.0], chosen)
        by_the_oracle(oracle, opposed, [1.0, 1.0], chosen)
        assert contents(state) == contents(oracle)


def test_nan_in_a_state_is_found() -> None:
    state = fresh(BLOCK * 3)
    state.residual[100] = np.nan
    with pytest.raises(UnencodableValue) as error:
        commit(state, [encode_fragment(Format.INT4, values(BLOCK * 3, 1)[0])], [1.0], settings())
    assert error.value.index == 100


@pytest.mark.parametrize("downlink", DOWNLINKS, ids=lambda f: f.label)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_carried_bounds_hold(optimizer: str, downlink: Format) -> None:
    n = BLOCK * 8
    rng = np.random.default_rng(0)
    state, chosen = fresh(n, optimizer), settings(optimizer, downlink, lr=1.3)
    for step in range(60):
        x = (rng.standard_t(2, n) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
        commit(state, [encode_fragment(list(Format)[step % len(Format)], x)], [1.0], chosen, delay=4)
        bounds = state.bounds
        assert bounds is not None
        assert np.abs(state.theta).max() <= bounds.theta
        assert np.abs(state.residual).max() <= bounds.residual
        assert state.momentum is None or np.abs(state.momentum).max() <= bounds.momentum
        assert state.buffer is None or np.abs(state.buffer).max() <= bounds.buffer
    assert bounds.theta < 2.0**40  # and stay of use


# -- scales --


def test_a_scale_shrinks_one_contribution_and_no_others() -> None:
    n = BLOCK * 4
    a, b = values(n, 2)
    scaled, halved = fresh(n), fresh(n)
    commit(scaled, [encode_fragment(Format.FP32, x) for x in (a, b)], [1.0, 3.0], settings(), scales=[1.0, 0.5])
    commit(halved, [encode_fragment(Format.FP32, x) for x in (a, b / 2)], [1.0, 3.0], settings())
    assert contents(scaled) == contents(halved)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_scaled_down_does_not_overflow(optimizer: str) -> None:
    n, at = BLOCK * 4, 77
    state = blank(n, optimizer)
    commit(state, [huge(n, at, 2.0**120)], [1.0], settings(optimizer, lr=1.0), scales=[2.0**-119])
    assert state.theta[at] == np.float32(-2.0 if optimizer == "sgd" else -3.8)
    assert state.bounds is not None
    assert state.bounds.theta < 8, "it needs no rehearsal"


# -- delayed Nesterov --


@hypothesis(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 6), max_size=4),
    meanwhile=st.integers(1, 6),
    mu=st.sampled_from([0.0, 0.5, 0.9]),
    lr=st.sampled_from([0.4, 1.0]),
)
def test_the_steps_of_a_window_are_one_nesterov_step(sizes: list[int], meanwhile: int, mu: float, lr: float) -> None:
    """On their mean. N is what is wished when the window begins, whatever is wished meanwhile."""
    state = blank(BLOCK, DELAYED)
    chosen = OuterSettings(optimizer=DELAYED, lr=lr, momentum=mu, downlink=Format.FP32)
    parameter = torch.nn.Parameter(torch.zeros(BLOCK))
    torch_outer = torch.optim.SGD([parameter], lr=lr, momentum=mu, nesterov=mu > 0)
    for seed, size in enumerate(sizes):
        deltas = values(BLOCK, size, seed)
        for i, delta in enumerate(deltas):
            commit(state, [encode_fragment(Format.FP32, delta)], [1.0], chosen, delay=meanwhile if i else size)
        parameter.grad = torch.from_numpy(np.mean(deltas, axis=0))
        torch_outer.step()
        np.testing.assert_allclose(state.theta, parameter.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_a_window_of_one_is_nesterov_bit_for_bit() -> None:
    n = BLOCK * 20
    delayed, plain = fresh(n, DELAYED), fresh(n)
    for step in range(4):
        one = [encode_fragment(Format.INT4, values(n, 1, seed=step)[0])]
        commit(delayed, one, [1.0], settings(DELAYED, Format.INT4), delay=1)
        commit(plain, one, [7.0], settings("nesterov", Format.INT4))
    assert delayed.momentum is not None
    assert plain.momentum is not None
    assert delayed.theta.tobytes() == plain.theta.tobytes()
    assert delayed.momentum.tobytes() == plain.momentum.tobytes()


def test_every_contribution_moves_theta_by_its_weight() -> None:
    n = BLOCK
    state, ones = blank(n, DELAYED), [encode_fragment(Format.FP32, np.ones(n, np.float32))]
    moved = []
    for weight in (1.0, 0.5, 2.0, 0.5):
        before = state.theta[0]
        commit(state, ones, [weight], settings(DELAYED, lr=0.5), delay=4)
        moved.append(float(before - state.theta[0]))
    np.testing.assert_allclose(moved, [0.125, 0.0625, 0.25, 0.0625 + 0.5 * 0.9])


def test_a_buffer_holds_no_denormals() -> None:
    n = BLOCK
    state, tiny = blank(n, DELAYED), [encode_fragment(Format.FP32, np.full(n, 2.0**-100, np.float32))]
    for _ in range(3):
        commit(state, tiny, [1.0], settings(DELAYED), delay=1000)
    assert state.buffer is not None
    assert not state.buffer.any()
