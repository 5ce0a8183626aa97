"""The run as a state machine: messages and the time go in, what is to be told comes out."""

from __future__ import annotations

import ast
import itertools
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from driven_run import MANIFEST, SIZES, Sim, const
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_worker import flat, frames_of, header, hello, manifest_of
from safetensors.numpy import save_file

import diloco_server
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format, read_frame
from diloco_proto.errors import (
    ConfigError,
    InvalidContribution,
    ManifestMismatch,
    NonFiniteParameter,
    NotMember,
    NotReady,
    ProtocolMismatch,
    RunMismatch,
    Superseded,
    UnsupportedModel,
)
from diloco_server.checkpoint import InitialParameters
from diloco_server.members import MemberState

# -- saying hello --


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"protocol": 99}, ProtocolMismatch, "protocol 1, the worker 99: install the same version"),
        ({"run_id": "another"}, RunMismatch, "not another: it was started anew. Start the worker again"),
        ({"worker_id": ""}, InvalidContribution, "without a worker_id"),
        ({"manifest": pb.Manifest()}, UnsupportedModel, "no trained parameters"),
    ],
)
def test_a_hello_that_does_not_fit(change: dict, error: type[Exception], message: str) -> None:
    sim = Sim()
    request = hello("a", MANIFEST)
    for name, value in change.items():
        getattr(request, name).CopyFrom(value) if name == "manifest" else setattr(request, name, value)
    with pytest.raises(error, match=message):
        sim.run.hello(request, 0.0)
    assert sim.run.members.all() == []


def test_the_welcome_says_what_the_run_is() -> None:
    sim = Sim(sync_every=40, mixing_alpha=0.25, uplink_codec="e3m0", lease_seconds=20.0)
    sim.hello("a")
    welcome = sim.told("a")["welcome"]
    assert welcome.run_id == sim.run.run_id
    assert welcome.settings.sync_every == 40
    assert welcome.settings.mixing_alpha == 0.25
    assert welcome.settings.uplink_codec == pb.CODEC_E3M0
    assert welcome.layout_fingerprint == sim.run.layout.fingerprint
    assert welcome.heartbeat_seconds == 4.0
    assert not welcome.seeded
    sim.hello("b", run_id=sim.run.run_id)
    assert "welcome" in sim.told("b")


def test_another_model_is_refused_by_the_name_of_its_first_tensor() -> None:
    sim = Sim().enter("a")
    with pytest.raises(ManifestMismatch, match=r"'b' has another model than this run: tensor 1: the run has layers\.1"):
        sim.hello("b", manifest=manifest_of(100, 71))
    assert [m.worker_id for m in sim.run.members.all()] == ["a"]


# -- seeding --


def test_the_first_worker_seeds_and_all_are_told() -> None:
    sim = Sim(manifest=manifest_of(*SIZES, frozen=5))
    sim.hello("a")
    sim.hello("b")
    assert list(sim.told("a")) == ["welcome", "shard", "seed_wanted"]
    assert list(sim.told("b")) == ["welcome", "shard"]
    assert sim.seed("a", 0, 3.0).kind == sim.seed("a", 1, 4.0).kind == pb.OUTCOME_SEEDED
    assert not sim.run.seeded
    assert "seeded" not in sim.told("b")
    sim.push("a", flat([1, 2, 3, 4, 5]), 2, purpose=pb.PURPOSE_SEED)  # what is frozen belongs to it
    for worker in "ab":
        assert [v.version for v in sim.told(worker)["seeded"].versions] == [0, 0, 0]
    assert (sim.theta(0), sim.theta(1)) == (3.0, 4.0)
    sim.hello("c")
    welcome = sim.told("c")["welcome"]
    assert welcome.seeded
    assert [v.digest for v in welcome.versions] == [v.digest for v in sim.run.parameters.versions()]


