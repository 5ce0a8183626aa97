"""/metrics of a live run: every name is documented, and every number is the run's."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest
from raw_worker import RawWorker, frames_of, manifest_of
from scrapes import key, names, scraped
from server_process import ServerProcess

from diloco_proto import outer_pb2 as pb
from diloco_server import RunConfig, ServerConfig, serve
from diloco_server.daemon import AddressInUse, Daemon
from diloco_server.gauges import GONE_SECONDS
from diloco_server.metrics import METHODS, Exporter, Metrics

DOCUMENT = Path(__file__).parents[2] / "docs" / "operating.md"

STORAGE = pb.Storage(durability="journal", journal_bytes=5_000, snapshots=2, free_bytes=10**9)


@pytest.fixture
def server() -> Iterator[Daemon]:
    config = RunConfig(sync_every=4, num_fragments=2, uplink_codec="fp32", grace_seconds="inf")
    with serve(config) as daemon:
        daemon.engine.storage = lambda: STORAGE
        yield daemon


def documented() -> dict[str, frozenset[str]]:
    """Name -> labels, as the tables of the document have them."""
    rows = re.findall(r"^\| `(diloco_\w+)` \|([^|]*)\|", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    found = {name: frozenset(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert len(found) == len(rows), "a name is documented twice"
    return found


def settled(server: Daemon) -> str:
    """A scrape when all calls but sessions have ended: a caller hears the end of its call before it is counted."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = server.engine.metrics.text()
        now = scraped(text)
        if not any(now[key("diloco_open_calls", method=m)] for m in METHODS if m != "Session"):
            return text
    raise AssertionError("calls are still open")


def train(server: Daemon, a: RawWorker, b: RawWorker) -> None:
    """One round of fragment 0, with both; one contribution to fragment 1, which waits; both fragments pulled once."""
    manifest = manifest_of(100, 50)
    a.enter(manifest, [np.zeros(100), np.zeros(50)])
    b.join(manifest)
    b.say(ready=pb.Ready())
    b.expect("opened")
    a.push(0, frames_of(np.full(100, 3.0)), tokens=10)  # b joined later: nobody waits for it
    b.expect("committed")
    for worker in (a, b):
        worker.push(0, frames_of(np.ones(100)), base_version=1, tokens=10)
    a.expect("committed")
    a.expect("committed")
    a.push(1, frames_of(np.ones(50)), tokens=10)
    a.expect("committed")
    a.push(1, frames_of(np.ones(50)), base_version=1, tokens=10)
    a.pull(0, since_version=0)


def test_every_name_is_documented_and_every_documented_name_is_there(server: Daemon) -> None:
    with RawWorker(server.address, "a") as a, RawWorker(server.address, "b") as b:
        train(server, a, b)
        a.say(heartbeat=pb.Heartbeat(step=4, steps=4, loss=2.5))
        a.say(heartbeat=pb.Heartbeat(step=8, steps=8, train_seconds=2.0, loss=2.5))
        for _ in range(2):
            a.expect("beat")  # it was heard
        with pytest.raises(grpc.RpcError):
            a.push(7, frames_of(np.ones(50)))
        given = names(settled(server))
    ours = {name: labels for name, labels in given.items() if name.startswith("diloco_")}
    assert ours == documented()
    if sys.platform == "linux":
        process = set(re.findall(r"`(process_\w+)`", DOCUMENT.read_text("utf-8")))
        assert process == given.keys() - ours.keys()


def test_alerts_in_the_document_use_names_that_exist() -> None:
    text = DOCUMENT.read_text("utf-8")
    used = set(re.findall(r"\bdiloco_[a-z_]+", text.split("Worth an alert")[1].split("\n## ")[0]))
    known = documented().keys()
    assert len(used) >= 6
    assert {name.removesuffix("_bucket") for name in used} <= known


