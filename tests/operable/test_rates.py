"""Rates of late, from samples of totals."""

from __future__ import annotations

import pytest

from diloco_server.rates import HOUR, SAMPLE_SECONDS, Rates, Totals


def steady(seconds: float, every: float = 1.0, begin: float = 1000.0) -> tuple[Rates, float, Totals]:
    """A run of two rounds, 500 tokens, 30 bytes in and 70 out a second: its rates, the time and the totals."""
    rates, now, totals = Rates(), begin, Totals()
    while now <= begin + seconds:
        gone = now - begin
        totals = Totals(int(2 * gone), int(500 * gone), int(30 * gone), int(70 * gone))
        rates.note(now, totals)
        now += every
    return rates, now - every, totals


@pytest.mark.parametrize("seconds", [20, 300, 4000, 20_000])
def test_a_steady_run_has_the_same_rates_at_any_age(seconds: float) -> None:
    means = steady(seconds)[0].means(*steady(seconds)[1:])
    assert means.rounds_per_hour == pytest.approx(7200, rel=0.01)
    assert means.tokens_per_second == pytest.approx(500, rel=0.01)
    assert means.bytes_in_per_second == pytest.approx(30, rel=0.01)
    assert means.bytes_out_per_second == pytest.approx(70, rel=0.01)
    assert means.bytes_out_per_day == pytest.approx(70 * 86400, rel=0.01)


def test_what_stands_still_has_none_after_its_window_and_is_remembered_for_an_hour() -> None:
    rates, now, totals = steady(600)
    for later in range(10, 900, 10):
        rates.note(now + later, totals)
    after = rates.means(now + 900, totals)
    assert (after.bytes_out_per_second, after.tokens_per_second, after.rounds_per_hour) == (0, 0, 0)
    assert after.bytes_out_per_day == pytest.approx(70 * 600 / 1500 * 86400, rel=0.02)


def test_a_moment_is_not_extrapolated() -> None:
    rates = Rates()
    rates.note(0.0, Totals())
    assert rates.means(0.001, Totals(rounds=1)).rounds_per_hour == HOUR / SAMPLE_SECONDS
    assert Rates().means(5.0, Totals()).rounds_per_hour == 0


def test_a_run_that_goes_on_after_a_restart_does_not_count_what_was_before() -> None:
    rates = Rates()
    before = Totals(rounds=10_000, tokens=10**9)
    rates.note(0.0, before)
    assert rates.means(30.0, before).rounds_per_hour == 0


def test_it_remembers_a_bounded_number_of_samples() -> None:
    rates, _, _ = steady(5 * HOUR, every=5.0)
    assert len(rates._samples) <= HOUR / SAMPLE_SECONDS + 2


def test_totals_that_were_taken_back_are_no_negative_rate() -> None:
    rates, now, _ = steady(60)
    assert rates.means(now, Totals()).rounds_per_hour == 0