def test_nothing_can_be_had_before_the_run_is_seeded() -> None:
    sim = Sim()
    with pytest.raises(NotReady, match="no worker has joined this run yet"):
        sim.run.check_readable(0)
    sim.hello("a")
    with pytest.raises(NotReady, match="no parameters yet"):
        sim.run.check_readable(0)
    with pytest.raises(NotReady):
        sim.say("a", "ready")
    with pytest.raises(NotReady, match="no open round"):
        sim.contribute("a")


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_when_the_seeder_goes_another_one_seeds_everything(how: str) -> None:
    sim = Sim()
    sim.hello("a")
    sim.at(5.0)
    sim.hello("b")
    sim.told("b")
    sim.seed("a", 0, 3.0)
    sim.say("a", "leave") if how == "leaves" else sim.at(10.0)
    assert "seed_wanted" in sim.told("b")
    sim.seed("b", 1, 7.0)
    assert not sim.run.seeded, "fragment 0 was another worker's"
    sim.seed("b", 0, 7.0)
    assert sim.run.seeded
    assert (sim.theta(0), sim.theta(1)) == (7.0, 7.0)


def test_a_seeder_that_lost_its_connection_is_asked_again_and_goes_on() -> None:
    sim = Sim()
    sim.hello("a")
    sim.seed("a", 0, 3.0)
    sim.told("a")
    sim.hello("a")
    assert "seed_wanted" in sim.told("a")
    sim.hello("b")
    assert "seed_wanted" not in sim.told("a"), "not because somebody else joins"
    sim.seed("a", 1, 3.0)
    assert sim.run.seeded


def test_a_seeder_that_was_away_for_longer_than_its_lease_goes_on() -> None:
    sim = Sim()
    sim.hello("a")
    sim.seed("a", 0, 3.0)
    sim.at(60.0)
    assert sim.run.members.live() == []
    sim.hello("a")
    assert "seed_wanted" in sim.told("a")
    sim.seed("a", 1, 3.0)
    assert sim.run.seeded
    assert sim.theta(0) == 3.0


def test_a_seeder_that_was_started_again_seeds_everything_anew() -> None:
    sim = Sim()
    sim.hello("a")
    sim.seed("a", 0, 3.0)
    sim.hello("a", generation=2)
    assert "seed_wanted" in sim.told("a")
    sim.seed("a", 1, 8.0, generation=2)
    assert not sim.run.seeded
    sim.seed("a", 0, 8.0, generation=2)
    assert (sim.theta(0), sim.theta(1)) == (8.0, 8.0)


def test_when_all_are_gone_before_the_seed_the_next_may_bring_another_model() -> None:
    sim = Sim()
    sim.hello("a")
    frames = frames_of(const(3.0))
    ticket = sim.run.begin_push(header("a", 0, frames, 2, purpose=pb.PURPOSE_SEED))
    sim.say("a", "leave")
    other = manifest_of(200)
    sim.hello("a", manifest=other, generation=2)
    assert "seed_wanted" in sim.told("a")
    ticket.assembly.add(ticket.places[0], read_frame(frames[0]))
    with pytest.raises(Superseded, match="'a' was joined by another process"):
        sim.run.finish_push(ticket, 0.0)
    assert not sim.run.seeded
    outcome = sim.push("a", flat(np.ones(200)), 0, purpose=pb.PURPOSE_SEED, generation=2)
    assert outcome.kind == pb.OUTCOME_SEEDED
    assert sim.run.seeded


def test_a_seed_that_is_not_needed_is_answered_and_changes_nothing() -> None:
    sim = Sim()
    sim.hello("a")
    sim.hello("b")
    assert sim.seed("b", 0, 9.0).kind == pb.OUTCOME_ALREADY_HAVE
    sim.seed("a", 0, 3.0)
    sim.seed("a", 1, 3.0)
    assert sim.seed("a", 1, 3.0).kind == pb.OUTCOME_ALREADY_HAVE, "its outcome was lost on the way"
    assert sim.seed("a", 1, 5.0).kind == pb.OUTCOME_ALREADY_HAVE
    assert (sim.theta(0), sim.theta(1)) == (3.0, 3.0)


def init_file(path: Path, *sizes: int, value: float = 5.0) -> InitialParameters:
    save_file({f"layers.{i}.weight": np.full(n, value, np.float32) for i, n in enumerate(sizes)}, path)
    return InitialParameters(path)