def test_rounds_contributions_calls_and_bytes_are_counted(server: Daemon) -> None:
    with RawWorker(server.address, "a") as a, RawWorker(server.address, "b") as b:
        train(server, a, b)
        now = scraped(settled(server))
    assert now[key("diloco_rounds_total")] == 3
    assert now[key("diloco_contributions_total", fate="counted")] == 4
    assert now[key("diloco_contributions_total", fate="missed")] == 0
    assert now[key("diloco_pushes_total", outcome="staged")] == 5
    assert now[key("diloco_pushes_total", outcome="seeded")] == 2
    assert now[key("diloco_outer_gradient_norm_sum")] == pytest.approx(30 + 10 + 10 + 50**0.5)
    assert now[key("diloco_fragment_version", fragment="0")] == 2
    assert now[key("diloco_round_contributions", fragment="1")] == 1
    assert now[key("diloco_round_missing", fragment="1")] == 1
    assert now[key("diloco_round_norm", fragment="0")] == pytest.approx(10)
    assert now[key("diloco_round_fill_seconds_count")] == now[key("diloco_commit_seconds_count")] == 3
    assert now[key("diloco_worker_counted_total", worker="a")] == 3
    assert now[key("diloco_worker_counted_total", worker="b")] == 1
    assert now[key("diloco_workers", state="ready")] == now[key("diloco_sessions")] == 2
    assert now[key("diloco_open_calls", method="Session")] == 2
    assert now[key("diloco_calls_total", method="Push", code="OK")] == 7
    assert now[key("diloco_calls_total", method="Pull", code="OK")] == 1
    assert now[key("diloco_received_bytes_total")] == server.engine.bytes_in > 200
    assert now[key("diloco_sent_bytes_total")] == server.engine.bytes_out > 50
    assert now[key("diloco_run_state", state="running")] == 1
    assert now[key("diloco_journal_bytes")] == 5_000
    assert now[key("diloco_storage_trouble")] == 0
    assert not any(name.endswith("_created") for name, _ in now)


def test_a_refused_call_is_counted_by_its_error_and_leaves_nothing_open(server: Daemon) -> None:
    with RawWorker(server.address, "a") as a:
        a.enter(manifest_of(100), [np.zeros(100)])
        with pytest.raises(grpc.RpcError):
            a.push(9, frames_of(np.ones(100)))
        with pytest.raises(grpc.RpcError):
            a.pull(9)
        with pytest.raises(grpc.RpcError):
            a.channel.unary_unary("/diloco.v1.Outer/NoSuchCall")(b"", timeout=30)
        now = scraped(settled(server))
    assert now[key("diloco_refused_calls_total", error="InvalidContribution")] == 2
    assert now[key("diloco_calls_total", method="Push", code="INVALID_ARGUMENT")] == 1
    assert now[key("diloco_calls_total", method="Pull", code="INVALID_ARGUMENT")] == 1
    assert now[key("diloco_open_calls", method="Push")] == now[key("diloco_open_calls", method="Pull")] == 0
    assert {dict(labels)["method"] for name, labels in now if name == "diloco_open_calls"} == set(METHODS)


def test_heartbeats_become_stall_and_step_times(server: Daemon) -> None:
    with RawWorker(server.address, "a") as a:
        a.enter(manifest_of(100), [np.zeros(100)])
        a.say(heartbeat=pb.Heartbeat(step=2, steps=2, train_seconds=2.0, stall_seconds=1.0))
        a.say(heartbeat=pb.Heartbeat(step=12, steps=12, train_seconds=5.0, stall_seconds=2.0, tokens=640, loss=1.5))
        a.push(0, frames_of(np.ones(100)))
        a.expect("committed")  # the heartbeats went before it, but over another stream
        a.say(finishing=pb.Finishing())
        a.say(finished=pb.Finished(flush=1))
        a.expect("all_finished")
        now = scraped(settled(server))
    assert now[key("diloco_worker_stall_seconds_total", worker="a")] == 2.0
    assert now[key("diloco_worker_train_seconds_total", worker="a")] == 5.0
    assert now[key("diloco_worker_steps_total", worker="a")] == 12
    assert now[key("diloco_worker_tokens_total", worker="a")] == 640
    assert now[key("diloco_worker_loss", worker="a")] == 1.5
    assert now[key("diloco_worker_step_seconds", worker="a")] == pytest.approx((0.9 * 1 + 2) / (0.9 * 2 + 10))


