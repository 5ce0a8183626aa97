"""What an island saves with torch.distributed.checkpoint, and takes up again; torchrun that starts it anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Site, results, site, torchrun
from test_islands import QUICK, digests, until, workers

import diloco_client
from diloco_client.island.link import unlabelled
from diloco_client.resume import read
from diloco_proto.errors import StateMismatch
from diloco_server import RunConfig, serve

SAVED_AT = 11
"""Between a push and its merge."""


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize(
    ("kind", "settings"), [("fsdp", {"uplink_codec": "int2", "error_feedback": "on"}), ("ddp", {})]
)
def test_an_island_resumes_as_if_nothing_had_been(here: Site, kind: str, settings: dict[str, Any]) -> None:
    ends = []
    for saves in (False, True):
        with serve(RunConfig(**QUICK | settings)) as server:
            resumed: dict[str, object] = {}
            if saves:
                path = here.folder / "checkpoint"
                first = here.start(kind, 2, server.address, "island", norm=True, save=path, save_at=SAVED_AT)
                assert first.ends() == [0, 0]
                resumed = {"load": path}
            island = here.start(kind, 2, server.address, "island", norm=True, **resumed)
            ends.append(island.results())
            assert ends[-1][0]["digests"] == digests(server.address)
    plain, after = ends
    for one, other in zip(plain, after, strict=True):
        assert other["theta"] == one["theta"]
        for name in ("steps", "rounds", "counted", "not_counted"):
            assert other["stats"][name] == one["stats"][name], name


def test_a_state_of_other_ranks_is_refused_by_name() -> None:
    class Two:
        rank, size = 1, 2

    state = {"rank0": {"ranks": 4}, "rank1": {"ranks": 4}}
    with pytest.raises(StateMismatch, match="an island of 4 ranks and this one has 2"):
        unlabelled(state, Two())  # type: ignore[arg-type]
    with pytest.raises(StateMismatch, match="nothing of rank 1"):
        unlabelled({"rank0": {"ranks": 1}}, Two())  # type: ignore[arg-type]
    with pytest.raises(StateMismatch, match="nothing of rank 1"):
        unlabelled({"format": 1, "run_id": "plain"}, Two())  # type: ignore[arg-type]
    with pytest.raises(StateMismatch, match="an island of several ranks"):
        read(state)


def test_torchrun_starts_an_island_anew_and_it_is_the_same_worker(here: Site) -> None:
    """A rank kills itself; the agent ends the others and starts all again. The run has gone on meanwhile."""
    with serve(RunConfig(**QUICK | {"grace_seconds": 1.0}, lease_seconds=3.0)) as server:
        flag, out = here.folder / "flag", here.folder / "island"
        plain = here.start("plain", 1, server.address, "plain", steps=100_000, pace=0.1, flag=flag)
        until(lambda: "plain" in workers(server.address), "the first worker")
        options = {"flag": flag, "steps": 100_000, "pace": 0.02, "die_at": 20}
        with torchrun("fsdp", 2, server.address, out, **options) as agent:
            died = here.folder / "island.died"
            until(died.exists, "the rank's death")
            (name,) = workers(server.address).keys() - {"plain"}
            before = workers(server.address)[name]["counted"]
            until(lambda: workers(server.address)[name]["counted"] > before + 4, "the island's return")
            assert workers(server.address).keys() == {"plain", name}
            flag.touch()
            agent.join(60)
            assert agent.exitcode == 0
        ranks = [*results(out, 2), *plain.results()]
        assert all(rank["digests"] == digests(server.address) for rank in ranks)
        assert all(rank["theta"] == ranks[0]["theta"] for rank in ranks)
        assert [rank["worker_id"] for rank in ranks[:2]] == [name, name]
        assert diloco_client.status(server.address)["state"] == "finished"
