"""The outer step: against torch, against the oracle bit for bit, and all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch

from diloco_proto.codec import BLOCK, Encoded, Format, UnencodableValue, encode_fragment, reference
from diloco_proto.codec.formats import Floats
from diloco_server import outer
from diloco_server.outer import FragmentState, OuterSettings, coefficients, commit

OPTIMIZERS = ("nesterov", "sgd")
FORMAT_PAIRS = [pytest.param(a, b, id=f"{a.label}-{b.label}") for a, b in product(Format, Format)]


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
    rng = np.random.default_rng(seed)
    theta, momentum = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    residual = (rng.standard_normal(n) * 1e-3).astype(np.float32)
    return FragmentState(theta, momentum * np.float32(0.01) if optimizer == "nesterov" else None, residual)


def copied(state: FragmentState) -> FragmentState:
    momentum = None if state.momentum is None else state.momentum.copy()
    return FragmentState(state.theta.copy(), momentum, state.residual.copy())


def values(n: int, count: int, seed: int = 1) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(n) * 0.01).astype(np.float32) for _ in range(count)]


def arrays_of(state: FragmentState) -> list[bytes]:
    return [a.tobytes() for a in (state.theta, state.residual, state.momentum) if a is not None]


def by_the_oracle(
    state: FragmentState, contributions: list[Encoded], weights: list[float], chosen: OuterSettings
) -> tuple[bytes, bytes]:
    """One step in plain numpy; changes the state."""
    mean = np.zeros_like(state.theta)
    for c, k in zip(contributions, coefficients(weights), strict=True):
        mean = reference.accumulate(c.format, c.scales, c.codes, float(k), mean)
    if state.momentum is None:
        u = reference.sgd(mean, state.residual, chosen.lr)
    else:
        state.momentum, u = reference.nesterov(mean, state.momentum, state.residual, chosen.momentum, chosen.lr)
    scales, codes, state.residual, state.theta = reference.encode_feedback(chosen.downlink, u, state.theta)
    return scales.tobytes(), codes.tobytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("uplink", "downlink"), FORMAT_PAIRS)
def test_equals_the_oracle_bit_for_bit(uplink: Format, downlink: Format, optimizer: str) -> None:
    n = BLOCK * (outer.STEP * 2 + 3)
    state, chosen = fresh(n, optimizer), settings(optimizer, downlink)
    oracle = copied(state)
    for step in range(3):
        contributions = [encode_fragment(uplink, x) for x in values(n, step + 1, seed=step)]
        weights = [1.0, 2.5, 0.125][: step + 1]
        update = commit(state, contributions, weights, chosen)
        assert (update.scales.tobytes(), update.codes.tobytes()) == by_the_oracle(
            oracle, contributions, weights, chosen
        )
        assert arrays_of(state) == arrays_of(oracle)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_formats_may_be_mixed(optimizer: str) -> None:
    n = BLOCK * 70
    state, chosen = fresh(n, optimizer), settings(optimizer, Format.INT4)
    oracle = copied(state)
    contributions = [encode_fragment(f, x) for f, x in zip(Format, values(n, len(Format)), strict=True)]
    weights = [float(i + 1) for i in range(len(contributions))]
    commit(state, contributions, weights, chosen)
    by_the_oracle(oracle, contributions, weights, chosen)
    assert arrays_of(state) == arrays_of(oracle)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_is_torch_sgd_when_the_downlink_is_fp32(optimizer: str) -> None:
    n, workers = BLOCK * 20, 3
    state = fresh(n, optimizer)
    state.residual[:] = 0
    if state.momentum is not None:
        state.momentum[:] = 0
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
    state = FragmentState(np.zeros(n, np.float32), None, np.zeros(n, np.float32))
    deltas = [np.full(n, v, np.float32) for v in (1.0, 4.0)]
    commit(state, [encode_fragment(Format.FP32, d) for d in deltas], [3.0, 1.0], settings("sgd", lr=1.0))
    np.testing.assert_array_equal(state.theta, np.full(n, -1.75, np.float32))
    state = FragmentState(*(np.zeros(n, np.float32) for _ in range(3)))
    commit(state, [encode_fragment(Format.FP32, deltas[0])], [7.0], settings(lr=0.5))
    np.testing.assert_allclose(state.theta, np.full(n, -0.95, np.float32))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_threads_and_cuts_do_not_matter(
    optimizer: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = BLOCK * 1000
    contributions = [encode_fragment(f, x) for f, x in zip((Format.INT4, Format.E3M0), values(n, 2), strict=True)]
    results = set()
    for task, threads in ((1 << 14, None), (1 << 14, pool), (7, pool), (64, None), (129, pool), (500, pool)):
        monkeypatch.setattr(outer, "TASK", task)
        state = fresh(n, optimizer)
        update = commit(state, contributions, [1.0, 2.0], settings(optimizer, Format.INT3), threads)
        results.add((update.scales.tobytes(), update.codes.tobytes(), *arrays_of(state)))
    assert len(results) == 1


def test_a_thread_of_the_pool_may_commit_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer, "TASK", 8)
    n = BLOCK * 200
    contribution = encode_fragment(Format.INT4, values(n, 1)[0])
    with ThreadPoolExecutor(1) as single:
        state, alone = fresh(n), fresh(n)
        single.submit(commit, state, [contribution], [1.0], settings(), single).result(timeout=30)
    commit(alone, [contribution], [1.0], settings())
    assert arrays_of(state) == arrays_of(alone)


def test_order_is_the_callers_and_weights_are_relative() -> None:
    n = BLOCK * 4
    a, b = (encode_fragment(Format.INT8, x) for x in values(n, 2))
    states = [fresh(n) for _ in range(3)]
    commit(states[0], [a, b], [1.0, 3.0], settings())
    commit(states[1], [a, b], [2.0, 6.0], settings())
    commit(states[2], [a, b], [0.0, 1e300], settings())
    assert arrays_of(states[0]) == arrays_of(states[1])
    alone = fresh(n)
    commit(alone, [b], [5.0], settings())
    assert arrays_of(states[2]) == arrays_of(alone)


def test_an_empty_fragment_is_fine() -> None:
    empty = np.empty(0, np.float32)
    state = FragmentState(empty, empty.copy(), empty.copy())
    update = commit(state, [encode_fragment(Format.INT4, empty)], [1.0], settings(downlink=Format.INT4))
    assert update.num_blocks == 0


def test_residual_makes_up_for_coarse_updates() -> None:
    """A constant gradient, much smaller than its block's largest, arrives in full over the rounds."""
    n = BLOCK
    state = FragmentState(np.zeros(n, np.float32), None, np.zeros(n, np.float32))
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
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_leaves_the_state_alone(optimizer: str, downlink: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer, "TASK", 128)
    n, at = BLOCK * 300, BLOCK * 290 + 5
    state = fresh(n, optimizer)
    before, chosen = arrays_of(state), settings(optimizer, downlink, lr=2.0)
    with pytest.raises(UnencodableValue) as error:
        commit(state, [huge(n, at, 2.0**125)], [1.0], chosen)
    assert error.value.index == at
    assert arrays_of(state) == before
    oracle = copied(state)
    usual = [encode_fragment(Format.INT4, values(n, 1)[0])]
    commit(state, usual, [1.0], chosen)
    by_the_oracle(oracle, usual, [1.0], chosen)
    assert arrays_of(state) == arrays_of(oracle)


