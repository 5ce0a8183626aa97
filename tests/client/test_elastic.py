"""What a trainer sees of the whole algorithm: progress, shards, ends, buffers, coarse and asynchronous runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diloco_client
from diloco_client.link import Shard
from diloco_server import RunConfig, serve

QUICK = {"sync_every": 6, "num_fragments": 2, "overlap_steps": 1}


def make_model(*, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        middle = [nn.BatchNorm1d(40)] if norm else []
        return nn.Sequential(nn.Linear(5, 40), *middle, nn.Tanh(), nn.Linear(40, 1))


def evaluate(model: nn.Module) -> float:
    x = torch.randn(4096, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin()).item()


@pytest.fixture(autouse=True)
def _all_leave() -> Iterator[None]:
    yield
    while Worker.joined:
        Worker.joined.pop().outer.close()


class Worker:
    """A model in a run, trained step by step on data of its own."""

    joined: ClassVar[list[Worker]] = []

    def __init__(self, address: str, name: str, model: nn.Module | None = None) -> None:
        self.model = model or make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.outer = diloco_client.join(address, self.model, self.optimizer, worker_id=name)
        self.joined.append(self)
        self._data = torch.Generator().manual_seed(sum(name.encode()))

    def step(self, count: int = 1) -> float:
        for _ in range(count):
            x = torch.randn(16, 5, generator=self._data)
            loss = nn.functional.mse_loss(self.model(x), x.sum(1, keepdim=True).sin())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item()


def test_steps_are_counted_from_where_the_run_is() -> None:
    with serve(RunConfig(**QUICK, lease_seconds=1.0)) as server:
        first = Worker(server.address, "a")
        first.step(9)
        assert first.outer.global_step == 9
        first.outer.close()
        second = Worker(server.address, "b")
        assert second.outer.global_step == 9
        second.step(2)
        assert second.outer.global_step == 11
        second.outer.close()


def test_shards_are_the_workers_own_and_a_replacement_takes_over(together) -> None:
    with serve(RunConfig(**QUICK, min_workers=2)) as server:
        workers = together(2, lambda i: Worker(server.address, f"w{i}"))
        assert {w.outer.shard for w in workers} == {Shard(0, 2), Shard(1, 2)}
        left = workers[0].outer.shard
        workers[0].outer.close()
        successor = Worker(server.address, "new")
        assert successor.outer.shard == left
        third = Worker(server.address, "third")
        assert third.outer.shard == Shard(2, 3)
        for worker in (workers[1], successor, third):
            worker.outer.close()


@pytest.mark.parametrize("limit", [{"stop_after_rounds": 3}, {"stop_after_tokens": 300}])
def test_all_workers_are_told_when_the_run_has_had_enough(limit: dict[str, int], together) -> None:
    config = RunConfig(**QUICK, min_workers=2, grace_seconds="inf", **limit)
    with serve(config) as server:

        def work(index: int) -> tuple[int, dict[int, int]]:
            worker = Worker(server.address, f"w{index}")
            while not worker.outer.should_stop:
                worker.step()
                worker.outer.report(tokens=16)
                assert worker.outer.stats.steps < 500
            worker.outer.flush(together=True)
            return worker.outer.stats.steps, worker.outer.base_digests()

        (first, digests), (second, others) = together(2, work)
        status = diloco_client.status(server.address)
        late = Worker(server.address, "late")
        assert late.outer.should_stop
        late.outer.close()
    assert digests == others
    assert abs(first - second) <= QUICK["sync_every"]
    if "stop_after_rounds" in limit:
        assert status["stopped"] == "3 rounds"
        assert first < 40
    else:
        assert status["tokens"] >= 300


def test_who_is_left_alone_still_merges_what_was_decided_before(together) -> None:
    """Its update is late, and until it has come the worker hears that no further round closes without others."""
    config = RunConfig(sync_every=6, num_fragments=2, overlap_steps=4, min_workers=2, grace_seconds="inf")
    with serve(config) as server:
        left, stays = together(2, lambda i: Worker(server.address, "ab"[i]))
        alone = threading.Event()
        courier, pull = stays.outer._courier, stays.outer._transport.pull
        set_held = courier.set_held

        def hear(held: bool) -> None:
            set_held(held)
            if held:
                alone.set()

        def late(*args: Any) -> Any:
            assert alone.wait(30)
            return pull(*args)

        courier.set_held, stays.outer._transport.pull = hear, late
        left.step(2)  # fragment 1 is pushed, to be merged after step 6
        stays.step(2)
        assert courier.wait_until(lambda: courier._flights._announced[1] == 1, 30, 30)
        left.outer.close()
        stays.step(3)  # fragment 0, of which no round closes any more
        training = threading.Thread(target=stays.step, daemon=True)
        training.start()
        training.join(30)
        assert not training.is_alive()
        assert [base.version for base in courier.bases] == [0, 1]


def test_tokens_weigh_contributions_and_losses_are_shown(together) -> None:
    config = RunConfig(sync_every=4, num_fragments=1, overlap_steps=0, min_workers=2, grace_seconds="inf")
    with serve(config) as server:

        def work(index: int) -> None:
            worker = Worker(server.address, f"w{index}")
            for _ in range(8):
                worker.outer.report(tokens=100 + 50 * index, loss=2.5 + index)
                worker.step()
            worker.outer.close()

        together(2, work)
        status = diloco_client.status(server.address, rounds=8)
    (fragment,) = status["fragments"]
    assert [r["version"] for r in fragment["rounds"]] == [1, 2]
    for record in fragment["rounds"]:
        assert {m["worker_id"]: m["weight"] for m in record["members"]} == pytest.approx({"w0": 0.4, "w1": 0.6})
        assert [m["tokens"] for m in record["members"]] == [400, 600]
        assert all(m["norm"] > 0 and m["scale"] == 1.0 for m in record["members"])
        assert record["missed"] == []
    assert status["tokens"] == 2000
    assert {w["worker_id"]: w["loss"] for w in status["workers"]} == {"w0": 2.5, "w1": 3.5}


def test_a_loss_may_be_the_tensor_that_is_trained_on(recwarn: pytest.WarningsRecorder) -> None:
    torch.set_warn_always(True)
    try:
        with serve(RunConfig(**QUICK)) as server:
            worker = Worker(server.address, "w")
            worker.outer.report(loss=torch.tensor(2.5, requires_grad=True))
            worker.step()
            worker.outer.close()
            assert [w["loss"] for w in diloco_client.status(server.address)["workers"]] == [2.5]
    finally:
        torch.set_warn_always(False)
    assert [w for w in recwarn if "scalar" in str(w.message)] == []


def test_an_inner_step_has_at_least_one_token() -> None:
    with serve(RunConfig(**QUICK)) as server:
        worker = Worker(server.address, "a")
        with pytest.raises(ValueError, match="at least one token"):
            worker.outer.report(tokens=0)
        worker.outer.close()


def test_batch_norm_statistics_are_averaged(together) -> None:
    config = RunConfig(sync_every=4, num_fragments=2, overlap_steps=0, min_workers=2, grace_seconds="inf")
    models = [make_model(norm=True) for _ in range(2)]
    with serve(config) as server:

        def work(index: int) -> list[torch.Tensor]:
            worker = Worker(server.address, f"w{index}", models[index])
            worker.step(3)
            means = [models[index][1].running_mean.clone()]
            worker.step(1)  # its merge comes at the end of this step
            means.append(models[index][1].running_mean.clone())
            assert models[index][1].num_batches_tracked == 4
            worker.outer.flush(together=True)
            return [*means, worker.outer.global_state_dict()["1.running_mean"]]

        first, second = together(2, work)
        kinds = [f["kind"] for f in diloco_client.status(server.address)["fragments"]]
    assert kinds == ["trained", "trained", "buffers"]
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    assert torch.equal(models[0][1].running_var, models[1][1].running_var)
    assert first[2].abs().max() > 0


@pytest.mark.parametrize("uplink", ["int2", "ternary"])
def test_coarse_contributions_still_teach(uplink: str, together) -> None:
    config = RunConfig(**QUICK, min_workers=2, uplink_codec=uplink, grace_seconds="inf")
    untaught = evaluate(make_model())
    with serve(config) as server:

        def work(index: int) -> tuple[float, dict[int, int]]:
            worker = Worker(server.address, f"w{index}")
            worker.step(200)
            worker.outer.flush(together=True)
            return evaluate(worker.model), worker.outer.base_digests()

        (first, digests), (second, others) = together(2, work)
    assert digests == others
    assert first == second < 0.5 * untaught


def test_an_asynchronous_run_waits_for_nobody(together) -> None:
    config = RunConfig(**QUICK, outer_optimizer="delayed-nesterov", delay_buffer=2)
    with serve(config) as server:
        slow = Worker(server.address, "slow")
        slow.step(2)
        fast = Worker(server.address, "fast")
        before = fast.step()
        fast.step(119)
        assert fast.outer.stats.counted >= 38
        assert fast.outer.stats.not_counted == 0
        slow.step(20)
        assert slow.outer.stats.counted >= 5

        def end(index: int) -> dict[int, int]:
            worker = (slow, fast)[index]
            worker.outer.flush(together=True)
            return worker.outer.base_digests()

        digests = together(2, end)
        status = diloco_client.status(server.address, rounds=64)
    assert digests[0] == digests[1]
    assert fast.step() < before
    members = [m for f in status["fragments"] for r in f["rounds"] for m in r["members"]]
    assert all(len(r["members"]) == 1 for f in status["fragments"] for r in f["rounds"])
    assert max(m["staleness"] for m in members if m["worker_id"] == "slow") > 5
    for worker in (slow, fast):
        worker.outer.close()


def test_an_export_has_the_averaged_buffers(tmp_path: Path) -> None:
    with serve(RunConfig(sync_every=4, num_fragments=1, overlap_steps=0)) as server:
        worker = Worker(server.address, "a", make_model(norm=True))
        worker.step(5)
        worker.outer.flush()
        diloco_client.export(server.address, tmp_path / "theta.safetensors")
        worker.outer.close()
    fresh = make_model(norm=True)
    missing, unexpected = fresh.load_state_dict(load_file(tmp_path / "theta.safetensors"), strict=False)
    assert set(missing) <= {"1.num_batches_tracked"}
    assert unexpected == []
    assert torch.equal(fresh[1].running_var, worker.model[1].running_var)
