"""`outer.global_parameters()`: θ in the model for a while, and the local parameters back."""

from __future__ import annotations

import pytest
import torch
from test_hook import QUICK, make_model, step
from torch import nn

import diloco_client
from diloco_server import RunConfig, serve


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_in_the_model_within_the_block_alone(dtype: torch.dtype) -> None:
    model = nn.Sequential(make_model().to(dtype), nn.BatchNorm1d(1).to(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with serve(RunConfig(**QUICK)) as server, diloco_client.join(server.address, model, optimizer) as outer:
        for _ in range(9):  # rounds are behind it, and work that none has counted yet
            model(torch.ones(4, 5, dtype=dtype) * torch.arange(4, dtype=dtype)[:, None]).sum().backward()
            optimizer.step()
        local, theta = copies(model), outer.global_state_dict()
        with pytest.raises(KeyError), outer.global_parameters():
            assert same(copies(model), theta)
            raise KeyError
        assert not same(local, theta)
        assert same(copies(model), local)


def test_an_inner_step_within_the_block_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with serve(RunConfig(**QUICK)) as server, diloco_client.join(server.address, model, optimizer) as outer:
        with pytest.raises(RuntimeError, match="leave the block"), outer.global_parameters():
            step(model, optimizer, 1)
        with pytest.raises(RuntimeError, match="already"), outer.global_parameters(), outer.global_parameters():
            pass
        step(model, optimizer, 1)
        assert outer.stats.steps == 1
