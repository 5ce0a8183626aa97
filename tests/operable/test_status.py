"""What `status` says of rates, of who is waited for, and of the disk."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from raw_worker import RawWorker, frames_of, manifest_of
from rich.console import Console

import diloco_client
from diloco_cli.tables import status_view
from diloco_proto import outer_pb2 as pb
from diloco_server import RunConfig, serve
from diloco_server.daemon import Daemon
from diloco_server.rates import Rates, Totals

STORAGE = pb.Storage(
    durability="journal",
    directory="/var/lib/diloco",
    journal_bytes=1_200_000_000,
    snapshots=3,
    snapshot_bytes=4_500_000_000,
    snapshot_rounds=400,
    snapshot_age_seconds=720,
    free_bytes=90_000_000_000,
)


def table(server: Daemon) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(status_view(diloco_client.status(server.address)))
    return out.getvalue()


def at_round_one(a: RawWorker, b: RawWorker) -> None:
    """Both are expected in round 1 of fragment 0, and a has contributed."""
    a.enter(manifest_of(100), [np.zeros(100)])
    b.enter(manifest_of(100), [])
    a.push(0, frames_of(np.ones(100)))
    a.expect("committed")
    a.push(0, frames_of(np.ones(100)), base_version=1)


def waits(server: Daemon) -> list[dict[str, object]]:
    (fragment,) = diloco_client.status(server.address)["fragments"]
    return fragment["waits"]


@pytest.mark.parametrize("grace", [600.0, "inf"])
def test_it_says_for_whom_a_round_waits_and_for_how_long_at_most(grace: float | str) -> None:
    config = RunConfig(uplink_codec="fp32", num_fragments=1, grace_seconds=grace, lease_seconds=900.0)
    with (
        serve(config) as server,
        RawWorker(server.address, "a") as a,
        RawWorker(server.address, "b") as b,
    ):
        at_round_one(a, b)
        (wait,) = waits(server)
        assert wait["worker_id"] == "b"
        assert 0 <= wait["seconds"] < 60
        if grace == "inf":
            assert (wait["at_most"], wait["bound"]) == (None, "")
            assert "fragment 0 has waited" in table(server)
            assert "at most" not in table(server)
        else:
            assert 500 < wait["at_most"] <= 600
            assert wait["bound"] == "grace"
            assert "for b, at most 10.0 min more (grace)" in table(server)


def test_a_worker_that_is_cut_off_is_waited_for_until_its_lease_ends() -> None:
    config = RunConfig(uplink_codec="fp32", num_fragments=1, grace_seconds="inf", lease_seconds=900.0)
    with serve(config) as server, RawWorker(server.address, "a") as a:
        with RawWorker(server.address, "b") as b:
            at_round_one(a, b)
            b.end_session()
            list(b.events)  # until the server has ended it
        (wait,) = waits(server)
        assert wait["bound"] == "lease"
        assert 200 < wait["at_most"] <= 300, "a third of the lease"
        assert "(lease)" in table(server)


def test_rates_are_of_the_last_while_and_in_gigabytes_a_day() -> None:
    with serve(RunConfig()) as server:
        engine = server.engine
        rates, now = Rates(), engine.clock()
        rates.note(now - 1000, Totals())
        rates.note(now - 100, Totals(tokens=0, bytes_out=2_000_000_000))
        engine.rates, engine.bytes_out, engine.bytes_in = rates, 5_000_000_000, 600_000
        values = diloco_client.status(server.address)
        assert values["rates"]["bytes_out_per_second"] == pytest.approx(3e9 / 100, rel=0.1)
        assert values["rates"]["bytes_out_per_day"] == pytest.approx(5e9 / 1000 * 86400, rel=0.1)
        assert re.search(r"out 5\.0 GB \(\d\d\.\d MB/s, 4\d\d\.\d\d GB a day\)", table(server))


def test_it_says_how_the_run_stands_on_disk() -> None:
    with serve(RunConfig()) as server:
        assert diloco_client.status(server.address)["storage"] is None
        assert "kept in" not in table(server)
        server.engine.storage = lambda: STORAGE
        assert (
            "kept in /var/lib/diloco: journal 1.2 GB, 3 snapshots 4.5 GB, the last at round 400, 12.0 min ago; "
            "90.0 GB free"
        ) in table(server)
        trouble = pb.Storage(durability="snapshots", directory="[x]", trouble="no space left: make room in [x]")
        server.engine.storage = lambda: trouble
        shown = table(server)
        assert "kept in [x]: no snapshot yet; 0 B free" in shown
        assert "nothing is acknowledged: no space left: make room in [x]" in shown


def test_past_rounds_say_how_long_they_filled_and_waited() -> None:
    config = RunConfig(uplink_codec="fp32", num_fragments=1, grace_seconds=0.3, lease_seconds=900.0)
    with (
        serve(config) as server,
        RawWorker(server.address, "a") as a,
        RawWorker(server.address, "b") as b,
    ):
        at_round_one(a, b)
        a.expect("committed")  # by the grace: b is missed
        (fragment,) = diloco_client.status(server.address, rounds=2)["fragments"]
        first, second = fragment["rounds"]
    assert (first["missed"], second["missed"]) == ([], ["b"])
    assert 0 <= first["grace_seconds"] < 0.3 <= second["grace_seconds"] < 30
    assert first["fill_seconds"] == second["fill_seconds"] == 0.0


@pytest.mark.parametrize("dynamic", ["true", "false"])
def test_the_names_that_workers_have_by_default_fit_80_columns(dynamic: str) -> None:
    with serve(RunConfig(dynamic_local_updates=dynamic == "true")) as server:
        values = diloco_client.status(server.address)
    name = "ip-172-31-24-117-3133-a0b1"
    numbers = {"seen_seconds": 1.2, "step": 12345, "steps": 1000, "train_seconds": 90.0, "stall_seconds": 1.0}
    brought = {"bytes_up": 123.4e6, "bytes_down": 2.3e9, "counted": 1234, "not_counted": 3}
    worker = {"worker_id": name, "state": "finishing", "sync_every": 100, "loss": 2.345} | numbers | brought
    shown = {}
    for width in (80, 160):
        out = io.StringIO()
        Console(file=out, width=width).print(status_view(values | {"workers": [worker]}))
        shown[width] = [line for line in out.getvalue().splitlines() if line.startswith("ip-")]
    assert [line.split()[0] for line in shown[80]] == [name, name], "in two tables"
    assert [line.split() for line in shown[160]] == [[*shown[80][0].split(), *shown[80][1].split()[1:]]]
    assert "finishing" in shown[80][0]
    assert "2.345" in shown[80][0]
