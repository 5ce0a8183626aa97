"""A plain loop with an `Accelerator`, which wraps the optimizer and has checkpoints of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from runs import QUICK, counted, make_data, make_layers, server_digests
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diloco_client
from diloco_server import RunConfig, serve


class Loop:
    """Model, optimizer and batches, prepared; 2 batches a step."""

    def __init__(self, address: str) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_layers()
        data = DataLoader(TensorDataset(*make_data(32)), 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        self.model, self.optimizer, self.data = self.accelerator.prepare(model, optimizer, data)
        bare = self.accelerator.unwrap_model(self.model)
        self.outer = diloco_client.join(address, bare, self.optimizer, worker_id="w")
        self.accelerator.register_for_checkpointing(self.outer)

    def epoch(self) -> None:
        """4 steps."""
        for x, y in self.data:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(nn.functional.mse_loss(self.model(x), y))
                self.optimizer.step()
                self.optimizer.zero_grad()


def test_a_step_is_one_after_the_last_batch_that_it_accumulates() -> None:
    with serve(RunConfig(**QUICK)) as server:
        loop = Loop(server.address)
        with loop.outer:
            loop.epoch()
            assert loop.outer.stats.steps == 4
        assert counted(server.address) == [4, 4]


def test_a_worker_goes_on_from_the_accelerators_checkpoint_to_the_same_theta(tmp_path: Path) -> None:
    ends = []
    for interrupted in (False, True):
        with serve(RunConfig(**QUICK)) as server:
            loop = Loop(server.address)
            for _ in range(2):
                loop.epoch()
            if interrupted:
                loop.accelerator.save_state(str(tmp_path))  # with one contribution under way
                loop.outer.close()
                loop = Loop(server.address)
                loop.accelerator.load_state(str(tmp_path))
            for _ in range(2):
                loop.epoch()
            loop.outer.flush()
            assert loop.outer.stats.steps == 16
            assert loop.outer.base_digests() == server_digests(server.address)
            ends.append((loop.outer.base_digests(), counted(server.address)))
            loop.outer.close()
    assert ends[0] == ends[1]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_whose_gradients_overflowed_does_not_count(fused: bool) -> None:
    """A fused optimizer is called nevertheless, and makes none."""
    model = make_layers()
    inner = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
    Accelerator(cpu=True)  # AcceleratedOptimizer wants its state
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    x, y = make_data(4)
    with serve(RunConfig(**QUICK)) as server, diloco_client.join(server.address, model, optimizer) as outer:
        for factor in (1.0, float("inf"), 1.0):
            scaler.scale(factor * nn.functional.mse_loss(model(x), y)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert outer.stats.steps == 2