def test_initial_parameters_from_a_file(tmp_path: Path) -> None:
    sim = Sim(init=init_file(tmp_path / "init", *SIZES))
    sim.hello("a")
    told = sim.told("a")
    assert told["welcome"].seeded
    assert "seed_wanted" not in told
    assert sim.theta() == 5.0


def test_a_model_that_the_initial_file_does_not_hold(tmp_path: Path) -> None:
    sim = Sim(init=init_file(tmp_path / "init", *SIZES))
    with pytest.raises(ManifestMismatch, match=r"layers\.2\.weight float32\[3\] trained, which .*init does not hold"):
        sim.hello("a", manifest=manifest_of(*SIZES, 3))
    with pytest.raises(ManifestMismatch, match=r"layers\.1\.weight float32\[71\] trained; in .* F32\[70\]"):
        sim.hello("a", manifest=manifest_of(100, 71))
    sim.hello("a")
    assert sim.theta() == 5.0


def test_initial_parameters_that_cannot_be_are_never_replaced_by_a_workers(tmp_path: Path) -> None:
    sim = Sim(init=init_file(tmp_path / "init", *SIZES, value=np.inf))
    for _ in range(2):
        with pytest.raises(NonFiniteParameter, match=r"--init .*init: tensor 'layers\.0\.weight'"):
            sim.hello("a")
    assert sim.run.members.all() == []


def test_an_initial_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="junk: not a readable safetensors file"):
        InitialParameters(tmp_path / "junk")


# -- opening --


def test_the_run_waits_for_min_workers() -> None:
    sim = Sim(min_workers=3)
    for worker in "abc":
        sim.hello(worker)
    sim.seed("a", 0)
    sim.seed("a", 1)
    sim.say("a", "ready")
    sim.told("b")
    sim.say("b", "ready")
    for worker in "ab":
        assert sim.told(worker)["waiting"] == pb.Waiting(ready=2, needed=3)
    assert "waiting" not in sim.told("c")
    sim.say("b", "leave")
    sim.say("c", "ready")
    assert sim.told("c")["waiting"] == pb.Waiting(ready=2, needed=3), "who left does not count"
    sim.hello("d")
    sim.say("d", "ready")
    for worker in "acd":
        assert sim.told(worker)["opened"] == pb.Opened(start_step=0)
    assert sim.waits_for() == {"a", "c", "d"}


def test_a_late_joiner_gets_the_phase_and_is_expected_from_the_next_round_on() -> None:
    sim = Sim().enter("a", "b")
    sim.beat("a", 17)
    sim.beat("b", 15)
    sim.hello("late")
    sim.say("late", "ready")
    assert sim.told("late")["opened"] == pb.Opened(start_step=17)
    assert sim.waits_for() == {"a", "b"}
    sim.contribute("late", 3.0)
    sim.contribute("a", 3.0)
    sim.contribute("b", 0.0)
    assert sim.theta() == -2.0, "counted although it was not waited for"
    assert sim.waits_for() == {"a", "b", "late"}


# -- rounds --


def test_a_round_moves_theta_by_the_mean_and_tells_each_worker_its_fate() -> None:
    sim = Sim().enter("a", "b")
    sim.hello("watcher")
    assert sim.contribute("a", 1.0).kind == pb.OUTCOME_STAGED
    assert sim.versions() == [0, 0]
    sim.contribute("b", 3.0)
    assert sim.versions() == [1, 0]
    assert sim.theta() == -2.0
    digest = sim.run.parameters.digest(0)
    for worker, fate in {"a": pb.FATE_COUNTED, "b": pb.FATE_COUNTED, "watcher": pb.FATE_NOT_COUNTED}.items():
        assert sim.told(worker)["committed"] == pb.Committed(fragment=0, version=1, fate=fate, digest=digest)
    counts = {m.worker_id: (m.counted, m.not_counted) for m in sim.run.members.all()}
    assert counts == {"a": (1, 0), "b": (1, 0), "watcher": (0, 0)}


def test_weights_are_tokens() -> None:
    sim = Sim(weighting="tokens").enter("a", "b")
    sim.contribute("a", 0.0, tokens=3)
    sim.contribute("b", 4.0, tokens=1)
    assert sim.theta() == -1.0


