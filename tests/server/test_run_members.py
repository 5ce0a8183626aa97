"""The run as a state machine: workers that come and go, hang and finish. Promise 4: none can stop the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from driven_run import Sim, const
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import (
    InvalidContribution,
    NotMember,
    Superseded,
)
from diloco_server.members import MemberState

# -- coming and going --


def test_a_lease_that_runs_out_frees_the_round() -> None:
    sim = Sim().enter("a", "b")
    sim.at(8.0)
    sim.beat("a")
    sim.contribute("a", 1.0)
    assert sim.run.next_deadline() == 10.0
    sim.at(9.9)
    assert sim.versions() == [0, 0]
    sim.at(10.0)
    assert sim.versions() == [1, 0]
    with pytest.raises(NotMember):
        sim.beat("b")
    with pytest.raises(NotMember, match="say hello again"):
        sim.contribute("b", 1.0)
    sim.hello("b")
    assert sim.told("b")["welcome"].versions[0].version == 1
    assert sim.waits_for() == {"a"}, "it must be ready first"


def test_leaving_frees_the_round_at_once() -> None:
    sim = Sim().enter("a", "b", "c")
    sim.contribute("a", 1.0)
    sim.contribute("b", 3.0)
    sim.say("b", "leave")
    assert sim.versions() == [0, 0]
    sim.say("c", "leave")
    assert sim.theta() == -2.0, "what b staged has stayed"
    assert sim.waits_for() == {"a"}


def test_a_new_connection_of_the_same_process_changes_nothing() -> None:
    sim = Sim().enter("a", "b")
    sim.contribute("a", 1.0)
    sim.hello("a")
    assert sim.run.members.get("a", 1).state is MemberState.READY
    assert sim.waits_for() == {"b"}
    sim.say("a", "ready")
    assert "opened" in sim.told("a")


def test_a_newer_process_supersedes_and_nobody_waits_for_the_older() -> None:
    sim = Sim().enter("a", "b")
    sim.contribute("a", 2.0)
    sim.hello("b", generation=2)
    assert sim.versions() == [1, 0], "what the older owed is not waited for"
    with pytest.raises(Superseded):
        sim.contribute("b", 1.0)
    with pytest.raises(Superseded):
        sim.hello("b")
    sim.say("b", "ready", generation=2)
    assert sim.waits_for() == {"a"}
    assert sim.contribute("b", 4.0, generation=2).kind == pb.OUTCOME_STAGED
    sim.contribute("a", 2.0)
    assert sim.theta() == -5.0


def test_what_a_superseded_process_staged_counts_once() -> None:
    sim = Sim().enter("a", "b")
    sim.contribute("b", 4.0)
    sim.hello("b", generation=2)
    assert sim.contribute("b", 6.0, generation=2).kind == pb.OUTCOME_CONFLICT
    assert sim.contribute("b", 4.0, generation=2).kind == pb.OUTCOME_ALREADY_HAVE
    sim.contribute("a", 0.0)
    assert sim.theta() == -2.0


# -- promise 4: no worker can stop the others --


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 6), st.data())
def test_dead_workers_delay_a_round_by_their_lease_at_most(count: int, data: st.DataObject) -> None:
    workers = "abcdef"[:count]
    dead = data.draw(st.sets(st.sampled_from(workers), min_size=1, max_size=count - 1))
    grace = data.draw(st.sampled_from([0.0, 1.5, "inf"]))
    sim = Sim(grace_seconds=grace).enter(*workers)
    alive = [w for w in data.draw(st.permutations(workers)) if w not in dead]
    for worker in alive:
        sim.at(sim.now + 0.5)
        sim.contribute(worker, 1.0, base_version=0)
    pushed = sim.now
    while sim.versions() == [0, 0]:
        for worker in alive:
            sim.beat(worker)
        deadline = sim.run.next_deadline()
        assert deadline is not None, "nothing would ever close the round"
        sim.at(deadline)
    assert sim.now <= 10.0
    assert sim.theta() == -1.0
    if grace != "inf" and len(alive) >= count / 2:
        assert sim.now <= pushed + grace
    while sim.now < 10.0:
        for worker in alive:
            sim.beat(worker)
        sim.at(sim.now + 2.5)
    version = sim.versions()[0]
    for worker in alive:
        sim.contribute(worker, 1.0, base_version=version)
    assert sim.versions()[0] == version + 1, "and only once"


def train(sim: Sim, seconds: int, moving: Iterable[str], hung: Iterable[str] = ()) -> None:
    """All beat once a second; those that move have taken a step each time."""
    for _ in range(seconds):
        sim.now += 1.0
        for worker in moving:
            sim.beat(worker, int(sim.now))
        for worker in hung:
            sim.beat(worker, sim.run.members.get(worker, 1).last.step)
        sim.settle()


def contribute_all(sim: Sim, workers: Iterable[str]) -> None:
    for worker, fragment in itertools.product(workers, range(2)):
        sim.contribute(worker, 0.0, fragment)


def test_a_worker_whose_training_hangs_delays_by_three_rounds_at_most() -> None:
    sim = Sim().enter("a", "b", "hung")
    for _ in range(4):
        train(sim, 20, ("a", "b", "hung"))
        contribute_all(sim, ("a", "b", "hung"))
    assert sim.versions() == [4, 4]
    train(sim, 20, ("a", "b"), ("hung",))
    contribute_all(sim, ("a", "b"))
    train(sim, 39, ("a", "b"), ("hung",))
    assert sim.versions() == [4, 4]
    train(sim, 1, ("a", "b"), ("hung",))
    assert sim.versions() == [5, 5]
    assert sim.waits_for() == {"a", "b"}
    sim.beat("hung", 1000)  # it trains again
    contribute_all(sim, ("a", "b"))
    assert sim.versions() == [6, 6]
    assert sim.waits_for() == {"a", "b", "hung"}


def test_who_waits_for_a_slow_worker_is_not_taken_to_hang() -> None:
    sim = Sim().enter("fast", "slow")
    for _ in range(3):
        train(sim, 1, ("fast", "slow"))
        contribute_all(sim, ("fast", "slow"))
    sim.contribute("fast", 0.0, 0)
    train(sim, 200, ("slow",), ("fast",))
    assert sim.versions() == [3, 3]
    sim.contribute("slow", 0.0, 0)
    sim.settle()
    assert sim.versions() == [4, 3]
    assert sim.waits_for(0) == sim.waits_for(1) == {"fast", "slow"}


def test_before_any_round_is_over_nobody_knows_what_hanging_is() -> None:
    sim = Sim().enter("a", "compiling")
    train(sim, 500, ("a",), ("compiling",))
    assert sim.waits_for() == {"a", "compiling"}


def test_garbage_from_one_worker_does_not_keep_the_round_from_closing() -> None:
    sim = Sim(grace_seconds=3.0).enter("a", "b", "bad")
    for _ in range(5):
        with pytest.raises(InvalidContribution):
            sim.push("bad", const(1.0), codec=pb.CODEC_INT4)
    sim.contribute("a", 1.0)
    sim.contribute("b", 1.0)
    sim.at(3.0)
    assert sim.theta() == -1.0


def test_who_is_left_below_the_floor_is_told_what_the_run_waits_for() -> None:
    sim = Sim(min_workers=2).enter("a", "b")
    sim.contribute("a", 1.0)
    assert "opened" in sim.told("a")
    sim.say("b", "leave")
    assert sim.versions() == [0, 0]
    assert sim.told("a") == {"waiting": pb.Waiting(ready=1, needed=2)}
    sim.settle()
    assert sim.told("a") == {}, "once a round"
    sim.hello("a")
    sim.say("a", "ready")
    assert "waiting" in sim.told("a"), "it may have been lost in a cut"
    sim.enter("c")
    sim.contribute("c", 3.0)
    assert sim.versions() == [1, 0]
    assert sim.theta() == -2.0


def test_a_round_that_can_still_fill_makes_nobody_wait_in_vain() -> None:
    sim = Sim(min_workers=2).enter("a", "b")
    sim.contribute("a", 1.0)
    sim.say("a", "leave")
    assert "waiting" not in sim.told("b")
    sim.contribute("b", 3.0)
    assert sim.versions() == [1, 0]


def test_rounds_that_wait_for_each_other_give_somebody_up() -> None:
    sim = Sim(lease_seconds=10.0).enter("a", "b")
    sim.contribute("a", fragment=0)
    sim.contribute("b", fragment=1)
    for now in range(1, 13):
        sim.at(float(now))
        for worker in "ab":
            sim.beat(worker)
    assert sim.versions() == [1, 1], "otherwise each would wait for the other for ever"


def test_who_hears_of_one_round_while_another_is_stuck_is_told_again() -> None:
    sim = Sim(min_workers=2).enter("a", "b")
    sim.contribute("a", fragment=0)
    sim.contribute("b", fragment=1)
    sim.say("b", "leave")
    sim.contribute("a", fragment=1)
    sim.settle()
    events = [event.WhichOneof("body") for name, event in sim.run.news.take() if name == "a"]
    assert "committed" in events
    assert "waiting" in events[events.index("committed") :], "the news of one round lifts the hold of all"


def test_training_that_hangs_before_the_first_round_is_given_up_in_the_end() -> None:
    sim = Sim().enter("a", "b")
    sim.contribute("a")
    for _ in range(400):
        sim.now += 3
        for worker in "ab":
            sim.beat(worker)
        sim.settle()
    assert sim.versions()[0] == 1


def test_a_worker_begins_where_its_predecessor_was() -> None:
    sim = Sim().enter("a")
    sim.beat("a", 5000)
    sim.hello("a", generation=2)
    sim.say("a", "ready", generation=2)
    assert sim.told("a")["opened"].start_step == 5000
    sim.hello("b")
    sim.say("b", "ready")
    assert sim.told("b")["opened"].start_step == 5000, "though its heart has not beaten yet"


# -- the end --


def test_finishing_workers_are_not_waited_for() -> None:
    sim = Sim().enter("a", "b")
    sim.contribute("a", 2.0)
    sim.say("b", "finishing")
    assert sim.theta() == -2.0
    assert sim.contribute("b", 4.0).kind == pb.OUTCOME_STAGED, "but what they still push counts"


def test_at_the_end_one_contribution_is_enough() -> None:
    sim = Sim(min_workers=2).enter("a", "b")
    sim.contribute("a", 2.0)
    sim.say("a", "finishing")
    assert sim.versions() == [0, 0]
    sim.say("b", "finishing")
    assert sim.theta() == -2.0


def test_all_are_told_when_all_have_finished_and_nothing_is_under_way() -> None:
    sim = Sim().enter("a", "b")
    sim.finish("a")
    sim.contribute("b", 2.0)
    sim.say("b", "finishing")
    assert "all_finished" not in sim.told("a")
    sim.finish("b")
    for worker in "ab":
        assert [v.version for v in sim.told(worker)["all_finished"].versions] == sim.versions() == [1, 0]
    sim.settle()
    assert "all_finished" not in sim.told("a"), "once"


def test_all_finished_waits_for_a_staged_contribution() -> None:
    sim = Sim(min_workers=2).enter("a", "b")
    sim.hello("c")
    sim.contribute("a", 2.0)
    sim.finish("a")
    sim.finish("b")
    assert sim.versions() == [1, 0], "those who end by finishing lower the floor"
    assert "all_finished" not in sim.told("a"), "c is about to train"
    sim.say("c", "leave")
    assert "all_finished" in sim.told("a")


def test_whoever_missed_the_end_in_a_cut_hears_of_it() -> None:
    sim = Sim().enter("a", "b")
    for worker in "ab":
        sim.finish(worker)
    sim.told("a"), sim.told("b")  # a's was lost
    sim.hello("a")
    sim.finish("a")
    assert "all_finished" in sim.told("a")
    assert "all_finished" not in sim.told("b")


def test_training_can_go_on_after_the_end() -> None:
    sim = Sim().enter("a")
    sim.finish("a")
    assert "all_finished" in sim.told("a")
    sim.say("a", "ready")
    assert "opened" in sim.told("a")
    sim.contribute("a", 1.0)
    sim.finish("a", flush=2)
    assert [v.version for v in sim.told("a")["all_finished"].versions] == [1, 0]


def test_a_dead_worker_does_not_keep_the_others_from_the_end() -> None:
    sim = Sim().enter("a", "dead")
    sim.at(9.0)
    sim.beat("a")
    sim.finish("a")
    assert "all_finished" not in sim.told("a")
    sim.at(10.0)
    assert "all_finished" in sim.told("a")


def test_a_second_flush_together_waits_for_everybodys_second() -> None:
    sim = Sim().enter("a", "b")
    sim.finish("a")
    sim.finish("b")
    assert "all_finished" in sim.told("a")
    sim.say("a", "ready")
    sim.contribute("a", 1.0)
    sim.finish("a", flush=2)
    assert "all_finished" not in sim.told("a"), "b still stands where it was after the first"
    sim.finish("b", flush=2)
    assert "all_finished" in sim.told("a")


def test_a_worker_that_has_finished_lowers_the_floor_and_a_dead_one_does_not() -> None:
    sim = Sim(min_workers=2).enter("a", "b")
    sim.say("a", "finishing")
    sim.contribute("b", 1.0)
    assert sim.versions() == [1, 0]
    sim.say("a", "leave")
    sim.contribute("b", 1.0)
    assert sim.versions() == [2, 0]


def test_a_round_that_opened_after_all_had_finished_waits_for_those_who_come_back_before_its_first_push() -> None:
    sim = Sim().enter("a", "b")
    for worker in "ab":
        sim.finish(worker)
    assert "all_finished" in sim.told("a")
    for fragment in range(2):
        sim.contribute("a", fragment=fragment)
        assert sim.versions()[fragment] == 1, "nobody was ready"
    sim.say("a", "ready")
    sim.say("b", "ready")
    sim.contribute("a")
    assert sim.waits_for() == {"b"}
    sim.hello("c")
    sim.say("c", "ready")
    assert sim.waits_for() == {"b"}, "it has a contribution by now"


def test_who_hangs_does_not_keep_the_others_from_finishing_together() -> None:
    sim = Sim().enter("a", "b")
    sim.contribute("a")
    sim.contribute("b")
    sim.finish("a")
    for _ in range(40):
        sim.now += 3
        for worker in "ab":
            sim.beat(worker, 1)
        sim.settle()
    assert "all_finished" in sim.told("a")
