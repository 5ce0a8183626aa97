"""Runs that the integrations are tested in, and what is asked of their servers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import diloco_client

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


class Stopped(Exception):
    """Stands for whatever ends a process."""


def make_layers(seed: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1))


def make_data(count: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 5) and (count, 1)."""
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True).sin()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def counted(address: str, what: str = "steps", name: str = "w") -> list[int]:
    """Inner steps, or tokens, of the worker that each fragment has counted."""
    fragments = diloco_client.status(address, rounds=64)["fragments"]
    members = [[m for r in f["rounds"] for m in r["members"] if m["worker_id"] == name] for f in fragments]
    return [sum(m[what] for m in each) for each in members]


def server_digests(address: str) -> dict[int, int]:
    return {f["index"]: int(f["digest"], 16) for f in diloco_client.status(address)["fragments"]}


def settle(outer: diloco_client.Outer) -> None:
    """Until the server has decided on all that was pushed."""
    courier = outer._courier
    while not courier.none_in_flight():
        assert courier.wait_until(courier.anything_ready, 30, 30)
        outer._replica.merge(early=True)
    outer._witness.stepped()


def worker_states(address: str) -> dict[str, str]:
    return {worker["worker_id"]: worker["state"] for worker in diloco_client.status(address)["workers"]}


def last_loss(address: str) -> float | None:
    """That the run's only worker has told of."""
    (worker,) = diloco_client.status(address)["workers"]
    return worker["loss"]


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what happens elsewhere, 30 s at most."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
