"""Who is an island, what its ranks say to one another, and what they make of it."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ranks import free_port, ranks_of, results

from diloco_client.flights import Base
from diloco_client.island_courier import IslandCourier
from diloco_client.ledger import Fetched, Ledger, Verdict
from diloco_client.spans import Span
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Format, digest
from diloco_proto.manifest import Fragment, Role
from diloco_server import RunConfig, serve

BOTH = frozenset({0, 1})


@pytest.fixture(scope="module")
def came_to(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the attempts of two ranks came to."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    with serve(RunConfig(sync_every=3, num_fragments=1)) as server:
        port = free_port()
        processes = ranks_of("talks", "attempts", [(rank, port, server.address, out) for rank in (0, 1)])
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    return results(out, 2)


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
    ],
)
def test_what_one_rank_refuses_all_refuse(came_to: list[dict[str, Any]], attempt: str, error: str, match: str) -> None:
    for rank in came_to:
        kind, _, text = rank[attempt].partition(": ")
        assert kind == error
        assert re.search(match, text)


def test_ranks_of_a_group_that_is_named_are_replicas(came_to: list[dict[str, Any]]) -> None:
    assert came_to[0]["replicas"] == came_to[1]["replicas"]
    assert came_to[0]["replicas"].startswith("[{")


def test_words_of_any_length_are_heard(came_to: list[dict[str, Any]]) -> None:
    assert [rank["words"] for rank in came_to] == ["told", "told"]


def test_who_waits_for_a_rank_that_has_gone_is_told(came_to: list[dict[str, Any]]) -> None:
    assert came_to[0]["gone"].startswith("IslandBroken: rank 0 of 2 has lost another rank")
    assert came_to[1]["gone"] == "left"


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


def first_of_two() -> IslandCourier:
    """The courier of rank 0, which owns block 0 of two and holds version 0; version 1 is announced."""
    binding = SimpleNamespace(
        spans=[Span(WHOLE, 0, 1)], layout=SimpleNamespace(num_scheduled=1, scheduled=(WHOLE,), fragments=(WHOLE,))
    )
    island = SimpleNamespace(owners=lambda blocks: BOTH)
    council: Any = SimpleNamespace(island=island, seat=lambda s: None, unseat=lambda s: None, news=lambda: None)
    courier = IslandCourier(None, binding, Format.INT4, pb.PushHeader, council)  # type: ignore[arg-type]
    courier._flights.bases = [Base(0, np.zeros(BLOCK, np.float32))]
    courier.on_committed(pb.Committed(fragment=0, version=1))
    return courier


def its(version: int, part: int) -> dict[str, Any]:
    """What rank 1 says."""
    return {"fetched": [(0, version, part, ANNOUNCED)]}


def test_what_does_not_add_up_is_fetched_afresh_by_all() -> None:
    courier = first_of_two()
    assert courier._to_fetch(0) == (True, courier.bases[0])
    for _ in range(2):
        courier._fetched(0, Base(1, MINE, ANNOUNCED))
        assert not courier._to_fetch(0)[0], "it waits for the others"
        courier.hear([courier.say(), its(1, part=1)])
        assert courier._to_fetch(0) == (True, None), "a snapshot"
        assert courier.newest(0).version == 0
    courier._fetched(0, Base(1, MINE, ANNOUNCED))
    courier.hear([courier.say(), its(1, digest(ITS, 1))])
    assert courier.newest(0) == Base(1, MINE, ANNOUNCED)
    assert not courier._to_fetch(0)[0]


def test_who_is_behind_others_fetches_on() -> None:
    courier = first_of_two()
    courier._fetched(0, behind := Base(1, MINE, 7))
    courier.hear([courier.say(), its(2, digest(ITS, 1))])
    assert courier._to_fetch(0) == (True, behind)
    courier._fetched(0, Base(2, MINE, ANNOUNCED))
    courier.hear([courier.say(), {}])
    assert courier.newest(0).version == 2


def test_what_was_fetched_of_a_run_that_is_rolled_back_is_dropped() -> None:
    courier = first_of_two()
    courier.on_welcome("run", [])
    courier._fetched(0, Base(1, MINE, ANNOUNCED))
    word = courier.say()
    courier.on_welcome("run.1", [])
    courier.hear([{}, its(1, digest(ITS, 1))])
    assert word
    assert courier._to_fetch(0) == (True, None)
    assert courier.newest(0).version == 0
