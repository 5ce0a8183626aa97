"""A run through the real server equals a single-process torch DiLoCo, with fp32 on the wire."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_diloco import ReferenceDiloco
from torch import nn

import diloco_client
from diloco_client import binding
from diloco_client.binding import Binding
from diloco_proto.manifest import Pattern, build_layout
from diloco_proto.schedule import Schedule
from diloco_server import RunConfig, serve

WORKERS = 3
BATCH = 8


def make_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 1))


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05)
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, worker: int, step: int) -> None:
    data = torch.Generator().manual_seed(1000 * worker + step)
    x = torch.randn(BATCH, 6, generator=data)
    target = torch.sin(x.sum(1, keepdim=True) + worker)
    loss = nn.functional.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def reference_run(config: RunConfig, kind: str, steps: int, workers: int) -> ReferenceDiloco:
    models = [make_model() for _ in range(workers)]
    optimizers = [make_optimizer(kind, m) for m in models]
    layout = build_layout(
        Binding(models[0], optimizers[:1]).manifest,
        config.num_fragments,
        Pattern(config.fragment_pattern),
    )
    oracle = ReferenceDiloco(
        models,
        [[s.tensor.name for s in f.slots] for f in layout.trained],
        sync_every=config.sync_every,
        overlap_steps=config.overlap_steps,
        mixing_alpha=config.mixing_alpha,
        outer_lr=config.outer_lr,
        outer_momentum=config.outer_momentum if config.outer_optimizer == "nesterov" else 0.0,
    )
    for step in range(1, steps + 1):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            train_step(model, optimizer, worker, step)
        oracle.after_step(step)
    return oracle


def real_run(config: RunConfig, kind: str, steps: int, workers: int, together):
    models = [make_model() for _ in range(workers)]  # here: threads would share the seed
    with serve(config) as server:

        def work(index: int):
            model = models[index]
            optimizer = make_optimizer(kind, model)
            with diloco_client.join(server.address, model, optimizer, worker_id=f"w{index}") as outer:
                for step in range(1, steps + 1):
                    train_step(model, optimizer, index, step)
                theta = outer.global_state_dict()
                digests = outer.base_digests()
                local = {n: p.detach().clone() for n, p in model.named_parameters()}
                outer.close()
            return theta, local, digests

        results = together(workers, work)
        status = diloco_client.status(server.address)
    return results, status


def fp32(**changes) -> RunConfig:
    settings = {
        "uplink_codec": "fp32",
        "downlink_codec": "fp32",
        "weighting": "uniform",
        "grace_seconds": "inf",
        "min_workers": WORKERS,
    }
    return RunConfig(**(settings | changes))


SETTINGS = {
    "classic": {"sync_every": 8, "num_fragments": 1, "overlap_steps": 0, "mixing_alpha": 0.0},
    "streaming": {"sync_every": 8, "num_fragments": 4, "overlap_steps": 2, "mixing_alpha": 0.5},
    "uneven": {"sync_every": 11, "num_fragments": 4, "overlap_steps": 2, "mixing_alpha": 0.5},
}


@pytest.mark.parametrize("small", [0, binding.SMALL], ids=["encoded-in-place", "copied"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("kind", "tolerance"), [("sgd", 1e-6), ("adamw", 1e-4)])
def test_equals_single_process_diloco(
    setting: str, kind: str, tolerance: float, small: int, together, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "SMALL", small)
    config = fp32(**SETTINGS[setting])
    steps = 5 * config.sync_every
    results, status = real_run(config, kind, steps, WORKERS, together)
    oracle = reference_run(config, kind, steps, WORKERS)
    schedule = Schedule(config.sync_every, config.num_fragments, config.overlap_steps)
    under_way = (
        set()
        if config.overlap_steps == 0
        else {p for step in range(steps - config.overlap_steps + 1, steps + 1) for p in schedule.due(step).push}
    )
    settled = [f for f in status["fragments"] if f["index"] not in under_way]
    assert len(settled) >= config.num_fragments - 1
    for index, (theta, local, digests) in enumerate(results):
        for name, expected in oracle.theta.items():
            torch.testing.assert_close(theta[name], expected, rtol=tolerance, atol=1e-6)
            torch.testing.assert_close(local[name], oracle.locals[index][name], rtol=tolerance, atol=1e-6)
        for f in settled:
            assert digests[f["index"]] == int(f["digest"], 16)
    for f in settled:
        skipped = schedule.apply_offset(f["index"]) <= config.overlap_steps  # its first push would be at k <= 0
        assert f["version"] == 5 - skipped


def test_outer_sgd_with_lr_1_is_plain_averaging(together) -> None:
    config = fp32(sync_every=5, num_fragments=1, overlap_steps=0, mixing_alpha=0.0, outer_optimizer="sgd", outer_lr=1.0)
    results, _ = real_run(config, "sgd", 5, WORKERS, together)
    models = [make_model() for _ in range(WORKERS)]
    for worker, model in enumerate(models):
        optimizer = make_optimizer("sgd", model)
        for step in range(1, 6):
            train_step(model, optimizer, worker, step)
    for name in results[0][0]:
        mean = torch.stack([m.state_dict()[name] for m in models]).mean(0)
        torch.testing.assert_close(results[0][0][name], mean, rtol=1e-6, atol=1e-6)


def test_one_worker_alone(together) -> None:
    config = fp32(**SETTINGS["streaming"], min_workers=1)
    results, _ = real_run(config, "sgd", 40, 1, together)
    oracle = reference_run(config, "sgd", 40, 1)
    for name, expected in oracle.theta.items():
        torch.testing.assert_close(results[0][0][name], expected, rtol=1e-6, atol=1e-6)


def test_the_oracle_would_notice_a_wrong_outer_lr(together) -> None:
    config = fp32(**SETTINGS["classic"])
    oracle = reference_run(config, "sgd", 40, WORKERS)
    other = copy.deepcopy(reference_run(fp32(**SETTINGS["classic"], outer_lr=0.71), "sgd", 40, WORKERS))
    assert any((oracle.theta[n] - other.theta[n]).abs().max() > 1e-5 for n in oracle.theta)
