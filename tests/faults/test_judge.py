"""What benchmarks/chaos.py finds when something is wrong: its judge, on records that are as they must be, and not."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from crash_test.ledger import Contribution, Event, Kept, Verdict, judge

THETA = ["00000000000000aa"]
FIRST = Contribution("w", 0, 0, ("d0",))
SECOND = Contribution("w", 0, 1, ("d1",))


def told(event: str, contribution: Contribution, **fields: Any) -> Event:
    return {
        "event": event,
        "life": "w.0",
        "fragment": contribution.fragment,
        "base_version": contribution.base_version,
        "digests": list(contribution.digests),
        **fields,
    }


class Case:
    """One worker, of whom two contributions were counted."""

    def __init__(self) -> None:
        self.kept = Kept(
            staged=Counter([FIRST, SECOND]),
            steps={FIRST: 4, SECOND: 3},
            rounds=[(0, 1, (FIRST,)), (0, 2, (SECOND,))],
            digests=list(THETA),
            replayed=list(THETA),
        )
        self.events = [
            told("sent", FIRST, steps=[["w.0", 1, 4]]),
            told("answered", FIRST, outcome="OUTCOME_STAGED"),
            told("settled", FIRST, counted=True),
            told("sent", SECOND, steps=[["w.0", 5, 6], ["w.1", 7, 7]]),
            told("answered", SECOND, outcome="OUTCOME_COUNTED"),
            {"event": "finished", "life": "w.1", "digests": list(THETA), "holds_theta": True},
        ]

    def verdict(self) -> Verdict:
        return judge(self.kept, {"w": self.events}, THETA)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    verdict = Case().verdict()
    assert verdict.problems == []
    assert (verdict.acknowledged, verdict.lost, verdict.counted_twice, verdict.identical) == (2, 0, 0, True)


def lose(case: Case) -> None:
    case.kept.rounds.pop()


def lose_before_it_was_kept(case: Case) -> None:
    case.kept.staged.pop(SECOND)
    lose(case)


def count_again(case: Case) -> None:
    case.kept.rounds.append((0, 3, (SECOND,)))


def count_a_step_again(case: Case) -> None:
    case.events[3]["steps"] = [["w.0", 4, 6]]


def say_more_steps(case: Case) -> None:
    case.kept.steps[FIRST] = 5


def send_other_bytes(case: Case) -> None:
    case.events[0]["digests"] = case.events[1]["digests"] = ["dx"]


def tell_the_wrong_fate(case: Case) -> None:
    case.events[2]["counted"] = False


def skip_a_version(case: Case) -> None:
    case.kept.rounds[1] = (0, 3, (SECOND,))


def hold_another_base(case: Case) -> None:
    case.events[-1]["digests"] = ["00000000000000bb"]


def train_on_something_else(case: Case) -> None:
    case.events[-1]["holds_theta"] = False


def keep_something_else(case: Case) -> None:
    case.kept.digests = ["00000000000000bb"]


def replay_to_something_else(case: Case) -> None:
    case.kept.replayed = ["00000000000000bb"]


def never_finish(case: Case) -> None:
    case.events.pop()


@pytest.mark.parametrize(
    ("break_it", "found", "field"),
    [
        (lose, "acknowledged and in no round", "lost"),
        (lose, "staged and in no round", "lost"),
        (lose_before_it_was_kept, "acknowledged and in no round", "lost"),
        (count_again, "in 2 rounds", "counted_twice"),
        (count_a_step_again, "1 steps from ('w.0', 4) on count twice", "counted_twice"),
        (say_more_steps, "of 4 steps, said to be 5", ""),
        (send_other_bytes, "nobody has recorded that it was sent", "lost"),
        (tell_the_wrong_fate, "was told not counted, which is wrong", ""),
        (skip_a_version, "came from version 1 to 3", ""),
        (hold_another_base, "not all hold the same", "identical"),
        (train_on_something_else, "not all hold the same", "identical"),
        (keep_something_else, "not all hold the same", "identical"),
        (replay_to_something_else, "not all hold the same", "identical"),
        (never_finish, "not all hold the same", "identical"),
    ],
)
def test_what_is_wrong_is_found(break_it: Callable[[Case], None], found: str, field: str) -> None:
    case = Case()
    break_it(case)
    verdict = case.verdict()
    assert any(found in problem for problem in verdict.problems), verdict.problems
    assert verdict.identical is (field != "identical")
    if field in ("lost", "counted_twice"):
        assert getattr(verdict, field) >= 1