def test_a_worker_that_is_gone_for_long_has_no_series(server: Daemon) -> None:
    clock = server.engine.clock
    with RawWorker(server.address, "a") as a, RawWorker(server.address, "b") as b:
        manifest = manifest_of(100)
        a.enter(manifest, [np.zeros(100)])
        b.enter(manifest, [])
        b.say(leave=pb.Leave(reason="done"))
        b.end_session()
        list(b.events)  # until the server has ended it
        now = scraped(settled(server))
        assert now[key("diloco_worker_live", worker="a")] == 1
        assert now[key("diloco_worker_live", worker="b")] == 0
        later = clock() + GONE_SECONDS
        server.engine.clock = lambda: later
        try:
            now = scraped(settled(server))
        finally:
            server.engine.clock = clock
    workers = {dict(labels)["worker"] for name, labels in now if name.startswith("diloco_worker_")}
    assert workers == {"a"}


def test_prometheus_gets_it_over_http(server: Daemon) -> None:
    with closing(Exporter(server.engine.metrics, "127.0.0.1", 0)) as exporter:
        url = f"http://127.0.0.1:{exporter.port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            text = answer.read().decode()
    assert scraped(text)[key("diloco_run_state", state="empty")] == 1


def test_two_servers_in_a_process_count_apart(server: Daemon) -> None:
    with RawWorker(server.address) as worker, serve(RunConfig()) as other:
        worker.enter(manifest_of(100), [np.zeros(100)])
        ours, theirs = (scraped(settled(s)) for s in (server, other))
    assert ours[key("diloco_pushes_total", outcome="seeded")] == 1
    assert theirs[key("diloco_pushes_total", outcome="seeded")] == 0


def test_a_server_that_has_stopped_still_shows_its_counters() -> None:
    with serve(RunConfig()) as daemon:
        metrics: Metrics = daemon.engine.metrics
    now = scraped(metrics.text())
    assert now[key("diloco_round_seconds_count")] == 0
    assert key("diloco_uptime_seconds") not in now


def test_a_server_that_keeps_its_run_shows_the_disk(tmp_path: Path, free_port: int) -> None:
    arguments = ["--metrics-port", str(free_port), "--uplink-codec", "fp32"]
    with ServerProcess(tmp_path / "state", *arguments) as server, RawWorker(server.address) as worker:
        worker.enter(manifest_of(100), [np.zeros(100)])
        worker.push(0, frames_of(np.ones(100)))
        worker.expect("committed")
        with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        assert server.terminate() == 0
    now = scraped(text)
    ours = {name for name in names(text) if name.startswith("diloco_")}
    assert documented().keys() - ours <= {"diloco_refused_calls_total"}, "nothing was refused"
    assert now[key("diloco_fsync_seconds_count")] >= 1
    assert now[key("diloco_journal_bytes")] > 400, "the contribution is in it"
    assert now[key("diloco_journal_written_bytes_total")] > 400
    assert now[key("diloco_snapshots")] == now[key("diloco_snapshot_seconds_count")] == 1
    assert now[key("diloco_snapshot_bytes")] > 3 * 400
    assert now[key("diloco_snapshot_age_seconds")] < 60
    assert now[key("diloco_disk_free_bytes")] > 0
    assert now[key("diloco_storage_trouble")] == 0


def test_a_port_for_metrics_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"cannot serve metrics on 127.0.0.1:{port}: Address already in use"):
            asyncio.run(Daemon(RunConfig(), ServerConfig(port=0, state_dir=None, metrics_port=port)).run(_unused))


def _unused(_: Daemon) -> None:
    raise AssertionError("it must not start")
