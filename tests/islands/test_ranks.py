"""Who is an island, what its ranks say to one another, and what they make of it."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import free_port, ranks_of, results

from diloco_client.flights import Base, Flight
from diloco_client.island import dtensors
from diloco_client.island.courier import IslandCourier
from diloco_client.island.ledger import Fetched, Ledger, Verdict
from diloco_client.landing import Target
from diloco_client.spans import Span
from diloco_client.transport import Retry, Transport
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Format, digest
from diloco_proto.manifest import Fragment, Role
from diloco_server import RunConfig, serve

BOTH = frozenset({0, 1})


@pytest.fixture(scope="module")
def came_to(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the attempts of two ranks came to."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    with serve(RunConfig(sync_every=3, num_fragments=1, overlap_steps=1)) as server:
        port = free_port()
        processes = ranks_of("talks", "attempts", [(rank, port, server.address, out) for rank in (0, 1)])
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    return results(out, 2)


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What those of four ranks came to, in islands of two."""
    out, port = tmp_path_factory.mktemp("parts") / "out", free_port()
    for process in ranks_of("talks", "parts", [(rank, port, out) for rank in range(4)]):
        process.join(60)
        assert process.exitcode == 0
    return results(out, 4)


@pytest.mark.parametrize(
    ("attempt", "error", "match"),
    [
        ("plain", "UnclearIsland", r"ranks, and its model is neither .*island=False if each process"),
        ("true", "UnclearIsland", "pass the process group"),
        ("alone but wrapped", "UnclearIsland", "they are one worker, leave island out"),
        ("alone but sharded", "UnclearIsland", "they are one worker, leave island out"),
        ("two models", "ManifestMismatch", "rank 1 of this island has another model"),
        ("fsdp1", "UnsupportedModel", "fully_shard"),
        ("frozen on one", "UnsupportedModel", "none of the model's parameters is both trainable"),
        ("agreed", "StateMismatch", "only rank 1 finds fault"),
        (
            "out of step",
            "IslandBroken",
            "rank 0 is at 'step' after inner step 7 and rank 1 is at 'work' after",
        ),
        ("old torch", "UnsupportedModel", r"which diloco can synchronise from torch 2\.6 on"),
        ("diverged", "NonFiniteParameter", "tensor '0.weight' holds NaN"),
        ("changed buffer", "UnsupportedModel", "buffer '1.running_mean' had the shape"),
        ("two states", "StateMismatch", "rank 1 of this island takes up another state"),
    ],
)
def test_what_one_rank_refuses_all_refuse(came_to: list[dict[str, Any]], attempt: str, error: str, match: str) -> None:
    for rank in came_to:
        kind, _, text = rank[attempt].partition(": ")
        assert kind == error, text
        assert re.search(match, text)


@pytest.mark.parametrize("attempt", ["sliced", "by hand", "replicate"])
def test_whether_the_rest_of_a_mesh_holds_replicas_has_to_be_said(in_parts: list[dict[str, Any]], attempt: str) -> None:
    for rank in in_parts:
        assert re.search("UnclearIsland: .* sharded over a part of a larger mesh.*Pass island=group", rank[attempt])
        assert rank["all"] == "4"


def test_islands_are_parts_of_the_world_whatever_else_their_ranks_are_in(in_parts: list[dict[str, Any]]) -> None:
    assert [rank["two islands"] for rank in in_parts] == ["[0, 1]", "[0, 1]", "[2, 3]", "[2, 3]"]


def test_a_group_of_one_rank_is_no_island_and_no_other_rank_is_of_it(came_to: list[dict[str, Any]]) -> None:
    assert came_to[0]["stranger"] == "None"
    assert came_to[1]["stranger"].startswith("UnclearIsland: join(island=group): rank 1, which calls this, is not one")


def test_theta_is_a_copy_on_the_cpu(came_to: list[dict[str, Any]]) -> None:
    assert [rank["theta"] for rank in came_to] == ["on the cpu"] * 2


def test_an_island_trains_on_while_one_rank_does_not_reach_the_server(came_to: list[dict[str, Any]]) -> None:
    assert [rank["cut off"] for rank in came_to] == ["trained on, and all was counted"] * 2


def test_ranks_of_a_group_that_is_named_are_replicas(came_to: list[dict[str, Any]]) -> None:
    assert came_to[0]["replicas"] == came_to[1]["replicas"]
    assert came_to[0]["replicas"].startswith("[{")


def test_words_of_any_length_are_heard(came_to: list[dict[str, Any]]) -> None:
    assert [rank["words"] for rank in came_to] == ["told", "told"]


