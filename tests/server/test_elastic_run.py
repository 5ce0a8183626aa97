"""Runs whose workers differ: asynchronous steps, paces, shards, ends, norms, and workers that were away."""

from __future__ import annotations

import numpy as np
import pytest
from driven_run import Sim, const
from raw_worker import flat

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import InvalidContribution
from diloco_proto.manifest import Manifest, Role, TensorSpec
from diloco_server.members import CUT_SHARE, MemberState

ASYNC = {"outer_optimizer": "delayed-nesterov", "outer_momentum": 0.0, "delay_buffer": 1, "max_outer_grad_norm": 0.0}
"""Every contribution is a step of plain SGD with lr 1."""


def fate(sim: Sim, worker: str) -> pb.Committed:
    return sim.told(worker)["committed"]


# -- asynchronous --


def test_an_asynchronous_contribution_is_a_step_at_once() -> None:
    sim = Sim(**ASYNC).enter("a", "b")
    assert sim.contribute("a", 2.0).kind == pb.OUTCOME_STAGED
    assert (sim.versions(), sim.theta()) == ([1, 0], -2.0)
    told = fate(sim, "a")
    assert (told.fate, told.base_version, told.version) == (pb.FATE_COUNTED, 0, 1)
    assert fate(sim, "b").fate == pb.FATE_UNSPECIFIED


def test_a_stale_contribution_counts_until_the_limit() -> None:
    sim = Sim(**ASYNC, max_staleness=2, weighting="uniform").enter("a", "b")
    for version in range(2):
        sim.contribute("a", 1.0, base_version=version, since_version=version)
    assert sim.contribute("b", 1.0, base_version=0).kind == pb.OUTCOME_STAGED
    assert (sim.versions()[0], fate(sim, "b").base_version) == (3, 0)
    sim.contribute("a", 1.0, base_version=3, since_version=3)
    for version in (4, 5):
        sim.contribute("a", 1.0, base_version=version, since_version=version)
    assert sim.contribute("b", 1.0, base_version=3).kind == pb.OUTCOME_CLOSED


def test_what_arrives_while_a_step_is_computed_is_next() -> None:
    sim = Sim(**ASYNC).enter("a", "b", "c")
    run, now = sim.run, sim.now
    sim.settle = lambda: None  # the outer step takes its time
    sim.contribute("b", 1.0)
    (close,) = run.due(now)
    assert sim.contribute("c", 2.0).kind == sim.contribute("a", 3.0).kind == pb.OUTCOME_STAGED
    assert sim.contribute("c", 2.0).kind == pb.OUTCOME_ALREADY_HAVE
    assert sim.contribute("c", 9.0).kind == pb.OUTCOME_CONFLICT
    order = []
    for _ in range(3):
        order += [c.key.worker_id for c in close.contributions]
        run.publish(run.commit(close), now)
        close = next(iter(run.due(now)), None)
    assert order == ["b", "c", "a"], "in the order of arrival"
    assert close is None
    assert -6.0 < sim.theta() < -4.0, "the later ones are staler and weigh less"


def test_a_base_without_the_workers_own_last_steps_is_refused() -> None:
    sim = Sim(**ASYNC).enter("a", "b")
    sim.contribute("b", 1.0, base_version=0)
    sim.contribute("a", 1.0, base_version=1, since_version=1)
    assert sim.contribute("a", 5.0, base_version=0).kind == pb.OUTCOME_CLOSED
    assert sim.contribute("a", 1.0, base_version=1, since_version=1).kind == pb.OUTCOME_COUNTED
    assert sim.contribute("a", 5.0, base_version=1).kind == pb.OUTCOME_CONFLICT
    assert sim.theta() == -2.0


def test_nobody_is_waited_for_or_taken_to_hang_in_an_asynchronous_run() -> None:
    sim = Sim(**ASYNC).enter("a", "b")
    sim.contribute("a", 1.0)
    for second in range(1, 200):
        sim.at(float(second))
        sim.beat("a", step=second)
        sim.beat("b", step=0)
    assert not sim.waits_for()
    assert not sim.run.members.known("b").hung


# -- norms --


