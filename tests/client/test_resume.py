"""A worker's own crash: what `outer.state_dict()` beside the trainer's checkpoint brings back, and what counts once."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

import diloco_client
from diloco_server import RunConfig, serve

SCRIPT = Path(__file__).with_name("resume_worker.py")
QUICK: dict[str, Any] = {"sync_every": 6, "num_fragments": 2, "overlap_steps": 2}
"""Fragment 0 is pushed at steps 1, 7, … and merged at 3, 9, …; fragment 1 is pushed at 4, 10, … and merged at 6, 12."""
PLAIN: dict[str, Any] = QUICK | {
    "uplink_codec": "fp32",
    "downlink_codec": "fp32",
    "outer_optimizer": "sgd",
    "outer_lr": 1.0,
    "max_outer_grad_norm": 0.0,
}
"""θ moves by what is pushed, neither more nor less."""


def make_model(hidden: int = 40, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        middle = [nn.BatchNorm1d(hidden)] if norm else []
        return nn.Sequential(nn.Linear(5, hidden), *middle, nn.Tanh(), nn.Linear(hidden, 1))


class Worker:
    """One process of a worker: a model, its optimizer, and perhaps the checkpoint that they begin from."""

    joined: ClassVar[list[Worker]] = []

    def __init__(
        self, address: str, name: str = "w", checkpoint: dict[str, Any] | None = None, *, order: str = "state", **model
    ) -> None:
        self.model = make_model(**model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.number = 0
        if checkpoint is None:
            self.outer = diloco_client.join(address, self.model, self.optimizer, worker_id=name)
        elif order == "state":
            self.load(checkpoint)
            self.outer = diloco_client.join(address, self.model, self.optimizer, state=checkpoint["outer"])
        elif order == "load, join":
            self.load(checkpoint)
            self.outer = diloco_client.join(address, self.model, self.optimizer, worker_id=name)
        else:
            self.outer = diloco_client.join(address, self.model, self.optimizer, worker_id=name)
            self.load(checkpoint)
        self.joined.append(self)
        if checkpoint is not None and order != "state":
            self.outer.load_state_dict(checkpoint["outer"])

    def load(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.number = checkpoint["number"]

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.number += 1
            x = torch.randn(16, 5, generator=torch.Generator().manual_seed(self.number))
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(x), x.sum(1, keepdim=True).sin()).backward()
            self.optimizer.step()

    def checkpoint(self) -> dict[str, Any]:
        """As a trainer saves and loads it."""
        buffer = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "number": self.number}
        torch.save(state | {"outer": self.outer.state_dict()}, buffer)
        return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)

    def crash(self, held: threading.Event | None = None) -> None:
        """The process is gone without a word; what it had not sent, or what was `held` back, is never sent."""
        self.outer._transport.close()
        if held is not None:
            held.set()
        self.outer.close()

    def local(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def theta(self) -> torch.Tensor:
        values = self.outer.global_state_dict()
        return torch.cat([values[name].flatten() for name, _ in self.model.named_parameters()])

    def settle(self) -> None:
        """Until nothing is under way, and all is merged that has come."""
        courier = self.outer._courier
        while not courier.none_in_flight():
            assert courier.wait_until(courier.anything_ready, 30, 30)
            self.outer._replica.merge(early=True)
        self.outer._witness.stepped()


@pytest.fixture(autouse=True)
def _all_leave() -> Iterator[None]:
    yield
    while Worker.joined:
        Worker.joined.pop().crash()


def counted_steps(address: str, name: str = "w") -> list[int]:
    """Inner steps of the worker that each fragment has counted."""
    fragments = diloco_client.status(address, rounds=64)["fragments"]
    members = [[m for r in f["rounds"] for m in r["members"] if m["worker_id"] == name] for f in fragments]
    return [sum(m["steps"] for m in each) for each in members]


def hold_pushes(worker: Worker) -> threading.Event:
    """Keep contributions on this side until the event is set, as a slow link would."""
    gate, push = threading.Event(), worker.outer._transport.push

    def held(*args: Any) -> Any:
        assert gate.wait(30)
        return push(*args)

    worker.outer._transport.push = held
    return gate


KINDS = {
    "int4": QUICK,
    "residual": QUICK | {"uplink_codec": "int2"},
    "asynchronous": QUICK | {"outer_optimizer": "delayed-nesterov", "delay_buffer": 2},
    "classic": QUICK | {"num_fragments": 1, "overlap_steps": 0},
}


@pytest.mark.parametrize(
    ("kind", "stop", "order", "norm"),
    [
        ("int4", 9, "state", True),  # nothing under way
        ("int4", 8, "load, join", False),  # one contribution under way
        ("int4", 5, "join, load", True),  # the first one of a fragment
        ("residual", 11, "state", False),
        ("residual", 15, "load, join", True),
        ("asynchronous", 10, "state", True),
        ("classic", 8, "join, load", False),
    ],
)
def test_a_worker_that_stopped_at_a_checkpoint_goes_on_to_the_same_theta(
    kind: str, stop: int, order: str, norm: bool
) -> None:
    ends = []
    for interrupted in (False, True):
        with serve(RunConfig(**KINDS[kind])) as server:
            worker = Worker(server.address, norm=norm)
            worker.step(stop)
            stats = worker.outer.stats
            if interrupted:
                checkpoint = worker.checkpoint()
                worker.crash()
                worker = Worker(server.address, checkpoint=checkpoint, order=order, norm=norm)
                assert worker.outer.global_step == worker.outer.stats.steps == stop
                assert worker.outer.stats.counted == stats.counted
                assert worker.outer.stats.bytes_up >= stats.bytes_up
            worker.step(20 - stop)
            worker.outer.flush()
            end = (worker.outer.base_digests(), worker.outer.stats.steps, counted_steps(server.address))
            ends.append((*end, [t.tolist() for t in worker.model.state_dict().values()]))
            worker.outer.close()
    assert ends[0] == ends[1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_work_that_was_counted_later_than_the_checkpoint_counts_once(asynchronous: bool, caplog) -> None:
    extra = {"outer_optimizer": "delayed-nesterov"} if asynchronous else {}
    with serve(RunConfig(**(PLAIN | extra))) as server:
        worker = Worker(server.address)
        worker.step(3)  # of fragment 0 one step is counted
        checkpoint = worker.checkpoint()
        worker.step(2)  # fragment 1 is pushed at step 4
        worker.settle()
        worker.crash()
        before = counted_steps(server.address)
        assert before == [1, 4]
        back = Worker(server.address, checkpoint=checkpoint)
        assert "of fragments 1 it takes the global parameters" in caplog.text
        whole = checkpoint["model"]
        fragment = {slot.tensor.name for slot in back.outer._link.layout.fragments[1].slots}
        theta = back.outer.global_state_dict()
        for name, value in back.model.state_dict().items():
            assert torch.equal(value, theta[name] if name in fragment else whole[name])
        back.outer.flush()
        assert counted_steps(server.address) == [3, 4]


def test_what_is_staged_and_not_decided_is_not_pushed_again(together) -> None:
    with serve(RunConfig(**(PLAIN | {"num_fragments": 1}), min_workers=2, grace_seconds="inf")) as server:
        worker, other = together(2, lambda i: Worker(server.address, "wo"[i]))
        worker.step(3)
        checkpoint = worker.checkpoint()
        worker.step(1)  # pushes; the round waits for the other worker
        courier = worker.outer._courier
        assert courier.wait_until(courier.staged, 30)
        worker.crash()
        back = Worker(server.address, checkpoint=checkpoint)
        back.step(2)  # its own push of that round is refused
        other.step(4)
        back.settle()
        assert counted_steps(server.address) == [4]

        def end(index: int) -> None:
            (back, other)[index].outer.flush(together=True)

        together(2, end)
        assert counted_steps(server.address) == [4 + 2]
        assert counted_steps(server.address, "o") == [4]
        assert back.outer.base_digests() == other.outer.base_digests()


def test_a_state_knows_what_a_former_process_had_staged(together) -> None:
    with serve(RunConfig(**(PLAIN | {"num_fragments": 1}), min_workers=2, grace_seconds="inf")) as server:
        worker, other = together(2, lambda i: Worker(server.address, "wo"[i]))
        worker.step(3)
        checkpoint = worker.checkpoint()
        worker.step(1)
        courier = worker.outer._courier
        assert courier.wait_until(courier.staged, 30)
        worker.crash()
        back = Worker(server.address, checkpoint=checkpoint)
        again = back.checkpoint()
        back.crash()
        other.step(4)
        other.settle()
        third = Worker(server.address, checkpoint=again)
        for name, value in third.model.state_dict().items():
            assert torch.equal(value, again["model"][name]), "what was counted since was none of its work"


def test_steps_that_a_process_in_between_has_pushed_in_other_bytes_are_not_pushed_again(together) -> None:
    with serve(RunConfig(**(PLAIN | {"num_fragments": 1}), min_workers=2, grace_seconds="inf")) as server:
        worker, other = together(2, lambda i: Worker(server.address, "wo"[i]))
        worker.step(3)
        older = worker.checkpoint()
        gate = hold_pushes(worker)
        worker.step(1)
        newer = worker.checkpoint()  # with a contribution that never arrives
        worker.crash(gate)
        between = Worker(server.address, checkpoint=older)
        between.number = 100  # other data
        between.step(1)
        courier = between.outer._courier
        assert courier.wait_until(courier.staged, 30)
        between.crash()
        back = Worker(server.address, checkpoint=newer)
        other.step(4)
        back.settle()
        assert torch.equal(back.local(), back.theta())
        assert counted_steps(server.address) == [4]
        back.outer.flush()
        assert counted_steps(server.address) == [4]


def test_a_contribution_under_way_is_pushed_again_as_it_was() -> None:
    """Whether it had arrived or not."""
    for arrived in (True, False):
        with serve(RunConfig(**PLAIN)) as server:
            worker = Worker(server.address)
            worker.step(3)
            gate = hold_pushes(worker)
            worker.step(1)
            if arrived:
                gate.set()
            checkpoint = worker.checkpoint()
            assert checkpoint["outer"]["fragments"]["1"]["flight"]["step"] == 4
            if arrived:
                worker.settle()
            worker.crash(gate)
            assert counted_steps(server.address) == [1, 4 if arrived else 0]
            back = Worker(server.address, checkpoint=checkpoint)
            back.step(2)
            assert counted_steps(server.address) == [1, 4]
            back.outer.flush()
            assert counted_steps(server.address) == [6, 6]
            back.outer.close()


def test_a_run_that_went_on_without_the_worker_takes_its_work_later() -> None:
    with serve(RunConfig(**PLAIN, lease_seconds=1.0)) as server:
        worker = Worker(server.address)
        worker.step(3)
        checkpoint = worker.checkpoint()
        progress = worker.theta() - worker.local()
        worker.crash()
        other = Worker(server.address, "o")
        other.step(20)
        other.settle()
        while max(w["step"] for w in diloco_client.status(server.address)["workers"]) < 20:
            pass  # its next heartbeat says so
        back = Worker(server.address, checkpoint=checkpoint)
        assert back.outer.global_step >= 20, "its place in the schedule is the run's, as far as the server knows it"
        assert back.outer.stats.steps == 3
        back.outer._replica.merge()
        torch.testing.assert_close(back.theta() - back.local(), progress, atol=1e-6, rtol=1e-5)
        assert not torch.equal(progress, torch.zeros_like(progress))
        back.outer.flush()
        assert counted_steps(server.address) == [3, 3]


def test_a_state_of_a_state_knows_what_was_adopted() -> None:
    """After a resume that took θ, the next checkpoint does not take the same contribution for later work again."""
    with serve(RunConfig(**PLAIN)) as server:
        worker = Worker(server.address)
        worker.step(3)
        checkpoint = worker.checkpoint()
        worker.step(3)
        worker.crash()
        back = Worker(server.address, checkpoint=checkpoint)
        back.step(2)
        again = back.checkpoint()
        back.crash()
        third = Worker(server.address, checkpoint=again)
        for name, value in third.model.state_dict().items():
            assert torch.equal(value, again["model"][name])
        third.outer.flush()


def test_a_fresh_process_under_the_same_name_is_not_mistaken_for_a_resumed_one() -> None:
    with serve(RunConfig(**PLAIN)) as server:
        worker = Worker(server.address)
        worker.step(6)
        worker.crash()
        fresh = Worker(server.address)
        fresh.step(2)
        checkpoint = fresh.checkpoint()
        fresh.crash()
        back = Worker(server.address, checkpoint=checkpoint)
        for name, value in back.model.state_dict().items():
            assert torch.equal(value, checkpoint["model"][name]), "its two steps are in nobody's θ yet"


class TestRefused:
    """States that do not fit; nothing is changed by the attempt."""

    @pytest.fixture
    def server(self) -> Iterator[Any]:
        with serve(RunConfig(**QUICK)) as server:
            yield server

    @pytest.fixture
    def checkpoint(self, server: Any) -> dict[str, Any]:
        worker = Worker(server.address)
        worker.step(8)
        checkpoint = worker.checkpoint()
        worker.crash()
        return checkpoint

    def test_another_workers(self, server: Any, checkpoint: dict[str, Any]) -> None:
        with pytest.raises(diloco_client.StateMismatch, match=r"of worker 'w' and this one is 'x'.*worker_id='w'"):
            Worker(server.address, "x", checkpoint, order="load, join")

    def test_another_runs(self, checkpoint: dict[str, Any]) -> None:
        with serve(RunConfig(**QUICK)) as other:
            with pytest.raises(diloco_client.StateMismatch, match="leave the state out"):
                Worker(other.address, checkpoint=checkpoint)
            assert diloco_client.status(other.address)["state"] == "empty", "it has not even brought its model"
            with pytest.raises(diloco_client.StateMismatch, match="the server runs"):
                Worker(other.address, checkpoint=checkpoint, order="join, load")

    def test_of_another_model(self, server: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["outer"]["layout"] = "0" * 16
        with pytest.raises(diloco_client.StateMismatch, match="another model"):
            Worker(server.address, checkpoint=checkpoint)

    def test_without_the_models_part(self, server: Any, checkpoint: dict[str, Any]) -> None:
        worker = Worker(server.address)
        before = worker.local()
        with pytest.raises(diloco_client.StateMismatch, match="Load model and optimizer of the same checkpoint first"):
            worker.outer.load_state_dict(checkpoint["outer"])
        assert torch.equal(worker.local(), before)
        assert worker.outer.stats.steps == 0
        worker.step(6)  # and it can be used

    def test_after_the_first_step(self, server: Any, checkpoint: dict[str, Any]) -> None:
        worker = Worker(server.address)
        worker.step(1)
        with pytest.raises(diloco_client.StateMismatch, match="before training goes on"):
            worker.outer.load_state_dict(checkpoint["outer"])

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda s: s["fragments"]["0"]["base"].__setitem__(3, 7.0), "fragment 0 is damaged"),
            (lambda s: s["fragments"]["0"]["flight"]["frames"][50:60].bitwise_not_(), "checksum"),
            (lambda s: s.pop("progress"), r"not what outer\.state_dict"),
            (lambda s: s.update(format=9), "format 9"),
        ],
    )
    def test_damaged(self, server: Any, checkpoint: dict[str, Any], damage: Any, message: str) -> None:
        damage(checkpoint["outer"])
        with pytest.raises(diloco_client.StateMismatch, match=message):
            Worker(server.address, checkpoint=checkpoint)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_goes_through_a_distributed_checkpoint(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK, uplink_codec="int2")) as server:
        worker = Worker(server.address)
        worker.step(11)  # one contribution is under way
        wanted = worker.checkpoint()["outer"]
        dcp.save({"model": worker.model, "outer": worker.outer}, checkpoint_id=tmp_path)
        courier = worker.outer._courier
        assert courier.wait_until(courier.anything_ready, 30, 30)  # else the successor has to account for it
        worker.crash()
        back = Worker(server.address)
        dcp.load({"model": back.model, "outer": back.outer}, checkpoint_id=tmp_path)
        assert back.outer.stats.steps == 11
        found = back.outer.state_dict()
        for state in (wanted, found):
            assert state["fragments"]["1"]["flight"]["step"] == 10
            del state["generation"], state["spent"]
            for fragment in state["fragments"].values():
                for fate in ("outcome", "counted", "needs"):  # heard or not
                    del fragment["flight"][fate]
        assert_equal(wanted, found)


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert (type(first), first) == (type(second), second)


def test_a_killed_process_goes_on_from_its_checkpoint_and_every_step_counts_once(tmp_path: Path) -> None:
    end = 40
    with serve(RunConfig(**PLAIN, lease_seconds=2.0)) as server, ExitStack() as stack:

        def start() -> subprocess.Popen[str]:
            command = [sys.executable, str(SCRIPT), server.address, "w", str(tmp_path), str(end)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        first = start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "step").exists() or int((tmp_path / "step").read_text()) < 14:
            assert first.poll() is None, first.stderr.read() if first.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first.kill()
        first.wait()
        second = start()
        output, errors = second.communicate(timeout=60)
        assert second.returncode == 0, errors
        report = json.loads(output)
        fragments = diloco_client.status(server.address, rounds=64)["fragments"]
        members = [[m for r in f["rounds"] for m in r["members"]] for f in fragments]
    assert report["from"] >= 12
    assert report["steps"] == end
    assert report["digests"] == {str(f["index"]): int(f["digest"], 16) for f in fragments}
    for each in members:
        counted = [m["steps"] for m in each]
        # Where the first process had come further than its checkpoint the second counts from there, else from what was
        # counted: in either case its own steps and nothing else.
        sums = [sum(counted[:i]) for i in range(len(counted) + 1)]
        former = [s for s in sums if s + end - min(s, report["from"]) == sums[-1]]
        assert former, (report, counted)