def test_who_waits_for_a_rank_that_has_gone_is_told(
    came_to: list[dict[str, Any]], in_parts: list[dict[str, Any]]
) -> None:
    for rank in (came_to[0], in_parts[0], in_parts[2]):
        assert rank["gone"].startswith("IslandBroken: rank 0 of 2 has lost another rank")
    for rank in (came_to[1], in_parts[1], in_parts[3]):
        assert rank["gone"] == "IslandBroken: this worker has left its island"


def outcome(kind: str, version: int = 0) -> pb.Outcome:
    return pb.Outcome(kind=f"OUTCOME_{kind}", version=version)


@pytest.mark.parametrize(
    ("kinds", "whole"),
    [
        (("PART_HELD", "STAGED"), "STAGED"),
        (("STAGED", "PART_HELD"), "STAGED"),
        (("PART_HELD", "CLOSED"), "CLOSED"),
        (("ALREADY_HAVE", "COUNTED"), "COUNTED"),
        (("PART_HELD", "CONFLICT"), "CONFLICT"),
        (("RESYNC", "PART_HELD"), "RESYNC"),
        (("PART_HELD", "PART_HELD"), "PART_HELD"),
    ],
)
def test_the_outcome_of_a_contribution_is_that_of_its_most_telling_part(kinds: tuple[str, str], whole: str) -> None:
    ledger = Ledger([BOTH])
    ledger.sent(0)
    for rank, kind in enumerate(kinds):
        assert ledger.outcome(0) is None
        ledger.answered(rank, 0, ledger.turn(0), outcome(kind, version=3 + rank))
    assert ledger.outcome(0) == outcome(whole, version=4)


def test_an_answer_to_a_former_push_is_none_to_this_one() -> None:
    ledger = Ledger([BOTH])
    ledger.sent(0)
    former = ledger.turn(0)
    ledger.answered(0, 0, former, outcome("STAGED"))
    ledger.sent(0)
    ledger.answered(1, 0, former, outcome("STAGED"))
    assert ledger.outcome(0) is None


def test_parts_are_worth_something_once_all_are_of_one_version_and_add_up() -> None:
    ledger = Ledger([BOTH])
    ledger.has(0, 0, Fetched(version=5, digest=2**64 - 1, announced=1))
    assert ledger.verdict(0) is Verdict.OPEN
    ledger.has(1, 0, Fetched(version=4, digest=7, announced=9))
    assert (ledger.verdict(0), ledger.newest(0)) == (Verdict.OPEN, 5)
    ledger.has(1, 0, Fetched(version=5, digest=2, announced=1))
    assert ledger.verdict(0) is Verdict.SOUND
    ledger.has(1, 0, Fetched(version=5, digest=3, announced=1))
    assert ledger.verdict(0) is Verdict.DAMAGED
    ledger.clear_fetched(0)
    assert (ledger.verdict(0), ledger.newest(0)) == (Verdict.OPEN, -1)


def test_ranks_without_a_part_are_not_waited_for() -> None:
    ledger = Ledger([frozenset({1})])
    ledger.sent(0)
    ledger.answered(1, 0, ledger.turn(0), outcome("STAGED"))
    ledger.has(1, 0, Fetched(version=1, digest=6, announced=6))
    assert ledger.outcome(0) == outcome("STAGED")
    assert ledger.verdict(0) is Verdict.SOUND


WHOLE = Fragment(0, Role.TRAINED, (), 2 * BLOCK)
MINE = np.arange(BLOCK, dtype=np.float32)
ITS = np.arange(BLOCK, dtype=np.float32) + 5
ANNOUNCED = (digest(MINE) + digest(ITS, 1)) % (1 << 64)


def first_of_two(version: int = 1) -> IslandCourier:
    """The courier of rank 0, which owns block 0 of two and holds version 0; this one is announced."""
    binding = SimpleNamespace(
        spans=[Span(WHOLE, 0, 1)], layout=SimpleNamespace(num_scheduled=1, scheduled=(WHOLE,), fragments=(WHOLE,))
    )
    island = SimpleNamespace(owners=lambda blocks: BOTH)
    council: Any = SimpleNamespace(
        island=island, seat=lambda s: None, unseat=lambda s: None, news=lambda: None, log=logging.getLogger("diloco")
    )
    transport = SimpleNamespace(out_of_reach=False)
    courier = IslandCourier(transport, binding, Format.INT4, pb.PushHeader, council)  # type: ignore[arg-type]
    courier._flights.bases = [Base(0, np.zeros(BLOCK, np.float32))]
    courier.on_committed(pb.Committed(fragment=0, version=version))
    return courier


def its(version: int, part: int) -> dict[str, Any]:
    """What rank 1 says."""
    return {"fetched": [(0, version, part, ANNOUNCED)]}


