"""When rounds close, what they count, and what becomes of contributions that come twice, late or different."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_proto.codec import Encoded, Format
from diloco_proto.errors import InvalidContribution, NotReady
from diloco_server.round import Close, Contribution, Key, Stage
from diloco_server.rounds import KEPT_RECORDS, Rounds
from diloco_server.weights import Weights

NOTHING = Encoded(Format.FP32, np.empty(0, np.uint8), np.empty(0, np.uint8))
INF = float("inf")


def rounds_of(expected: str = "", *, fragments: int = 1, version: int = 0, **changes) -> Rounds:
    """Rounds opened at time 0 with one expected worker a letter."""
    uniform = changes.pop("uniform", True)
    weights = [Weights(uniform=uniform, max_norm=0.0) for _ in range(fragments)]
    rounds = Rounds(weights, **({"min_workers": 1, "grace": INF} | changes))
    for fragment in range(fragments):
        rounds.open(fragment, version, expected, 0.0)
    return rounds


def contribution(worker: str, *, fragment: int = 0, base: int = 0, digest: int = 1, **fields) -> Contribution:
    settings = {"tokens": 1, "steps": 1, "since_version": 0, "norm": 1.0, "arrived": 0.0} | fields
    key = Key(fragment, base, worker)
    return Contribution(key=key, frames={0: digest, 4096: digest + 1}, payload=NOTHING, **settings)


def stage(rounds: Rounds, workers: str, now: float = 0.0, **fields) -> None:
    for worker in workers:
        assert rounds.stage(contribution(worker, **fields), now) is Stage.STAGED


def members(closes: list[Close]) -> list[str]:
    return ["".join(c.key.worker_id for c in close.contributions) for close in closes]


def close_and_reopen(rounds: Rounds, expected: str, now: float) -> Close:
    (close,) = rounds.due(now)
    rounds.committed(close, now)
    rounds.open(close.fragment, close.base_version + 1, expected, now)
    return close


def test_a_round_closes_when_nobody_is_missing() -> None:
    rounds = rounds_of("abc")
    stage(rounds, "ca")
    assert rounds.due(1e9) == []
    stage(rounds, "b")
    assert members(rounds.due(0.0)) == ["abc"]
    assert rounds.due(0.0) == [], "each close is handed out once"


def test_the_members_of_a_close_are_in_worker_order_with_their_weights() -> None:
    rounds = rounds_of("abc", uniform=False)
    for worker, tokens in zip("cab", (3, 1, 2), strict=True):
        stage(rounds, worker, tokens=tokens)
    (close,) = rounds.due(0.0)
    assert [c.key.worker_id for c in close.contributions] == ["a", "b", "c"]
    assert close.weights == (1.0, 2.0, 3.0)
    record = rounds.committed(close, 5.0)
    assert {m.worker_id: m.weight for m in record.members} == pytest.approx({"a": 1 / 6, "b": 2 / 6, "c": 3 / 6})
    assert record.version == 1
    assert record.open_seconds == 5.0


def test_uniform_weights() -> None:
    rounds = rounds_of("ab")
    stage(rounds, "a", tokens=1)
    stage(rounds, "b", tokens=1000)
    assert rounds.due(0.0)[0].weights == (1.0, 1.0)


def test_no_worker_weighs_more_than_twice_the_median() -> None:
    rounds = rounds_of("abcde", uniform=False)
    for worker, tokens in zip("abcde", (100, 120, 80, 2**63, 90), strict=True):
        stage(rounds, worker, tokens=tokens)
    assert rounds.due(0.0)[0].weights == (100.0, 120.0, 80.0, 200.0, 90.0)


@settings(deadline=None)
@given(st.permutations("abcde"))
def test_a_close_does_not_depend_on_the_order_of_arrival(order: list[str]) -> None:
    def close(arrivals: str) -> tuple:
        rounds = rounds_of("abcde", uniform=False)
        for now, worker in enumerate(arrivals):
            stage(rounds, worker, float(now), tokens=ord(worker))
        (found,) = rounds.due(9.0)
        return [c.key for c in found.contributions], found.weights

    assert close("".join(order)) == close("abcde")


# -- quorum, grace, floor --


def test_the_grace_begins_with_the_quorum() -> None:
    rounds = rounds_of("abcde", grace=10.0)
    stage(rounds, "ab", now=1.0)
    assert rounds.next_deadline() is None
    stage(rounds, "c", now=7.0)
    assert rounds.next_deadline() == 17.0
    assert rounds.due(16.9) == []
    assert members(rounds.due(17.0)) == ["abc"]


def test_the_quorum_is_half_of_the_expected_and_no_fewer_than_min_workers() -> None:
    rounds = rounds_of("abcd", grace=1.0, min_workers=3)
    stage(rounds, "ab")
    assert rounds.due(100.0) == []
    stage(rounds, "c", now=100.0)
    assert rounds.due(100.5) == []
    assert members(rounds.due(101.0)) == ["abc"]


def test_no_grace_at_all() -> None:
    rounds = rounds_of("abcd", grace=0.0)
    stage(rounds, "a")
    assert rounds.due(0.0) == []
    stage(rounds, "b")
    assert members(rounds.due(0.0)) == ["ab"]


def test_an_infinite_grace_waits_for_ever() -> None:
    rounds = rounds_of("abc")
    stage(rounds, "ab")
    assert rounds.due(1e12) == []
    assert rounds.next_deadline() in (None, INF)


def test_min_workers_is_a_floor_even_when_all_others_are_gone() -> None:
    rounds = rounds_of("ab", min_workers=2, grace=0.0)
    stage(rounds, "a")
    rounds.no_longer_expected("b", 1.0)
    assert rounds.due(1e9) == []
    assert rounds.next_deadline() is None
    stage(rounds, "c", now=2.0)
    assert members(rounds.due(2.0)) == ["ac"]


def test_at_the_end_of_a_run_the_floor_is_gone() -> None:
    rounds = rounds_of("ab", min_workers=2)
    stage(rounds, "a")
    rounds.no_longer_expected("a", 1.0)
    rounds.no_longer_expected("b", 1.0)
    assert rounds.due(1.0) == []
    rounds.floor = 1
    assert members(rounds.due(1.0)) == ["a"]


def test_an_empty_round_never_closes() -> None:
    rounds = rounds_of("a", grace=0.0)
    rounds.no_longer_expected("a", 1.0)
    rounds.floor = 1
    assert rounds.due(1e9) == []
    assert rounds.idle


def test_auto_grace_is_the_usual_time_from_first_to_last() -> None:
    rounds = rounds_of("ab", grace=None)
    for version in range(5):
        stage(rounds, "a", now=100.0 * version, base=version)
        stage(rounds, "b", now=100.0 * version + 30.0, base=version)
        close_and_reopen(rounds, "ab", 100.0 * version + 30.0)
    stage(rounds, "a", now=1000.0, base=5)
    assert rounds.next_deadline() == 1030.0
    assert rounds.due(1029.0) == []
    assert members(rounds.due(1030.0)) == ["a"]


def test_auto_grace_is_at_least_two_seconds_and_learns_from_filled_rounds_alone() -> None:
    rounds = rounds_of("ab", grace=None)
    stage(rounds, "a", now=5.0)
    assert rounds.next_deadline() == 7.0
    close_and_reopen(rounds, "ab", 7.0)
    stage(rounds, "a", now=50.0, base=1)
    assert rounds.next_deadline() == 52.0


# -- who leaves, who joins --


def test_who_is_gone_is_not_waited_for_but_what_it_staged_stays() -> None:
    rounds = rounds_of("abc")
    stage(rounds, "ab")
    rounds.no_longer_expected("a", 1.0)
    rounds.no_longer_expected("c", 1.0)
    assert members(rounds.due(1.0)) == ["ab"]


def test_departures_can_make_the_quorum() -> None:
    rounds = rounds_of("abcde", grace=10.0)
    stage(rounds, "a")
    for gone in "bcd":
        rounds.no_longer_expected(gone, 5.0)
    assert rounds.next_deadline() == 15.0
    assert members(rounds.due(15.0)) == ["a"]


def test_a_joiner_is_counted_but_not_waited_for() -> None:
    rounds = rounds_of("a")
    stage(rounds, "z")
    assert rounds.due(1e9) == []
    stage(rounds, "a")
    assert members(rounds.due(0.0)) == ["az"]


def test_fragments_are_independent() -> None:
    rounds = rounds_of("ab", fragments=3)
    stage(rounds, "ab", fragment=1)
    stage(rounds, "a", fragment=2)
    (close,) = rounds.due(0.0)
    assert close.fragment == 1
    assert rounds.holds("a")
    assert not rounds.idle
    assert not rounds.holds("z")


# -- repeated, conflicting, late, early --


def known(rounds: Rounds, worker: str = "a", **fields) -> Stage | None:
    found = contribution(worker, **fields)
    return rounds.seen_before(found.key, found.frames)


def test_the_same_again_while_the_round_is_open() -> None:
    rounds = rounds_of("ab")
    assert known(rounds) is None
    stage(rounds, "a")
    assert known(rounds) is Stage.ALREADY_HAVE
    assert rounds.stage(contribution("a"), 1.0) is Stage.ALREADY_HAVE
    key = Key(0, 0, "a")
    assert rounds.seen_before(key, {4096: 2}) is Stage.ALREADY_HAVE, "a part of it, from one rank of an island"
    assert rounds.stage(contribution("a", digest=7), 1.0) is Stage.CONFLICT
    stage(rounds, "b")
    assert rounds.due(1.0)[0].contributions[0].frames == {0: 1, 4096: 2}, "the first to be staged counts"


def test_a_round_that_is_being_computed_takes_nothing_more() -> None:
    rounds = rounds_of("a")
    stage(rounds, "a")
    (close,) = rounds.due(0.0)
    assert known(rounds, "z") is Stage.CLOSED
    assert rounds.stage(contribution("z"), 0.0) is Stage.CLOSED
    assert known(rounds, "a") is Stage.ALREADY_HAVE
    assert rounds.committed(close, 0.0).counted == {"a"}


def test_the_fate_of_a_repeated_push_when_the_round_is_over() -> None:
    rounds = rounds_of("a")
    stage(rounds, "a")
    close_and_reopen(rounds, "ab", 1.0)
    assert known(rounds) is Stage.COUNTED
    assert known(rounds, digest=7) is Stage.CONFLICT
    assert known(rounds, "b") is Stage.CLOSED


def test_a_round_that_was_void_counted_nobody() -> None:
    rounds = rounds_of("a")
    stage(rounds, "a")
    (close,) = rounds.due(0.0)
    record = rounds.committed(dataclasses.replace(close, contributions=(), weights=(), scales=()), 0.0)
    rounds.open(0, 1, "a", 0.0)
    assert record.members == ()
    assert known(rounds) is Stage.CLOSED


def test_a_base_version_of_the_future() -> None:
    rounds = rounds_of("a", version=3)
    with pytest.raises(InvalidContribution, match="'a' pushed fragment 0 against version 4, but the newest is 3"):
        known(rounds, base=4)


def test_before_the_run_has_opened() -> None:
    rounds = Rounds([Weights(uniform=True, max_norm=0.0)], min_workers=1, grace=INF)
    with pytest.raises(NotReady, match="no open round"):
        known(rounds)


def test_records_are_bounded() -> None:
    rounds = rounds_of("a")
    for version in range(KEPT_RECORDS + 10):
        stage(rounds, "a", base=version)
        close_and_reopen(rounds, "a", 1.0)
    assert known(rounds, base=KEPT_RECORDS + 9) is Stage.COUNTED
    assert len(rounds.records[0]) == KEPT_RECORDS


def test_a_contribution_is_known_to_be_counted_however_long_ago() -> None:
    rounds = rounds_of("ab")
    stage(rounds, "a")
    stage(rounds, "b")
    close_and_reopen(rounds, "b", 1.0)
    for version in range(1, KEPT_RECORDS + 10):
        stage(rounds, "b", base=version)
        close_and_reopen(rounds, "b", 1.0)
    assert known(rounds, "a", base=0) is Stage.COUNTED
    assert known(rounds, "a", base=0, digest=7) is Stage.CONFLICT
    assert known(rounds, "b", base=0) is Stage.CLOSED


def test_the_usual_length_of_a_round() -> None:
    rounds = rounds_of("a")
    assert rounds.usual_seconds is None
    now = 0.0
    for version, seconds in enumerate((10.0, 500.0, 12.0)):
        now += seconds
        stage(rounds, "a", now=now, base=version)
        close_and_reopen(rounds, "a", now)
    assert rounds.usual_seconds == 12.0


def test_rounds_that_wait_for_each_other_in_a_circle_are_seen() -> None:
    rounds = rounds_of("ab", fragments=2)
    stage(rounds, "a", fragment=0)
    assert rounds.in_circle() == set(), "b may still come"
    stage(rounds, "b", fragment=1)
    assert rounds.in_circle() == {"a", "b"}
    rounds.no_longer_expected("a", 0.0)
    assert rounds.in_circle() == set(), "fragment 1 closes now, which frees b"


def test_a_chain_that_ends_at_somebody_who_trains_is_no_circle() -> None:
    rounds = rounds_of("abc", fragments=2)
    stage(rounds, "ab", fragment=0)
    stage(rounds, "a", fragment=1)
    assert rounds.in_circle() == set(), "all wait for c"


def test_who_contributes_to_a_round_that_is_stuck_already_is_told_too() -> None:
    rounds = rounds_of("ab", min_workers=3)
    stage(rounds, "a")
    rounds.no_longer_expected("b", 0.0)
    assert rounds.stuck() == [{"a"}]
    assert rounds.stuck() == []
    stage(rounds, "b")
    assert rounds.stuck() == [{"a", "b"}]