def test_theta_and_momentum_are_kept_in_range_too() -> None:
    n, at = BLOCK * 10, 77
    state = fresh(n)
    state.theta[at] = 1.5 * 2.0**125
    before = arrays_of(state)
    with pytest.raises(UnencodableValue) as error:
        commit(state, [huge(n, at, -(2.0**124))], [1.0], settings())
    assert error.value.index == at
    assert arrays_of(state) == before
    state = fresh(n)
    assert state.momentum is not None
    state.momentum[at] = 1.5 * 2.0**125
    with pytest.raises(UnencodableValue) as error:
        commit(state, [huge(n, at, 2.0**125)], [1.0], settings(lr=2.0**-20))
    assert error.value.index == at


def test_large_steps_that_do_not_overflow_are_made() -> None:
    """Bounds alone would forbid these: the rehearsal finds that nothing overflows."""
    n = BLOCK * 200
    state, chosen = fresh(n), settings(downlink=Format.INT8, lr=1.0)
    oracle = copied(state)
    opposed = [huge(n, 9, 2.0**124.5), huge(n, 9, -(2.0**124.5))]
    for _ in range(3):
        commit(state, opposed, [1.0, 1.0], chosen)
        by_the_oracle(oracle, opposed, [1.0, 1.0], chosen)
        assert arrays_of(state) == arrays_of(oracle)


def test_nan_in_a_state_is_found() -> None:
    state = fresh(BLOCK * 3)
    state.residual[100] = np.nan
    with pytest.raises(UnencodableValue) as error:
        commit(state, [encode_fragment(Format.INT4, values(BLOCK * 3, 1)[0])], [1.0], settings())
    assert error.value.index == 100


@pytest.mark.parametrize("downlink", list(Format), ids=lambda f: f.label)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_carried_bounds_hold(optimizer: str, downlink: Format) -> None:
    n = BLOCK * 8
    rng = np.random.default_rng(0)
    state, chosen = fresh(n, optimizer), settings(optimizer, downlink, lr=1.3)
    for step in range(60):
        x = (rng.standard_t(2, n) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
        commit(state, [encode_fragment(list(Format)[step % len(Format)], x)], [1.0], chosen)
        bounds = state.bounds
        assert bounds is not None
        assert np.abs(state.theta).max() <= bounds.theta
        assert np.abs(state.residual).max() <= bounds.residual
        assert state.momentum is None or np.abs(state.momentum).max() <= bounds.momentum
    assert bounds.theta < 2.0**40  # and stay of use
