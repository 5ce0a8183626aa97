"""What the ranks of the tests' islands train, and plain workers beside them: `trainee.py KIND ADDRESS OUT [--…]`.

Started once a rank, by torchrun or with the environment it gives. Ends together with all other workers and writes what
it holds to OUT.RANK.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import diloco_client
import diloco_client.transport
from diloco_client.transport import Retry


class Net(nn.Module):
    """No dimension but the input's is divisible by 2, 4 or 64; a tied pair, a buffer, a frozen tensor."""

    def __init__(self, width: int, norm: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, width, dtype=dtype), nn.Tanh(), nn.Linear(width, 11, dtype=dtype))
        self.norm = nn.BatchNorm1d(11, dtype=dtype) if norm else nn.Identity()
        self.head = nn.Linear(11, 3, bias=False, dtype=dtype)
        self.again = nn.Linear(11, 3, bias=False, dtype=dtype)
        self.again.weight = self.head.weight
        self.frozen = nn.Parameter(torch.full((7,), 0.5, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.inner(x))
        return self.head(y) + self.again(y) * self.frozen.sum()


def shard(model: nn.Module, kind: str) -> nn.Module:
    """The model as this kind of island trains it."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    match kind:
        case "ddp":
            return nn.parallel.DistributedDataParallel(model)
        case "fsdp":
            mesh = init_device_mesh("cpu", (size,))
            for layer in (model.inner[0], model.inner[2]):
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        case "hsdp":
            return fully_shard(
                model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
            )
        case "tp":
            mesh = init_device_mesh("cpu", (size,))
            return parallelize_module(model, mesh, {"inner.0": ColwiseParallel(), "inner.2": RowwiseParallel()})
        case "2d":
            mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
            parallelize_module(model, mesh["tp"], {"inner.0": ColwiseParallel(), "inner.2": RowwiseParallel()})
            fully_shard(model, mesh=mesh["dp"])
            return model
        case _:
            return model


def batches(shard: tuple[int, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of one share of the data."""
    data = torch.Generator().manual_seed(1000 + shard[0])
    while True:
        x = torch.randn(12, 8, generator=data)
        yield x, torch.stack([x.sum(1).sin(), x.prod(1).tanh(), x.amax(1)], 1)


def full(values: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {
        n.removeprefix("module."): (v.full_tensor() if isinstance(v, DTensor) else v).double().flatten().tolist()
        for n, v in values.items()
        if v.is_floating_point()
    }


class Trainee:
    """One rank."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        torch.manual_seed(o.seed)
        self.model = shard(Net(o.width, o.norm, getattr(torch, o.dtype)), o.kind)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.rank = int(os.environ.get("RANK", 0))

    def train(self, outer: diloco_client.Outer, steps: int, pace: float = 0.0) -> None:
        same_batch = self.o.kind in ("tp", "plain")
        share = outer.shard if same_batch else outer.rank_shard
        source = batches((share.index, share.count))
        for _ in range(outer.stats.steps):
            next(source)  # after a checkpoint: what it has seen already
        for step in range(steps):
            x, y = next(source)
            dtype = getattr(torch, self.o.dtype)
            self.optimizer.zero_grad()
            loss = (self.model(x.to(dtype)) - y.to(dtype)).float().square().mean()
            loss.backward()
            if self.rank == 0 or not same_batch:
                outer.report(tokens=12, loss=loss)
            self.optimizer.step()
            if pace:
                time.sleep(pace)  # what a larger model would compute
            if outer.should_stop or self.flagged():
                return
            if self.o.die_at == step and self.rank == self.o.die_rank and not Path(f"{self.o.out}.died").exists():
                Path(f"{self.o.out}.died").touch()
                os.kill(os.getpid(), 9)

    def flagged(self) -> bool:
        """The first rank looks whether the file is there, for all."""
        if not self.o.flag:
            return False
        there = torch.tensor(Path(self.o.flag).exists())
        if dist.is_initialized():
            dist.broadcast(there, 0)
        return bool(there)

    def checkpoint(self, outer: diloco_client.Outer) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "outer": outer.state_dict()}

    def load(self, outer: diloco_client.Outer, path: str) -> None:
        state = self.checkpoint(outer)
        dcp.load(state, checkpoint_id=path)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        outer.load_state_dict(state["outer"])

    def run(self) -> dict[str, Any]:
        o = self.o
        options = {"sigterm_seconds": o.sigterm} if o.sigterm and self.rank == 0 else {}  # it counts for all
        if o.load:
            get_state_dict(self.model, self.optimizer)  # makes the optimizer's state, by a step that is none
        with diloco_client.join(o.address, self.model, self.optimizer, worker_id=o.name, **options) as outer:
            if o.load:
                self.load(outer, o.load)
            if o.save:
                self.train(outer, o.save_at)
                dcp.save(self.checkpoint(outer), checkpoint_id=o.save)
                os._exit(0)
            self.train(outer, o.steps - outer.stats.steps, o.pace)
            with outer.global_parameters():
                self.model.eval()(torch.zeros(2, 8, dtype=getattr(torch, o.dtype)))
                self.model.train()
            outer.flush(together=True)
            theta, held = full(outer.global_state_dict()), full(self.model.state_dict())
            return {
                "digests": outer.base_digests(),
                "theta": theta,
                "same": theta == held,
                "stats": {n: getattr(outer.stats, n) for n in outer.stats.__dataclass_fields__},
                "worker_id": outer.worker_id,
                "shard": [outer.rank_shard.index, outer.rank_shard.count],
            }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("address")
    parser.add_argument("out")
    for name, default in (
        ("steps", 24), ("width", 37), ("seed", 0), ("pace", 0.0), ("save_at", 0), ("die_at", -1), ("die_rank", 1),
        ("sigterm", 0.0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(default), default=default)
    for name in ("name", "save", "load", "flag"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--norm", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    diloco_client.transport.Retry = lambda: Retry(first=0.02, cap=0.2)  # type: ignore[misc,assignment]
    if options.kind != "plain":
        dist.init_process_group("gloo")
    trainee = Trainee(options)
    try:
        result: dict[str, Any] = trainee.run()
    except diloco_client.DilocoError as error:
        result = {"error": type(error).__name__, "text": str(error)}
    Path(f"{options.out}.{trainee.rank}.json").write_text(json.dumps(result))
    if "error" in result:
        os._exit(7)
    if options.kind != "plain":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