def test_what_does_not_add_up_is_fetched_afresh_by_all() -> None:
    courier = first_of_two()
    assert courier._to_fetch(0) == (True, courier.bases[0])
    for _ in range(2):
        courier._fetched(0, Base(1, MINE, ANNOUNCED), courier.run_id)
        assert not courier._to_fetch(0)[0], "it waits for the others"
        courier.hear([courier.say(), its(1, part=1)])
        assert courier._to_fetch(0) == (True, None), "a snapshot"
        assert courier.newest(0).version == 0
    courier._fetched(0, Base(1, MINE, ANNOUNCED), courier.run_id)
    courier.hear([courier.say(), its(1, digest(ITS, 1))])
    assert courier.newest(0) == Base(1, MINE, ANNOUNCED)
    assert not courier._to_fetch(0)[0]


def test_who_is_behind_others_fetches_on() -> None:
    courier = first_of_two()
    courier._fetched(0, behind := Base(1, MINE, 7), courier.run_id)
    courier.hear([courier.say(), its(2, digest(ITS, 1))])
    assert courier._to_fetch(0) == (True, behind)
    courier._fetched(0, Base(2, MINE, ANNOUNCED), courier.run_id)
    courier.hear([courier.say(), {}])
    assert courier.newest(0).version == 2


def test_what_was_fetched_of_a_run_that_is_rolled_back_is_dropped() -> None:
    courier = first_of_two()
    courier.on_welcome("run", [])
    courier._fetched(0, Base(1, MINE, ANNOUNCED), courier.run_id)
    word = courier.say()
    courier.on_welcome("run.1", [])
    courier.hear([{}, its(1, digest(ITS, 1))])
    assert word
    assert courier._to_fetch(0) == (True, None)
    assert courier.newest(0).version == 0


def answered(courier: IslandCourier, kinds: tuple[str, str], version: int = 0) -> list[dict[str, Any]]:
    """What both ranks say of the answers to the last push."""
    turn = courier._ledger.turn(0)
    return [{"pushed": [(0, turn, pb.OutcomeKind.Value(f"OUTCOME_{kind}"), version)]} for kind in kinds]


def test_a_fate_that_was_told_to_nobody_is_asked_for() -> None:
    """The session is cut, the round's event goes with it, and the answers are told after the new welcome."""
    courier = first_of_two(version=0)
    base = courier.bases[0]
    flight = Flight(
        fragment=0, base=base, captured=None, step=1, due_step=2, steps=1, tokens=1, tokens_until=1, since_version=0,
        feedback=False, residual=None,
    )  # fmt: skip
    courier.push(flight)
    first, turn = answered(courier, ("PART_HELD", "STAGED")), courier._ledger.turn(0)
    courier.on_lost()
    courier.on_versions([pb.FragmentVersion(fragment=0, version=1)])
    courier.hear(first)
    assert (courier._ledger.turn(0), flight.counted) == (turn + 1, None), "all push once more"
    assert not courier.staged()
    courier.hear(answered(courier, ("COUNTED", "COUNTED"), version=1))
    assert flight.counted is True


def test_what_the_server_has_forgotten_a_part_of_is_pushed_again() -> None:
    courier = first_of_two(version=0)
    flight = Flight(
        fragment=0, base=courier.bases[0], captured=None, step=1, due_step=2, steps=1, tokens=1, tokens_until=1,
        since_version=0, feedback=False, residual=None,
    )  # fmt: skip
    courier.push(flight)
    courier.hear(answered(courier, ("PART_HELD", "PART_HELD")))
    assert not courier.staged()
    courier.hear(answered(courier, ("ALREADY_HAVE", "PART_HELD")))
    assert courier.staged()


def test_without_the_names_of_a_newer_torch_no_tensor_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", None)
    spec = importlib.util.spec_from_file_location("old_dtensors", dtensors.__file__)
    assert spec is not None
    assert spec.loader is not None
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    assert not isinstance(torch.zeros(1), old.DTensor)
    assert not isinstance(torch.nn.Linear(1, 1), old.FSDPModule)


def test_a_transfer_that_gets_no_connection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diloco_client.transport.FAILING_SECONDS", 0.1)
    transport = Transport("127.0.0.1:1", Retry(first=0.01, cap=0.02))
    assert not transport.out_of_reach

    def pull() -> None:
        with pytest.raises(ConnectionError):
            transport.pull(pb.PullRequest(), Target(None, np.empty(0, np.float32)))

    pulling = threading.Thread(target=pull)
    pulling.start()
    while not transport.out_of_reach:
        assert pulling.is_alive()
    transport.close()
    pulling.join()
    assert not transport.out_of_reach