def test_a_contribution_far_beyond_the_usual_is_scaled_down_and_reported(caplog) -> None:
    sim = Sim(max_outer_grad_norm=10.0).enter("a", "b", "c")
    sim.contribute("a", 1.0)
    sim.contribute("b", 1.0)
    sim.contribute("c", 1e30)
    assert sim.theta() == pytest.approx(-(1 + 1 + 10) / 3)
    (record,) = sim.run.rounds.records[0]
    assert [m.scale for m in record.members] == [1.0, 1.0, pytest.approx(1e-29)]
    assert "worker 'c', fragment 0" in caplog.text
    assert "scaled down" in caplog.text


def test_one_worker_near_the_limit_of_numbers_no_longer_voids_the_round() -> None:
    sim = Sim().enter("a", "b", "c")
    for worker, value in (("a", 1.0), ("b", 1.0), ("c", 2.0**125)):
        sim.contribute(worker, value)
    assert fate(sim, "c").fate == fate(sim, "a").fate == pb.FATE_COUNTED
    assert sim.theta() == pytest.approx(-4.0)


# -- away --


def test_steps_from_before_too_many_rounds_are_not_wanted() -> None:
    sim = Sim(max_away=3).enter("a")
    for version in range(4):
        sim.contribute("a", 1.0, since_version=version)
    sim.hello("b")
    sim.say("b", "ready")
    outcome = sim.contribute("b", 1.0, since_version=0)
    assert (outcome.kind, outcome.version) == (pb.OUTCOME_RESYNC, 4)
    assert sim.contribute("b", 1.0, since_version=1).kind == pb.OUTCOME_STAGED
    assert sim.contribute("b", 1.0, base_version=0, since_version=0).kind == pb.OUTCOME_RESYNC


def test_steps_cannot_be_younger_than_their_base() -> None:
    sim = Sim().enter("a")
    with pytest.raises(InvalidContribution, match="'a' pushed steps taken since version 1 of fragment 0 against the"):
        sim.contribute("a", 1.0, since_version=1)


def test_a_broken_connection_shortens_the_lease() -> None:
    sim = Sim(lease_seconds=12.0).enter("a", "b")
    sim.contribute("a", 1.0)
    sim.at(2.0)
    sim.say("b", "cut")
    sim.beat("a", 1)
    sim.at(2.0 + 12.0 * CUT_SHARE - 0.1)
    assert sim.waits_for() == {"b"}
    sim.at(2.0 + 12.0 * CUT_SHARE)
    assert sim.versions()[0] == 1
    assert sim.run.members.known("b").state is MemberState.GONE


def test_who_comes_back_soon_has_the_whole_lease_again() -> None:
    sim = Sim(lease_seconds=12.0).enter("a", "b")
    sim.say("b", "cut")
    sim.at(3.0)
    sim.hello("b")
    for second in (6.0, 9.0):
        sim.at(second)
        sim.beat("a", 1)
    sim.at(14.9)
    assert sim.run.members.known("b").live
    sim.at(15.0)
    assert not sim.run.members.known("b").live


def test_a_server_that_stood_still_blames_nobody() -> None:
    sim = Sim(lease_seconds=10.0).enter("a", "b")
    sim.settle()
    sim._now += 100.0  # no tick in between
    sim.settle()
    assert all(m.live for m in sim.run.members.all())
    sim.at(sim.now + 9.9)
    assert all(m.live for m in sim.run.members.all())
    sim.at(sim.now + 0.2)
    assert not any(m.live for m in sim.run.members.all())


# -- paces, shards, ends --


def speeds(sim: Sim, **steps_per_second: float) -> None:
    """Each worker's heartbeat after ten seconds of computing."""
    for worker, speed in steps_per_second.items():
        beat = pb.Heartbeat(step=1, steps=round(10 * speed), train_seconds=10.0)
        sim.run.hear(worker, 1, pb.SessionRequest(heartbeat=beat), sim.now)


def test_slower_workers_are_paced_after_a_round_of_the_last_fragment() -> None:
    sim = Sim(sync_every=40, dynamic_local_updates=True).enter("a", "b")
    speeds(sim, a=4.0, b=1.0)
    sim.contribute("a", 1.0)
    sim.contribute("b", 1.0)
    assert "pace" not in sim.told("b")
    sim.contribute("a", 1.0, 1)
    sim.contribute("b", 1.0, 1)
    assert sim.told("b")["pace"].sync_every == 10
    assert "pace" not in sim.told("a")
    sim.hello("b")
    sim.say("b", "ready")
    assert sim.told("b")["pace"].sync_every == 10, "said again to who comes back"


