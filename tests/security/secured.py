"""Workers of a small run through TLS and tokens, and what those hear who are refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import diloco_client
from diloco_proto.errors import (
    DilocoError,
)
from diloco_server import RunConfig, serve
from diloco_server.daemon import Daemon

CONFIG = RunConfig(sync_every=3, num_fragments=2, overlap_steps=1, uplink_codec="fp32", downlink_codec="fp32")
WRONG = "x" * 43


@contextmanager
def secured(folder: Path | None, **settings: object) -> Iterator[Daemon]:
    with serve(CONFIG, state_dir=folder, secure=True, **settings) as server:
        yield server


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def joins(address: str | None, steps: int = 13, **credentials: object) -> dict[int, int]:
    """Train a little in the run; the digests at the end."""
    model, optimizer = net()
    before = train(model, optimizer, 1)
    with diloco_client.join(address, model, optimizer, connect_timeout=20, **credentials) as outer:
        assert train(model, optimizer, steps) < before
        outer.flush()
        assert outer.stats.counted > 0
        return outer.base_digests()


def digests(address: str, **credentials: object) -> dict[int, int]:
    fragments = diloco_client.status(address, **credentials)["fragments"]
    return {f["index"]: int(f["digest"], 16) for f in fragments if f["kind"] != "frozen"}


@contextmanager
def refused(error: type[DilocoError], *says: str, seconds: float = 8.0) -> Iterator[None]:
    """By that error, which says these things, at once and not after the time to wait for a server."""
    began = time.monotonic()
    with pytest.raises(DilocoError) as caught:
        yield
    assert type(caught.value) is error, caught.value
    for text in says:
        assert text in str(caught.value)
    assert time.monotonic() - began < seconds


def with_token(url: str, token: str) -> str:
    return f"diloco://{token}@{url.partition('@')[2]}"
