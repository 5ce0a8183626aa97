"""A server that comes back, with all that it had or with less: what its workers do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_replica import Worker as Pure
from test_resume import PLAIN, Worker, counted_steps, hold_pushes

import diloco_client
from diloco_client.flights import Base, Flights
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format
from diloco_server import RunConfig, serve

KEEP = {"snapshot_every": 1, "keep_snapshots": 50}


@pytest.fixture(autouse=True)
def _all_leave() -> Iterator[None]:
    yield
    while Worker.joined:
        Worker.joined.pop().crash()


def lost(worker: Worker) -> None:
    """The worker has noticed that its server is gone."""
    courier = worker.outer._courier
    assert courier.wait_until(lambda: not courier._connected, 30, 30)


def reconnected(worker: Worker) -> None:
    courier = worker.outer._courier
    assert courier.wait_until(lambda: courier._connected, 30, 30)


def digests(address: str) -> dict[int, int]:
    return {f["index"]: int(f["digest"], 16) for f in diloco_client.status(address)["fragments"]}


def lines(caplog: Any, word: str) -> list[str]:
    return [r.message for r in caplog.records if r.name == "diloco" and word in r.message]


def test_a_worker_rides_through_a_restart_and_pushes_again_what_was_not_acknowledged(tmp_path: Path, caplog) -> None:
    config = RunConfig(**PLAIN)
    with serve(config, state_dir=tmp_path / "state") as server:
        worker = Worker(server.address)
        worker.step(9)
        worker.settle()
        before = counted_steps(server.address)
        gate = hold_pushes(worker)
        worker.step(1)  # pushed, and on its way
    lost(worker)
    worker.step(7)  # the training goes on
    gate.set()
    assert worker.outer.stats.steps == 17
    with serve(config, port=server.port, state_dir=tmp_path / "state") as server:
        reconnected(worker)
        worker.step(3)
        worker.outer.flush()
        after = counted_steps(server.address)
        assert [b + a for b, a in zip(before, after, strict=True)] == [20, 20]
        assert worker.outer.base_digests() == digests(server.address)
        assert worker.outer.stats.not_counted == 0
        worker.outer.close()
    assert len(lines(caplog, "lost the server")) == 1
    (back,) = lines(caplog, "back in run")
    assert " after " in back


@pytest.mark.parametrize("feedback", ["off", "on"])
def test_after_a_rollback_a_worker_adopts_theta_and_trains_on(feedback: str, tmp_path: Path, caplog) -> None:
    config = RunConfig(**(PLAIN | {"uplink_codec": "int4", "error_feedback": feedback}))
    with serve(config, state_dir=tmp_path / "state", **KEEP) as server:
        worker = Worker(server.address)
        worker.step(21)
        worker.settle()
        former = worker.outer._link.run_id
        assert [f["version"] for f in diloco_client.status(server.address)["fragments"]] == [4, 3]
    lost(worker)
    hold_pushes(worker).set()
    worker.step(2)  # one more contribution, against a base that there will not be any more
    assert worker.outer._courier.flight(1) is not None
    with serve(config, port=server.port, state_dir=tmp_path / "state", rollback=2, **KEEP) as server:
        reconnected(worker)
        assert worker.outer._link.run_id == f"{former}.1"
        worker.settle()
        assert worker.outer.base_digests() == digests(server.address)
        assert torch.equal(worker.local(), worker.theta())
        assert [worker.outer._replica.uncounted(p).residual for p in (0, 1)] == [None, None]
        before = counted_steps(server.address)
        worker.step(13)
        worker.outer.flush()
        assert worker.outer.base_digests() == digests(server.address)
        assert [after - b for after, b in zip(counted_steps(server.address), before, strict=True)] == [13, 13]
        worker.outer.close()
    assert len(lines(caplog, "rolled back")) == 1
    assert lines(caplog, "back in run") == []


def test_a_flush_waits_for_the_parameters_after_a_rollback(tmp_path: Path) -> None:
    config = RunConfig(**PLAIN)
    with serve(config, state_dir=tmp_path / "state", **KEEP) as server:
        worker = Worker(server.address)
        worker.step(14)
        worker.settle()
    lost(worker)
    with serve(config, port=server.port, state_dir=tmp_path / "state", rollback=1, **KEEP) as server:
        worker.outer.flush()
        worker.outer.close()
        assert worker.outer.base_digests() == digests(server.address)
        assert torch.equal(worker.local(), worker.theta())


def test_a_state_of_before_a_rollback_brings_the_counters_and_nothing_else(tmp_path: Path, caplog) -> None:
    config = RunConfig(**PLAIN)
    with serve(config, state_dir=tmp_path / "state", **KEEP) as server:
        worker = Worker(server.address)
        worker.step(16)
        checkpoint = worker.checkpoint()
        worker.settle()
        worker.crash()
    with serve(config, port=server.port, state_dir=tmp_path / "state", rollback=1, **KEEP) as server:
        back = Worker(server.address, checkpoint=checkpoint)
        assert "the run was rolled back since" in caplog.text
        assert torch.equal(back.local(), back.theta())
        assert back.outer.stats.steps == 16
        before = counted_steps(server.address)
        back.step(3)
        back.outer.flush()
        back.outer.close()
        assert [after - b for after, b in zip(counted_steps(server.address), before, strict=True)] == [3, 3]


# -- by plain calls --


def rolled_back(*versions: int) -> list[pb.FragmentVersion]:
    return [pb.FragmentVersion(fragment=p, version=v) for p, v in enumerate(versions)]


def test_nothing_is_pushed_against_a_base_that_is_no_more() -> None:
    worker = Pure(feedback=True)
    worker.steps(6)
    worker.encode(worker.pushed[0], Format.INT2)
    worker.answer(worker.pushed[0], pb.OUTCOME_STAGED)
    worker.commit(1, -4.0)
    worker.steps(8)
    assert worker.pushed[1].residual is not None
    worker.flights.rolled_back(rolled_back(0))
    assert worker.flight(0) is None
    assert not worker.flights.none_in_flight(), "there is something to wait for"
    worker.steps(8)
    assert worker.flight(0) is None
    assert not worker.flights.caught_up({0: 0})
    worker.arrive(0, 5.0)
    worker.steps(1)
    assert worker.local == 5.0
    assert worker.flights.none_in_flight()
    worker.steps(7)
    assert worker.flight(0) is worker.pushed[-1]
    assert (worker.pushed[-1].base.version, worker.pushed[-1].since_version) == (0, 0)
    assert worker.pushed[-1].residual is None


def test_late_news_of_the_undone_stretch_settles_nothing() -> None:
    worker = Pure()
    worker.steps(6)
    flight = worker.pushed[0]
    worker.encode(flight)
    worker.flights.rolled_back(rolled_back(3))
    assert not worker.flights.holds(flight)
    worker.flights.on_committed(pb.Committed(fragment=0, version=1, fate=pb.FATE_COUNTED, base_version=0))
    assert not worker.flights.settled(0)
    worker.arrive(3, 1.0)
    worker.replica.merge()
    assert worker.local == 1.0
    assert worker.replica.counted == 0


def test_a_snapshot_is_wanted_whatever_the_versions() -> None:
    flights = Flights(1)
    flights.bases = [Base(7, np.zeros(64, np.float32))]
    assert not flights.lacks_base(0)
    flights.rolled_back(rolled_back(9))
    assert flights.lacks_base(0)
    assert flights.wanted(0) is None, "no update leads there from a base of another run"
    snapshot = Base(8, np.ones(64, np.float32))
    flights.on_arrived(0, snapshot)
    assert flights.wanted(0) is snapshot, "but from this one"
    arrival = flights.take(0)
    assert arrival is not None
    assert arrival.afresh
    flights.on_arrived(0, Base(9, snapshot.theta))
    arrival = flights.take(0)
    assert arrival is not None
    assert not arrival.afresh
