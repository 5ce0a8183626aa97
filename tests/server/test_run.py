"""The run as a state machine: messages and the time go in, what is to be told comes out. Its rounds."""

from __future__ import annotations

import ast
import itertools
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from driven_run import Sim, const
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_worker import flat, frames_of, header, manifest_of

import diloco_server
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format, read_frame
from diloco_proto.errors import (
    InvalidContribution,
    NotMember,
    RunMismatch,
    Superseded,
)
from diloco_server import parameters
from diloco_server.config import DELAYED


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


def test_the_last_update_goes_when_the_round_of_the_next_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    sim, values = Sim().enter("a", "b"), flat(np.random.default_rng(0).standard_normal(128))
    for worker in "ab":
        sim.push(worker, values)
    monkeypatch.setattr(sim, "settle", lambda: None)
    for worker in "ab":
        sim.push(worker, values, base_version=1)
        assert [u.version for u in sim.run.parameters.updates_since(0, 0) or ()] == [1]
    (close,) = sim.run.due(sim.now)
    assert sim.run.parameters.updates_since(0, 0) is None
    sim.run.publish(sim.run.commit(close), sim.now)
    assert [u.version for u in sim.run.parameters.updates_since(0, 1) or ()] == [2]


@pytest.mark.parametrize(
    ("optimizer", "contributors", "kept"),
    [
        ("sgd", ("ab", "ab"), []),
        ("sgd", ("ab", "a"), [1, 2]),
        (DELAYED, ("a", "a"), []),
        (DELAYED, ("ab", "a"), [1, 2, 3]),
    ],
)
def test_small_updates_are_kept_for_a_worker_that_falls_behind(
    optimizer: str, contributors: tuple[str, str], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until all have shown, by contributions on top of it, that they have what the update leads to."""
    monkeypatch.setattr(parameters, "KEPT_SHARE", 1.0)
    sim = Sim(downlink_codec="int3", grace_seconds=0.5, outer_optimizer=optimizer).enter(*contributors[0])
    values = flat(np.random.default_rng(0).standard_normal(128))
    for version, workers in enumerate(contributors):
        for worker in workers:
            sim.push(worker, values, base_version=version)
        sim.at(sim.now + 1.0)
    assert [u.version for u in sim.run.parameters.updates_since(0, 0) or ()] == kept
    newest = sim.run.parameters.version(0)
    assert [u.version for u in sim.run.parameters.updates_since(0, newest - 1) or ()] == [newest]


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
