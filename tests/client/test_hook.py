"""`join` and the hooked loop, against a real server on loopback."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diloco_client
from diloco_client import binding
from diloco_server import RunConfig, serve

QUICK = {"sync_every": 6, "num_fragments": 2, "overlap_steps": 1, "grace_seconds": "inf"}


def make_model(seed: int = 3, hidden: int = 40) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    data = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 5, generator=data)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train(address: str, name: str, steps: int, *, together: bool = True, model: nn.Module | None = None):
    model = model or make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with diloco_client.join(address, model, optimizer, worker_id=name) as outer:
        for number in range(steps):
            step(model, optimizer, hash((name, number)) & 0xFFFF)
        outer.flush(together=together)
        return outer, model


@pytest.mark.parametrize(
    ("uplink", "downlink"),
    [("int4", "int4"), ("int3", "int3"), ("e3m0", "e3m0"), ("mxfp4", "int8"), ("bf16", "bf16"), ("fp32", "fp32")],
)
def test_all_end_on_bit_identical_parameters(uplink: str, downlink: str, together) -> None:
    config = RunConfig(**QUICK, min_workers=3, uplink_codec=uplink, downlink_codec=downlink)
    with serve(config) as server:
        models = [make_model(seed) for seed in range(3)]  # only the first to join keeps its own
        results = together(3, lambda i: train(server.address, f"w{i}", 30, model=models[i]))
        fragments = diloco_client.status(server.address)["fragments"]
    digests = {f["index"]: int(f["digest"], 16) for f in fragments}
    for outer, model in results:
        assert outer.base_digests() == digests
        for name, value in outer.global_state_dict().items():
            assert torch.equal(value, model.state_dict()[name])
        assert outer.stats.not_counted == 0
        assert outer.stats.counted == outer.stats.rounds == sum(f["version"] for f in fragments)


def test_bits_a_parameter_and_bytes_are_counted(together) -> None:
    config = RunConfig(sync_every=4, num_fragments=1, overlap_steps=1, grace_seconds="inf")
    with serve(config) as server:
        outer, _ = train(server.address, "w", 40, model=make_model(hidden=20_000))
        stats = outer.stats
    parameters = 20_000 * 7 + 1
    assert 2.0 < stats.bits_up < 4.3
    assert 2.0 < stats.bits_down < 4.3
    seed = stats.bytes_up - stats.counted * stats.bits_up / 8 * parameters
    assert 3.2 * parameters < seed < 3.6 * parameters  # fp32, of which zstd saves a seventh
    assert stats.bytes_down == pytest.approx(stats.counted * stats.bits_down / 8 * parameters, rel=0.02)
    assert stats.steps == 40
    assert 0 <= stats.stall_seconds < stats.train_seconds


def test_training_goes_on_unhooked_after_the_block() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with serve(RunConfig(**QUICK)) as server:
        with diloco_client.join(server.address, model, optimizer) as outer:
            step(model, optimizer, 1)
        assert outer.stats.steps == 1
    step(model, optimizer, 2)
    assert outer.stats.steps == 1
    assert not optimizer._optimizer_step_post_hooks


def test_leaving_the_block_flushes_and_an_error_does_not() -> None:
    with serve(RunConfig(sync_every=100, num_fragments=1)) as server:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with diloco_client.join(server.address, model, optimizer, worker_id="a"):
            step(model, optimizer, 1)
        assert diloco_client.status(server.address)["fragments"][0]["version"] == 1
        with (
            pytest.raises(RuntimeError, match="mine"),
            diloco_client.join(server.address, model, optimizer, worker_id="b"),
        ):
            step(model, optimizer, 2)
            raise RuntimeError("mine")
        assert diloco_client.status(server.address)["fragments"][0]["version"] == 1


def test_flush_twice_moves_nothing_the_second_time() -> None:
    with serve(RunConfig(**QUICK)) as server:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with diloco_client.join(server.address, model, optimizer) as outer:
            step(model, optimizer, 1)
            outer.flush()
            first = outer.base_digests()
            outer.flush()
            assert outer.base_digests() == first
            step(model, optimizer, 2)  # and training can go on
            outer.flush()
            assert outer.base_digests() != first


def test_a_late_joiner_adopts_theta_and_is_in_later_rounds(together) -> None:
    with serve(RunConfig(**QUICK, min_workers=2)) as server:
        joined = threading.Event()
        late: list[dict[str, torch.Tensor]] = []

        def work(index: int):
            model = make_model(index)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            if index == 2:
                assert joined.wait(30)
            with diloco_client.join(server.address, model, optimizer, worker_id=f"w{index}") as outer:
                if index == 2:
                    late.append(outer.global_state_dict())
                for number in range(60 if index < 2 else 24):
                    step(model, optimizer, 100 * index + number)
                    if number == 20:
                        joined.set()
                outer.flush(together=True)
                return outer.base_digests(), outer.stats

        results = together(3, work)
        status = diloco_client.status(server.address)
    assert len({tuple(digests.items()) for digests, _ in results}) == 1
    assert late
    assert any(not torch.equal(value, make_model(2).state_dict()[name]) for name, value in late[0].items())
    assert results[2][1].counted > 0
    assert status["state"] == "finished"


class Worker:
    """One worker of several that a test moves by hand, all in its own thread."""

    def __init__(self, address: str, name: str) -> None:
        self.model = make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.outer = diloco_client.join(address, self.model, self.optimizer, worker_id=name)
        self._number = 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._number += 1
            step(self.model, self.optimizer, self._number)

    def progress(self) -> torch.Tensor:
        """What this worker has trained that is not in θ yet."""
        theta = self.outer.global_state_dict()
        return torch.cat([(theta[n] - p.detach()).flatten() for n, p in self.model.named_parameters()])

    def base(self) -> torch.Tensor:
        theta = self.outer.global_state_dict()
        return torch.cat([theta[n].flatten() for n, _ in self.model.named_parameters()])

    def hold_pushes(self) -> threading.Event:
        """Keep contributions on this side until the event is set, as a slow link would."""
        gate, push = threading.Event(), self.outer._transport.push

        def held(*args):
            assert gate.wait(30)
            return push(*args)

        self.outer._transport.push = held
        return gate


def two_workers(address: str) -> tuple[Worker, Worker]:
    """Both in an open run of H=4, P=1, τ=1 and no grace, the first round over."""
    first, second = Worker(address, "a"), Worker(address, "b")
    first.step(4)
    courier = second.outer._courier
    assert courier.wait_until(courier.anything_ready, 30)
    second.step(1)  # merges the round that it was not in
    assert second.outer.stats.rounds == 1
    assert first.outer.base_digests() == second.outer.base_digests()
    return first, second


def test_work_that_was_not_counted_stays_for_the_next_contribution() -> None:
    with serve(RunConfig(sync_every=4, num_fragments=1, overlap_steps=1, grace_seconds=0)) as server:
        first, second = two_workers(server.address)
        gate = second.hold_pushes()
        second.step(2)  # pushes at step 3
        first.step(4)  # closes the round without it
        gate.set()
        second.outer._courier.wait(0)
        before, old = second.progress(), second.base()
        second.outer._replica.merge(early=True)
        assert second.outer.stats.not_counted == 1
        open_share = 0.5 * (second.base() - old)
        torch.testing.assert_close(second.progress(), before + open_share, atol=1e-6, rtol=1e-5)
        assert before.abs().max() > 1e-3
        assert first.outer.base_digests() == second.outer.base_digests()
        assert second.outer._replica._uncounted[0].step == 0
        for worker in (first, second):
            worker.outer.close()


def test_a_late_merge_leaves_the_later_steps_for_the_next_contribution() -> None:
    with serve(RunConfig(sync_every=4, num_fragments=1, overlap_steps=1, outer_lr=1.0, uplink_codec="fp32")) as server:
        worker = Worker(server.address, "a")
        courier = worker.outer._courier
        wait, courier.wait = courier.wait, lambda fragment: None  # the server is out of reach at the merge
        gate = worker.hold_pushes()
        worker.step(3)
        pushed = worker.progress()
        worker.step(3)
        both = worker.progress()
        gate.set()
        wait(0)
        worker.outer._replica.merge()
        assert worker.outer.stats.counted == 1
        torch.testing.assert_close(worker.progress(), both - pushed, atol=1e-6, rtol=1e-5)
        assert worker.outer._replica._uncounted[0].step == 3
        worker.outer.close()


def test_tied_frozen_and_bf16_parameters_survive_a_run(together) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.frozen(self.embed(x))))

    def build(seed: int) -> Model:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Model().bfloat16()

    models = [build(i) for i in range(2)]
    with serve(RunConfig(**QUICK, min_workers=2)) as server:

        def work(index: int):
            model = models[index]
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            with diloco_client.join(server.address, model, optimizer, worker_id=f"w{index}") as outer:
                data = torch.Generator().manual_seed(index)
                for _ in range(24):
                    tokens = torch.randint(16, (32,), generator=data)
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(tokens).float(), (tokens + 1) % 16).backward()
                    optimizer.step()
                outer.flush(together=True)
                return outer.global_state_dict()

        first, second = together(2, work)
    for name, value in first.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, second[name])
        assert torch.equal(value, models[0].state_dict()[name])
    assert torch.equal(models[0].frozen.weight, models[1].frozen.weight)
    assert models[1].head.weight is models[1].embed.weight


def test_another_model_is_refused_by_its_first_different_tensor() -> None:
    with serve(RunConfig(**QUICK)) as server:
        train(server.address, "first", 1, together=False)
        with pytest.raises(
            diloco_client.ManifestMismatch, match=r"0\.weight float32\[40, 5\].*0\.weight float32\[41, 5\]"
        ):
            train(server.address, "second", 1, model=make_model(hidden=41))


def test_a_server_that_is_not_up_is_waited_for_with_a_word_then_a_clear_error(caplog) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        caplog.at_level(logging.WARNING, "diloco"),
        pytest.raises(diloco_client.ServerUnreachable, match="127.0.0.1:1 "),
    ):
        diloco_client.join("127.0.0.1:1", model, optimizer, connect_timeout=1.5)
    assert "waiting for a diloco-server at 127.0.0.1:1" in caplog.text


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", ":50051", "localhost:0", "localhost:99999", "http://a:1"]
)
def test_a_malformed_address_fails_at_once(address: str) -> None:
    model = make_model()
    with pytest.raises(diloco_client.InvalidAddress, match="HOST:PORT"):
        diloco_client.join(address, model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("small", [0, binding.SMALL], ids=["encoded-in-place", "copied"])
def test_diverged_parameters_stop_the_worker_by_tensor_name(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "SMALL", small)
    with serve(RunConfig(sync_every=2, num_fragments=1, overlap_steps=0)) as server:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with (
            pytest.raises(diloco_client.NonFiniteParameter, match=r"'2\.weight'"),
            diloco_client.join(server.address, model, optimizer),
        ):
            with torch.no_grad():
                model[2].weight[0, 3] = float("inf")
            for number in range(4):
                optimizer.step()
                assert number < 3
        assert diloco_client.status(server.address)["fragments"][0]["version"] == 0


def test_the_same_worker_id_in_a_newer_process_stops_the_older_one() -> None:
    with serve(RunConfig(**QUICK)) as server:
        model, newer = make_model(), make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = diloco_client.join(server.address, model, optimizer, worker_id="same")
        with (
            diloco_client.join(server.address, newer, torch.optim.SGD(newer.parameters(), lr=0.1), worker_id="same"),
            pytest.raises(diloco_client.Superseded, match="same"),
        ):
            for number in range(200):
                step(model, optimizer, number)
        outer.close()


def test_export_loads_into_the_model(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK)) as server:
        outer, model = train(server.address, "w", 12)
        count = diloco_client.export(server.address, tmp_path / "theta.safetensors")
    loaded = load_file(tmp_path / "theta.safetensors")
    assert count == len(loaded) == 4
    fresh = make_model(99)
    fresh.load_state_dict(loaded)
    for name, value in outer.global_state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
        assert torch.equal(model.state_dict()[name], value)


def test_export_before_there_is_a_model_says_so(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK)) as server, pytest.raises(diloco_client.NotReady, match="no worker has joined"):
        diloco_client.export(server.address, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_server_that_goes_away_does_not_stop_training(together: Callable[..., list[object]]) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with serve(RunConfig(**QUICK)) as server:
        outer = diloco_client.join(server.address, model, optimizer)
        for number in range(10):
            step(model, optimizer, number)
    before = outer.stats.steps
    for number in range(20):
        step(model, optimizer, number)
    assert outer.stats.steps == before + 20
    outer.close()


def test_all_names_are_public_and_exist() -> None:
    assert diloco_client.__all__ == sorted(diloco_client.__all__)
    assert all(getattr(diloco_client, name) for name in diloco_client.__all__)
