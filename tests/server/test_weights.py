"""How much contributions count."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from diloco_server.weights import MAX_WEIGHT, Weights


@dataclass(frozen=True)
class Work:
    tokens: int = 100
    since_version: int = 0
    norm: float = 1.0


def make(*, uniform: bool = False, max_norm: float = 0.0) -> Weights:
    return Weights(uniform=uniform, max_norm=max_norm)


def test_a_mean_is_weighed_by_tokens() -> None:
    assert make().of_round([Work(10), Work(20), Work(30)]) == (10.0, 20.0, 30.0)
    assert make(uniform=True).of_round([Work(10), Work(20), Work(30)]) == (1.0, 1.0, 1.0)


def test_nobody_weighs_more_than_twice_the_median() -> None:
    assert make().of_round([Work(10), Work(20), Work(1000)]) == (10.0, 20.0, MAX_WEIGHT * 20)


def test_equal_asynchronous_steps_weigh_one_however_stale_all_are() -> None:
    weights = make()
    for version in range(10):
        assert weights.of_step(Work(since_version=version), version + 3) == pytest.approx(1.0)
        weights.counted([Work(since_version=version)], (1.0,), version + 3)


def test_a_staler_step_weighs_less_and_one_with_fewer_tokens_too() -> None:
    weights = make()
    for version in range(9):
        weights.counted([Work(since_version=version)], (1.0,), version)
    assert weights.of_step(Work(since_version=10), 13) == pytest.approx(0.5)
    assert weights.of_step(Work(25, since_version=20), 20) == pytest.approx(0.25)
    assert weights.of_step(Work(100_000, since_version=20), 20) == MAX_WEIGHT


def test_a_norm_far_beyond_the_usual_is_scaled_down_to_the_limit() -> None:
    weights = make(max_norm=10.0)
    weights.counted([Work()] * 20, (1.0,) * 20, 0)
    assert weights.scales([Work(norm=9.0), Work(norm=40.0)]) == (1.0, pytest.approx(0.25))
    assert make(max_norm=0.0).scales([Work(norm=1e30)]) == (1.0,)


def test_more_work_may_have_a_larger_norm() -> None:
    weights = make(max_norm=10.0)
    weights.counted([Work(100)] * 20, (1.0,) * 20, 0)
    assert weights.scales([Work(400, norm=39.0), Work(400, norm=80.0)]) == (1.0, pytest.approx(0.5))
    assert weights.scales([Work(1, norm=9.0), Work(1, norm=20.0)]) == (1.0, pytest.approx(0.5)), "less work, not less"


def test_contributions_of_nothing_set_no_limit() -> None:
    weights = make(max_norm=10.0)
    weights.counted([Work(norm=0.0)] * 20, (1.0,) * 20, 0)
    assert weights.scales([Work(norm=0.0), Work(norm=0.0)]) == (1.0, 1.0)
    assert weights.scales([Work(norm=3.0), Work(norm=0.0)]) == (1.0, 1.0)


def test_the_first_round_is_protected_by_its_own_median() -> None:
    scales = make(max_norm=10.0).scales([Work(norm=1.0), Work(norm=1.2), Work(norm=1e30)])
    assert scales == (1.0, 1.0, pytest.approx(1.2e-29))


def test_what_was_scaled_down_does_not_become_the_usual() -> None:
    weights = make(max_norm=10.0)
    for _ in range(100):
        members = [Work(norm=1.0), Work(norm=1.0), Work(norm=1e6)]
        scales = weights.scales(members)
        weights.counted(members, scales, 0)
    assert scales == (1.0, 1.0, pytest.approx(1e-5))
