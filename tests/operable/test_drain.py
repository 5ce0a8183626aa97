"""SIGTERM to a server whose workers train: it ends in order and in time, and they go on."""

from __future__ import annotations

import logging
import queue
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from raw_worker import RawWorker, frames_of, manifest_of
from server_process import ServerProcess

import diloco_client
from diloco_proto import outer_pb2 as pb

QUICK = ("--sync-every", "8", "--num-fragments", "2", "--overlap-steps", "1")


def test_a_server_that_drains_exits_with_0_and_its_workers_go_on_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        assert time.monotonic() < deadline
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    deadline = time.monotonic() + 60
    with ServerProcess(tmp_path / "state", *QUICK) as server:
        outer = diloco_client.join(server.address, model, optimizer, worker_id="alice")
        while outer.stats.counted < 4:
            step()
        with caplog.at_level(logging.WARNING, "diloco"):
            server.process.terminate()
            while server.process.poll() is None:
                step()
            assert server.process.returncode == 0
            before = outer.stats.steps
            while outer.stats.steps < before + 50:
                step()
            outer.close()
        said = server.said().splitlines()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert line.startswith(f"lost the server at {server.address} (")
    assert "received SIGTERM" in line
    assert line.endswith("training goes on")
    assert not any("Traceback" in text for text in said)
    assert sum("WARNING shutting down (received SIGTERM)" in text for text in said) == 1
    assert sum("kept version" in text for text in said) >= 1


def test_a_drain_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path / "state", "--uplink-codec", "fp32", "--drain-seconds", "0.5") as server,
        RawWorker(server.address) as worker,
    ):
        worker.enter(manifest_of(100), [np.zeros(100)])
        frames: queue.SimpleQueue[pb.PushRequest | None] = queue.SimpleQueue()
        frames.put(pb.PushRequest(header=worker.header(0, frames_of(np.ones(100)))))
        push = worker.push_stream(iter(frames.get, None))  # a transfer that has come to a stop
        assert next(push).HasField("have")
        began = time.monotonic()
        assert server.terminate() == 1
        assert time.monotonic() - began < 4.0, "open calls would have been cut after five"
        assert any("not drained within 0.5 s" in text for text in server.said().splitlines())
        frames.put(None)


def test_what_arrives_while_it_drains_is_not_acknowledged(tmp_path: Path) -> None:
    frames = frames_of(np.ones(100))
    with (
        ServerProcess(tmp_path / "state", "--uplink-codec", "fp32") as server,
        RawWorker(server.address) as worker,
    ):
        worker.enter(manifest_of(100), [np.zeros(100)])
        requests: queue.SimpleQueue[pb.PushRequest | None] = queue.SimpleQueue()
        requests.put(pb.PushRequest(header=worker.header(0, frames)))
        push = worker.push_stream(iter(requests.get, None))
        assert next(push).HasField("have")
        server.process.terminate()
        assert worker.expect("draining").reason == "received SIGTERM"
        for frame in frames:
            requests.put(pb.PushRequest(frame=frame))
        with pytest.raises(grpc.RpcError) as caught:
            list(push)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        requests.put(None)
        assert server.process.wait(60) == 0
