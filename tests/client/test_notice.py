"""SIGTERM with notice: what can be pushed is pushed, the worker leaves, and the signal does what it did before."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_resume import PLAIN, Worker, counted_steps, make_model

import diloco_client
from diloco_client.notice import Notice
from diloco_server import RunConfig, serve


@pytest.fixture
def received() -> Iterator[list[int]]:
    """SIGTERMs that come through to a handler which was there before."""
    numbers: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, former)


class Noticed(Worker):
    """A worker that was joined with notice."""

    def __init__(self, address: str, seconds: float) -> None:
        self.model, self.number = make_model(), 0
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.outer = diloco_client.join(address, self.model, self.optimizer, worker_id="w", sigterm_seconds=seconds)


def test_on_sigterm_a_worker_pushes_and_leaves_and_passes_it_on(received: list[int]) -> None:
    with serve(RunConfig(**PLAIN)) as server:
        before = signal.getsignal(signal.SIGTERM)
        worker = Noticed(server.address, 10)
        worker.step(5)
        worker.settle()
        signal.raise_signal(signal.SIGTERM)
        assert received == []
        assert worker.outer.should_stop
        worker.step(1)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is before
        (member,) = diloco_client.status(server.address)["workers"]
        assert member["state"] == "gone"
        assert counted_steps(server.address) == [6, 6]
        worker.step(3)  # unhooked
        assert worker.outer.stats.steps == 6
        assert worker.outer.should_stop


def test_work_of_after_a_push_waits_for_its_fate_and_goes_after_it(received: list[int]) -> None:
    whole = PLAIN | {"num_fragments": 1, "overlap_steps": 3}  # pushed at step 3, merged at step 6
    with serve(RunConfig(**whole, min_workers=2, grace_seconds="inf")) as server:
        other: list[Worker] = []
        joining = threading.Thread(target=lambda: other.append(Worker(server.address, "o")))
        joining.start()
        worker = Noticed(server.address, 60)
        joining.join()
        worker.step(4)
        assert worker.outer._courier.wait_until(worker.outer._courier.staged, 30, 30)
        closing = threading.Timer(0.5, other[0].step, [3])
        closing.start()
        signal.raise_signal(signal.SIGTERM)
        worker.step(1)
        assert received == [signal.SIGTERM]
        assert counted_steps(server.address) == [3]
        closing.join()
        other[0].outer.flush(together=True)  # until all that was staged has been counted
        assert counted_steps(server.address) == [5]


def test_sigterm_ends_a_wait_for_others_and_a_flush(received: list[int], together) -> None:
    config = RunConfig(**PLAIN | {"overlap_steps": 0}, min_workers=2, grace_seconds="inf")
    with serve(config) as server:
        other: list[Worker] = []
        joining = threading.Thread(target=lambda: other.append(Worker(server.address, "o")))
        joining.start()
        worker = Noticed(server.address, 10)
        joining.join()
        waiting = threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM])
        waiting.start()
        worker.step(3)  # would wait for the other's contribution
        assert received == [signal.SIGTERM]
        assert worker.outer.stats.stall_seconds < 9
        worker = Noticed(server.address, 10)
        worker.step(1)
        threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM]).start()
        with pytest.raises(diloco_client.ConnectionClosed, match="on SIGTERM"):
            worker.outer.flush(together=True)
        assert len(received) == 2
        other[0].crash()


def test_a_server_out_of_reach_costs_no_more_than_the_notice(received: list[int]) -> None:
    with serve(RunConfig(**PLAIN)) as server:
        worker = Noticed(server.address, 1.0)
        worker.step(3)
    signal.raise_signal(signal.SIGTERM)
    began = time.monotonic()
    worker.step(1)
    assert received == [signal.SIGTERM]
    assert time.monotonic() - began < 5


def test_the_second_signal_does_not_wait(received: list[int]) -> None:
    notice = Notice(60)
    assert notice.left is None
    signal.raise_signal(signal.SIGTERM)
    assert 59 < (notice.left or 0) <= 60
    assert received == []
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]
    notice.restore()


def test_who_took_the_signal_over_since_keeps_it(received: list[int]) -> None:
    notice = Notice(60)
    ours: Any = signal.getsignal(signal.SIGTERM)

    def theirs(number: int, frame: Any) -> None:
        ours(number, frame)

    signal.signal(signal.SIGTERM, theirs)
    notice.restore()
    assert signal.getsignal(signal.SIGTERM) is theirs
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM], "passed on by way of ours, which is over"


def test_without_the_option_signals_are_left_alone(received: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with serve(RunConfig(**PLAIN)) as server:
        worker = Worker(server.address)
        assert signal.getsignal(signal.SIGTERM) is before
        worker.outer.close()


def test_only_the_main_thread_can_handle_signals() -> None:
    errors: list[Exception] = []

    def install() -> None:
        try:
            Notice(1)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
    with pytest.raises(ValueError, match="more than 0"):
        Notice(0)


SCRIPT = """
import sys, time, torch, diloco_client
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with diloco_client.join(sys.argv[1], model, optimizer, worker_id="w", sigterm_seconds=20) as outer:
    while True:
        model(torch.ones(4)).square().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(outer.stats.steps, flush=True)
        time.sleep(0.05)
"""


def test_a_process_ends_by_the_signal_and_all_of_its_steps_count() -> None:
    with serve(RunConfig(**PLAIN)) as server:
        command = [sys.executable, "-c", SCRIPT, server.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
            assert script.stdout is not None
            while script.stdout.readline().strip() != "3":
                assert script.poll() is None
            script.send_signal(signal.SIGTERM)
            output, errors = script.communicate(timeout=60)
        assert script.returncode == -signal.SIGTERM
        printed = output.split()
        last = int(printed[-1]) if printed else 3
        (state,) = [w["state"] for w in diloco_client.status(server.address)["workers"]]
        assert state == "gone"
        for steps in counted_steps(server.address):
            assert steps - last in (0, 1), "the signal may end the process before the last step is printed"
    assert "the server has all of its work" in errors


NAMESPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]


@pytest.mark.skipif(subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0, reason="no namespaces")
def test_the_first_process_of_a_container_ends_too() -> None:
    """The kernel does not deliver it a SIGTERM that nobody handles."""
    script = """
import os, signal
from diloco_client.notice import Notice
assert os.getpid() == 1
notice = Notice(5.0)
signal.raise_signal(signal.SIGTERM)
assert notice.left is not None
notice.pass_on()
print("went on")
"""
    done = subprocess.run([*NAMESPACE, sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, ""), done.stderr