def test_late_and_repeated_and_conflicting_pushes() -> None:
    sim = Sim(grace_seconds=2.0).enter("a", "b")
    assert sim.contribute("a", 1.0).kind == pb.OUTCOME_STAGED
    assert sim.contribute("a", 1.0).kind == pb.OUTCOME_ALREADY_HAVE
    assert sim.contribute("a", 2.0).kind == pb.OUTCOME_CONFLICT
    sim.at(2.0)
    assert sim.theta() == -1.0
    assert sim.told("b")["committed"].fate == pb.FATE_NOT_COUNTED
    late = sim.contribute("b", 5.0, base_version=0)
    assert (late.kind, late.version) == (pb.OUTCOME_CLOSED, 1)
    assert sim.contribute("a", 1.0, base_version=0) == pb.Outcome(kind=pb.OUTCOME_COUNTED, version=1)
    assert sim.contribute("a", 2.0, base_version=0) == pb.Outcome(kind=pb.OUTCOME_CONFLICT, version=1)
    assert sim.theta() == -1.0
    assert {m.worker_id: m.not_counted for m in sim.run.members.all()} == {"a": 0, "b": 1}


def test_a_push_goes_on_where_it_broke() -> None:
    sim = Sim(manifest=manifest_of(600_000))
    sim.hello("a")
    values = flat(np.arange(600_000) % 7)
    sim.push("a", values, purpose=pb.PURPOSE_SEED)
    sim.say("a", "ready")
    frames = frames_of(values)
    message = header("a", 0, frames, values.size // 64)
    first = sim.run.begin_push(message)
    first.assembly.add(first.places[1], read_frame(frames[1]))
    second = sim.run.begin_push(message)
    assert second.assembly.held(second.places) == [1]
    for i in (0, 2):
        second.assembly.add(second.places[i], read_frame(frames[i]))
    assert sim.run.finish_push(second, 0.0).kind == pb.OUTCOME_STAGED
    assert sim.run.finish_push(first, 0.0).kind == pb.OUTCOME_ALREADY_HAVE, "the broken stream comes to its end"


def test_a_worker_that_retrained_before_its_push_was_complete_may_bring_other_bytes() -> None:
    sim = Sim().enter("a")
    frames = frames_of(const(1.0))
    abandoned = sim.run.begin_push(header("a", 0, frames, 2))
    assert sim.contribute("a", 2.0).kind == pb.OUTCOME_STAGED
    assert sim.theta() == -2.0
    abandoned.assembly.add(abandoned.places[0], read_frame(frames[0]))
    assert sim.run.finish_push(abandoned, 0.0).kind == pb.OUTCOME_CONFLICT
    assert sim.theta() == -2.0


def test_a_contribution_in_parts_is_held_until_it_is_whole() -> None:
    sim = Sim().enter("a")
    halves = [frames_of(const(4.0)[:64]), frames_of(const(4.0)[64:], first_block=1)]
    parts = [[pb.Part(first_block=i, num_blocks=1)] for i in range(2)]
    first, second = (sim.push("a", const(4.0), frames=f, parts=p) for f, p in zip(halves, parts, strict=True))
    assert (first.kind, second.kind) == (pb.OUTCOME_PART_HELD, pb.OUTCOME_STAGED)
    assert sim.theta() == -4.0


def test_what_was_half_received_is_dropped_when_its_round_is_over() -> None:
    sim = Sim(grace_seconds=0.0).enter("a", "b")
    frames = frames_of(const(9.0))
    ticket = sim.run.begin_push(header("b", 0, frames, 2))
    sim.contribute("a", 1.0)
    assert sim.versions() == [1, 0]
    ticket.assembly.add(ticket.places[0], read_frame(frames[0]))
    assert sim.run.finish_push(ticket, 0.0) == pb.Outcome(kind=pb.OUTCOME_CLOSED, version=1)
    assert sim.theta() == -1.0


def test_what_was_never_completed_is_not_kept() -> None:
    sim = Sim()

    def half(worker: str, **fields) -> weakref.ref:
        frames = frames_of(const(9.0))
        return weakref.ref(sim.run.begin_push(header(worker, 0, frames, 2, **fields)).assembly)

    sim.hello("dead")
    seed = half("dead", purpose=pb.PURPOSE_SEED)
    sim.say("dead", "leave")
    sim.enter("a")
    sim.hello("b")
    contribution = half("b")
    assert contribution() is not None
    sim.contribute("a", 1.0)
    assert sim.versions() == [1, 0]
    assert seed() is contribution() is None


def test_a_round_whose_mean_overflows_is_void() -> None:
    sim = Sim(outer_lr=1e6).enter("a", "b")
    sim.contribute("a", 1.0)
    sim.contribute("b", 2.0**125)
    assert sim.versions() == [1, 0]
    assert sim.theta() == 0.0
    for worker in "ab":
        assert sim.told(worker)["committed"].fate == pb.FATE_NOT_COUNTED
    assert sim.contribute("a", 1.0, base_version=0).kind == pb.OUTCOME_CLOSED
    sim.contribute("a", 1.0)
    sim.contribute("b", 1.0)
    assert sim.theta() == -1e6


INVALID = {
    "unknown purpose": ({"purpose": pb.PURPOSE_UNSPECIFIED}, "unknown purpose 0"),
    "a purpose of the future": ({"purpose": 9}, "unknown purpose 9"),
    "no such fragment": ({"fragment": 2}, "'a' pushed fragment 2; this run has 2"),
    "another codec": ({"codec": pb.CODEC_INT4}, "'a' pushed codec 4 for fragment 0; this run takes fp32"),
    "no codec": ({"codec": pb.CODEC_UNSPECIFIED}, "this run takes fp32"),
    "no tokens": ({"tokens": 0}, "'a' pushed a contribution without any step or token"),
    "no steps": ({"steps": 0}, "'a' pushed a contribution without any step or token"),
    "the future": ({"base_version": 1}, "against version 1, but the newest is 0"),
    "no parts": ({"parts": []}, "make 0 frames"),
    "parts beyond the end": ({"parts": [pb.Part(first_block=1, num_blocks=2)]}, "beyond its 2 blocks"),
    "too few digests": ({"frame_digests": []}, "make 1 frames, but 0 digests"),
    "too many digests": ({"frame_digests": [1, 2]}, "make 1 frames, but 2 digests"),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_no_contribution(name: str) -> None:
    changes, message = INVALID[name]
    sim = Sim().enter("a")
    with pytest.raises(InvalidContribution, match=message):
        sim.run.begin_push(header("a", 0, frames_of(const(1.0)), 2, **changes))
    assert sim.contribute("a", 1.0).kind == pb.OUTCOME_STAGED, "the worker is none the worse"


def test_what_is_no_seed() -> None:
    sim = Sim()
    sim.hello("a")
    for changes, message in (
        ({"codec": pb.CODEC_INT4}, "takes fp32"),
        ({"fragment": 2}, "this run has 2"),
        ({"base_version": 1}, "as version 1; it is version 0"),
    ):
        with pytest.raises(InvalidContribution, match=message):
            sim.push("a", const(1.0), **({"purpose": pb.PURPOSE_SEED} | changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"run_id": "another"}, RunMismatch),
        ({"worker_id": "stranger"}, NotMember),
        ({"generation": 2}, Superseded),
    ],
)
def test_a_push_of_somebody_else(changes: dict, error: type[Exception]) -> None:
    sim = Sim().enter("a")
    with pytest.raises(error):
        sim.run.begin_push(header("a", 0, frames_of(const(1.0)), 2, **changes))


