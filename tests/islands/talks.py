"""What two ranks that are no trainers try: `attempts` returns, for rank 0 and 1, what each attempt came to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import diloco_client
from diloco_client.island import Island
from diloco_proto.errors import DilocoError, StateMismatch


def _join(model: nn.Module, address: str = "127.0.0.1:1", **options: object) -> diloco_client.Outer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return diloco_client.join(address, model, optimizer, connect_timeout=20, **options)


def _frozen_on_one(rank: int) -> object:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_(rank == 0)
    return diloco_client.join("127.0.0.1:1", model, optimizer, island=dist.group.WORLD)


def _replicas(address: str) -> str:
    """A plain model that the caller calls a replica."""
    torch.manual_seed(0)
    model = nn.Linear(9, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with diloco_client.join(address, model, optimizer, island=dist.group.WORLD, worker_id="replicas") as outer:
        for _ in range(7):
            model(torch.ones(2, 9)).sum().backward()
            optimizer.step()
        outer.flush()
        assert outer.stats.counted > 0
        return json.dumps([outer.base_digests(), model.weight.tolist()])


def _island(**options: object) -> Island:
    return Island([0, 1], torch.device("cpu"), replicated=False, **options)


def _long_words(rank: int) -> str:
    """Those that fit, those that just fit, and those that take a second collective."""
    island, sizes = _island(), (0, 1, 504, 505, 5000)
    for size in sizes:
        for other in sizes:
            said = bytes([rank]) * (size if rank == 0 else other)
            assert island.exchange(said) == [bytes(size), bytes([1]) * other]
    island.close()
    return "told"


def _gone(rank: int) -> str:
    island = _island()
    island.exchange(b"here")
    if rank == 1:
        island.close()
        return "left"
    island.exchange(b"anybody?")
    return "heard"


def _agrees(rank: int) -> str:
    _island().agree(StateMismatch("only rank 1 finds fault") if rank == 1 else None)
    return "no fault"


def attempts(rank: int, port: int, address: str, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ddp = nn.parallel.DistributedDataParallel
    tries: dict[str, Callable[[], object]] = {
        "plain": lambda: _join(nn.Linear(3, 3)),
        "true": lambda: _join(nn.Linear(3, 3), island=True),
        "alone but wrapped": lambda: _join(ddp(nn.Linear(3, 3)), island=False),
        "alone but sharded": lambda: _join(fully_shard(nn.Linear(3, 3)), island=False),
        "two models": lambda: _join(nn.Linear(3, 3 + rank), island=dist.group.WORLD),
        "fsdp1": lambda: _join(FullyShardedDataParallel(nn.Linear(3, 3), device_id=torch.device("cpu"))),
        "frozen on one": lambda: _frozen_on_one(rank),
        "replicas": lambda: _replicas(address),
        "words": lambda: _long_words(rank),
        "agreed": lambda: _agrees(rank),
        "gone": lambda: _gone(rank),
    }
    came_to = {}
    for name, attempt in tries.items():
        try:
            came_to[name] = str(attempt())
        except (DilocoError, ValueError) as error:
            came_to[name] = f"{type(error).__name__}: {error}"
    out.with_name(f"{out.name}.{rank}.json").write_text(json.dumps(came_to))
    dist.destroy_process_group()
