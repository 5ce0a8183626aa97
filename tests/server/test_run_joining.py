"""The run as a state machine: saying hello, seeding, opening."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from driven_run import MANIFEST, SIZES, Sim, const
from raw_worker import flat, frames_of, header, hello, manifest_of
from safetensors.numpy import save_file

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import read_frame
from diloco_proto.errors import (
    ConfigError,
    InvalidContribution,
    ManifestMismatch,
    NonFiniteParameter,
    NotReady,
    ProtocolMismatch,
    RunMismatch,
    Superseded,
    UnsupportedModel,
)
from diloco_server.checkpoint import InitialParameters

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
