"""Islands beside plain workers, in one run: the same θ everywhere, and each rank moves its share of the bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Site, site
from server_process import ServerProcess

import diloco_client
from diloco_server import RunConfig, serve

QUICK = {"sync_every": 6, "num_fragments": 2, "overlap_steps": 1, "grace_seconds": "inf"}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as opened:
        yield opened


def digests(address: str) -> dict[int, int]:
    fragments = diloco_client.status(address)["fragments"]
    return {f["index"]: int(f["digest"], 16) for f in fragments if f["kind"] != "frozen"}


def until(condition: Any, what: str, timeout: float = 60.0) -> Any:
    """Its value, once it has one."""
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        pause.wait(0.05)
    return value


def workers(address: str) -> dict[str, dict[str, Any]]:
    return {w["worker_id"]: w for w in diloco_client.status(address)["workers"]}


def test_fsdp_ddp_and_a_plain_worker_end_on_one_theta_and_ranks_share_the_bytes(here: Site) -> None:
    with serve(RunConfig(**QUICK, min_workers=3)) as server:
        ddp = here.start("ddp", 2, server.address, "ddp", width=3000)
        until(lambda: "ddp" in workers(server.address), "the first worker, which seeds the run")
        fsdp = here.start("fsdp", 2, server.address, "fsdp", width=3000, seed=1)
        plain = here.start("plain", 1, server.address, "plain", width=3000, seed=2)
        ranks = [*ddp.results(), *fsdp.results(), *plain.results()]
        expected = digests(server.address)
        seen = workers(server.address)
    assert sorted(seen) == ["ddp", "fsdp", "plain"]
    for rank in ranks:
        assert rank["digests"] == expected
        assert rank["same"], "the model holds θ"
        assert rank["theta"] == ranks[0]["theta"]
        assert rank["stats"]["not_counted"] == 0
    leads, follows, first, second, alone = (rank["stats"] for rank in ranks)
    assert (follows["bytes_up"], follows["bytes_down"]) == (0, 0), "one rank speaks to the server"
    assert leads["counted"] == follows["counted"] == first["counted"] == alone["counted"] > 0
    for half in (first, second):
        assert half["bytes_up"] == pytest.approx(alone["bytes_up"] / 2, rel=0.05)
        assert half["bytes_down"] == pytest.approx(alone["bytes_down"] / 2, rel=0.05)
        assert half["bits_up"] == pytest.approx(alone["bits_up"], rel=0.05)
    assert [r["shard"] for r in ranks] == [
        [index + 3 * rank, 6] if size == 2 else [index, 3]
        for size, name in ((2, "ddp"), (2, "fsdp"), (1, "plain"))
        for rank in range(size)
        for index in [seen[name]["shard"]]
    ]
    total = first["bytes_down"] + second["bytes_down"]
    assert seen["fsdp"]["bytes_down"] == pytest.approx(total, rel=0.05), "the server hears of all ranks"


@pytest.mark.parametrize(
    ("kinds", "options", "settings"),
    [
        (
            {"fsdp": 3, "ddp": 2, "plain": 1},
            {"norm": True, "dtype": "bfloat16"},
            {"uplink_codec": "int2", "error_feedback": "on"},
        ),
        ({"hsdp": 4, "tp": 2, "plain": 1}, {"width": 38}, {"outer_optimizer": "delayed-nesterov"}),
        ({"2d": 4, "plain": 1}, {"width": 38, "norm": True}, {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) and "plain" in value else "",
)
def test_any_way_to_shard(here: Site, kinds: dict[str, int], options: dict[str, Any], settings: dict[str, Any]) -> None:
    with serve(RunConfig(**QUICK | settings, min_workers=len(kinds))) as server:
        started = [
            here.start(kind, size, server.address, kind, seed=seed, **options)
            for seed, (kind, size) in enumerate(kinds.items())
        ]
        ranks = [rank for worker in started for rank in worker.results()]
        expected = digests(server.address)
    for rank in ranks:
        assert rank["digests"] == expected
        assert rank["same"]
        assert rank["theta"] == ranks[0]["theta"]
        assert rank["stats"]["counted"] + rank["stats"]["not_counted"] > 4
    assert len(expected) == (3 if options.get("norm") else 2)


def test_a_rank_that_is_killed_takes_its_island_out_and_no_other_with_it(here: Site) -> None:
    with serve(RunConfig(**QUICK | {"grace_seconds": 1.0}, lease_seconds=3.0)) as server:
        flag = here.folder / "flag"
        island = here.start("fsdp", 2, server.address, "island", steps=100_000, pace=0.02)
        plain = here.start("plain", 1, server.address, "plain", steps=100_000, pace=0.02, flag=flag)

        def rounds_of(*names: str) -> bool:
            fragments = diloco_client.status(server.address, rounds=1)["fragments"]
            last = [member["worker_id"] for f in fragments[:1] for r in f["rounds"] for member in r["members"]]
            return sorted(last) == sorted(names)

        until(lambda: rounds_of("island", "plain"), "a round of both")
        island.kill(1)
        assert island.ends(30)[0] not in (None, 0), "the other rank ends"
        until(lambda: workers(server.address)["island"]["state"] == "gone", "the island's end")
        until(lambda: rounds_of("plain"), "a round without the island")
        flag.touch()
        (alone,) = plain.results()
        assert alone["digests"] == digests(server.address)


def test_a_server_that_is_killed_and_started_again_goes_on_with_the_islands(here: Site) -> None:
    settings = ["--sync-every", "6", "--num-fragments", "2", "--overlap-steps", "1", "--min-workers", "2"]
    settings += ["--grace-seconds", "1"]  # for each may come back waiting for a fragment that is not due with the other
    state, flag = here.folder / "state", here.folder / "flag"
    with ServerProcess(state, *settings) as server:
        port = str(server.port)
        island = here.start("fsdp", 2, server.address, "island", steps=100_000, pace=0.02, flag=flag)
        ddp = here.start("ddp", 2, server.address, "ddp", steps=100_000, pace=0.02, flag=flag)
        until(lambda: diloco_client.status(server.address)["rounds"] > 4, "some rounds")
    with ServerProcess(state, *settings, "--port", port) as server:
        before = diloco_client.status(server.address)["rounds"]
        until(lambda: diloco_client.status(server.address)["rounds"] > before + 4, "rounds after the restart")
        flag.touch()
        ranks = [*island.results(), *ddp.results()]
        assert all(rank["digests"] == digests(server.address) for rank in ranks)
        assert all(rank["theta"] == ranks[0]["theta"] for rank in ranks)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_what_refuses_one_rank_is_raised_on_all(here: Site, kind: str, tmp_path: Path) -> None:
    config = RunConfig(**QUICK)
    with serve(config, state_dir=tmp_path / "state", secure=True) as server:
        url = server.join_url
        token, rest = url.removeprefix("diloco://").split("@")
        wrong = {
            "Unauthenticated": f"diloco://{'x' * len(token)}@{rest}",
            "PinMismatch": f"{url.rpartition(':')[0]}:{'0' * 64}",
        }
        islands = {error: here.start(kind, 2, address, error) for error, address in wrong.items()}
        for error, island in islands.items():
            assert [rank["error"] for rank in island.results()] == [error, error]


def test_on_a_notice_to_one_rank_the_island_leaves_with_its_work_done(here: Site) -> None:
    with serve(RunConfig(**QUICK)) as server:
        island = here.start("fsdp", 2, server.address, "island", steps=100_000, pace=0.02, sigterm=20.0)
        until(lambda: workers(server.address).get("island", {}).get("counted", 0) > 2, "some rounds")
        island.processes[1].terminate()
        assert -15 in island.ends(30)
        until(lambda: workers(server.address)["island"]["state"] == "gone", "its word that it leaves")