def test_no_such_fragment_to_read() -> None:
    sim = Sim().enter("a")
    sim.run.check_readable(1)
    with pytest.raises(InvalidContribution, match="asked for fragment 2; this run has 2"):
        sim.run.check_readable(2)


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


# -- promise 2: order does not matter --


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_arrival_order_and_chunking_do_not_change_a_bit(data: st.DataObject) -> None:
    random = np.random.default_rng(11)
    sizes = (40_000, 9_000)
    manifest = manifest_of(*sizes)
    config = {"uplink_codec": "int8", "outer_optimizer": "nesterov", "weighting": "tokens"}
    config |= {"downlink_codec": data.draw(st.sampled_from(["fp32", "int4"]))}
    config |= {"outer_lr": 0.7, "outer_momentum": 0.9, "min_workers": 4}
    workers = "abcd"
    payloads = {
        (w, f, v): frames_of(random.standard_normal(sizes[f]).astype(np.float32), Format.INT8)
        for w, f, v in itertools.product(workers, range(2), range(2))
    }

    def digests(arrange) -> list[int]:
        sim = Sim(manifest=manifest, **config)
        for worker in arrange(workers):
            sim.hello(worker)
        seeder = sim.run.members.live()[0].worker_id
        for f, n in enumerate(sizes):
            sim.push(seeder, flat(np.linspace(-1, 1, n)), f, purpose=pb.PURPOSE_SEED)
        for worker in arrange(workers):
            sim.say(worker, "ready")
        for version in range(2):
            arrivals = []
            for worker, f in arrange(list(itertools.product(workers, range(2)))):
                frames = payloads[worker, f, version]
                tokens = 10 + ord(worker) * (f + 1)
                message = header(worker, f, frames, -(-sizes[f] // 64), codec=pb.CODEC_INT8, tokens=tokens)
                message.base_version = version
                ticket = sim.run.begin_push(message)
                arrivals += [(ticket, i, frame) for i, frame in enumerate(frames)]
            left = {id(t): len(t.places) for t, _, _ in arrivals}
            for ticket, i, frame in arrange(arrivals):
                ticket.assembly.add(ticket.places[i], read_frame(frame))
                left[id(ticket)] -= 1
                if not left[id(ticket)]:
                    assert sim.run.finish_push(ticket, sim.now).kind == pb.OUTCOME_STAGED
                    sim.settle()
        assert sim.versions() == [2, 2]
        return [v.digest for v in sim.run.parameters.versions()]

    def shuffled(items: Iterable) -> list:
        items = list(items)
        return [items[i] for i in data.draw(st.permutations(range(len(items))))]

    assert digests(shuffled) == digests(list)


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


# -- purity --


@pytest.mark.parametrize(
    "name", ["run", "rounds", "members", "pushes", "assembly", "parameters", "outer", "checkpoint"]
)
def test_the_algorithm_knows_no_clock_no_loop_and_no_network(name: str) -> None:
    tree = ast.parse((Path(diloco_server.__file__).parent / f"{name}.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    roots = {module.split(".")[0] for module in imported}
    assert not roots & {"time", "datetime", "asyncio", "grpc", "threading", "random", "torch", "diloco_client"}


def test_parts_of_one_contribution_must_agree_on_the_work_behind_it() -> None:
    sim = Sim().enter("a")
    frames = frames_of(const(1.0))
    first = header("a", 0, frames, 2)
    sim.run.begin_push(first)
    with pytest.raises(InvalidContribution, match="all parts must say the same"):
        sim.run.begin_push(header("a", 0, frames, 2, tokens=first.tokens + 1))


def test_what_a_superseded_process_was_pushing_is_not_staged() -> None:
    sim = Sim().enter("a")
    frames = frames_of(const(1.0))
    ticket = sim.run.begin_push(header("a", 0, frames, 2))
    sim.hello("a", generation=2)
    ticket.assembly.add(ticket.places[0], read_frame(frames[0]))
    with pytest.raises(Superseded):
        sim.run.finish_push(ticket, 0.0)


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


def test_parts_of_two_processes_are_never_mixed() -> None:
    sim = Sim().enter("a")
    halves = [frames_of(np.full(64, 1.0), first_block=block) for block in (0, 1)]
    parts = [{"parts": [pb.Part(first_block=block, num_blocks=1)], "frames": halves[block]} for block in (0, 1)]
    assert sim.contribute("a", tokens=5, steps=5, **parts[0]).kind == pb.OUTCOME_PART_HELD
    sim.hello("a", generation=2)
    sim.say("a", "ready", generation=2)
    # Not refused for saying something else than the former process, nor made whole by its half.
    assert sim.contribute("a", generation=2, **parts[1]).kind == pb.OUTCOME_PART_HELD
    assert sim.contribute("a", generation=2, **parts[0]).kind == pb.OUTCOME_STAGED


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