def test_shards_are_dealt_out_and_the_count_grows() -> None:
    sim = Sim(min_workers=2)
    sim.hello("a")
    sim.hello("b")
    assert [sim.told(w)["shard"] for w in "ab"] == [pb.Shard(index=0, count=2), pb.Shard(index=1, count=2)]
    sim.hello("c")
    for index, worker in enumerate("abc"):
        assert sim.told(worker)["shard"] == pb.Shard(index=index, count=3)
    sim.say("a", "leave")
    sim.hello("d")
    assert sim.told("d")["shard"] == pb.Shard(index=0, count=3), "the place of the one that left"
    sim.hello("a", generation=2)
    assert sim.told("a")["shard"] == pb.Shard(index=3, count=4)
    sim.hello("b", generation=2)
    assert sim.told("b")["shard"] == pb.Shard(index=1, count=4), "its own again"


def test_the_run_ends_after_its_rounds() -> None:
    sim = Sim(stop_after_rounds=2).enter("a")
    for fragment in (0, 1, 0):
        sim.contribute("a", 1.0, fragment)
    assert "stop" not in sim.told("a")
    sim.contribute("a", 1.0, 1)
    assert sim.told("a")["stop"].reason == sim.run.stopped == "2 rounds"
    sim.contribute("a", 1.0)
    assert sim.versions() == [3, 2], "what is still pushed counts"
    sim.hello("b")
    sim.say("b", "ready")
    assert sim.told("b")["stop"].reason == "2 rounds"


def test_the_run_ends_after_its_tokens() -> None:
    sim = Sim(stop_after_tokens=100, weighting="tokens").enter("a")
    sim.contribute("a", 1.0, 0, tokens=99)
    sim.contribute("a", 1.0, 1, tokens=150)
    assert "stop" not in sim.told("a")
    sim.contribute("a", 1.0, 0, tokens=30)
    assert sim.told("a")["stop"].reason == "129 tokens"


# -- buffers --


def test_buffers_are_averaged_whatever_the_outer_optimizer() -> None:
    tensors = (
        TensorSpec("w", (100,), "float32", Role.TRAINED),
        TensorSpec("mean", (70,), "float32", Role.BUFFER),
    )
    nesterov = {"outer_optimizer": "nesterov", "outer_lr": 0.7, "uplink_codec": "int4", "num_fragments": 1}
    sim = Sim(manifest=Manifest(tensors), **nesterov).enter("a", "b")
    local = {"a": 3.0, "b": 5.0}
    for version in range(3):
        for worker, value in local.items():
            delta = flat(np.full(70, sim.theta(1) - value, np.float32))
            outcome = sim.push(worker, delta, 1, base_version=version)
            assert outcome.kind == pb.OUTCOME_STAGED
        assert sim.theta(1) == 4.0
    with pytest.raises(InvalidContribution, match="fragment 1; this run takes fp32"):
        sim.push("a", const(1.0, 1), 1, base_version=3, codec=pb.CODEC_INT4)


# -- records --


def test_a_record_says_who_was_in_and_how() -> None:
    sim = Sim(grace_seconds=1.0, weighting="tokens", lease_seconds=100.0).enter("a", "b", "c")
    sim.at(10.0)
    sim.contribute("b", 2.0, tokens=300, steps=3)
    sim.at(11.0)
    sim.contribute("a", 1.0, tokens=100, steps=1)
    sim.at(12.0)
    (record,) = sim.run.rounds.records[0]
    first, second = record.members
    assert (first.worker_id, first.weight, first.tokens, first.waited_seconds) == ("a", 0.25, 100, 1.0)
    assert (second.worker_id, second.weight, second.steps, second.waited_seconds) == ("b", 0.75, 3, 2.0)
    assert first.norm == pytest.approx(10.0)
    assert (record.missed, record.open_seconds, record.version) == (("c",), 12.0, 1)
