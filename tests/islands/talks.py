"""What ranks try that are in one process group, one thing after another; each writes what all of it came to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from proxy import Proxy
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import diloco_client
from diloco_client import transport
from diloco_client.island.ranks import ROOM, Island, find
from diloco_client.transport import Retry
from diloco_proto.errors import DilocoError, StateMismatch

TIMEOUT = timedelta(hours=3)
"""Of the process group."""


def _join(model: nn.Module, address: str = "127.0.0.1:1", **options: object) -> diloco_client.Outer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return diloco_client.join(address, model, optimizer, connect_timeout=20, **options)


def _frozen_on_one(rank: int) -> object:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_(rank == 0)
    return diloco_client.join("127.0.0.1:1", model, optimizer, island=dist.group.WORLD)


class Trained:
    """A small model with buffers, in the run of the tests' server."""

    def __init__(self, address: str, name: str, *, sharded: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9))
        self.plain = self.model[1]
        if sharded:
            fully_shard(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        island = None if sharded else dist.group.WORLD
        self.outer = diloco_client.join(address, self.model, self.optimizer, worker_id=name, island=island)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(torch.arange(18.0).view(2, 9)).square().sum().backward()
            self.optimizer.step()


def _replicas(address: str) -> str:
    """A plain model that the caller calls a replica."""
    trained = Trained(address, "replicas", sharded=False)
    with trained.outer as outer:
        trained.step(7)
        outer.flush()
        assert outer.stats.counted > 0
        return json.dumps([outer.base_digests(), trained.model[0].weight.tolist()])


def _saves_what_cannot_be_pushed(address: str, rank: int) -> object:
    trained = Trained(address, "diverged")
    with trained.outer as outer:
        trained.step()
        if rank == 1:
            with torch.no_grad():
                trained.model[0].weight.to_local()[-1] = float("nan")
        trained.step()  # and pushes
        return outer.state_dict()


def _saves_a_changed_buffer(address: str, rank: int) -> object:
    trained = Trained(address, "changed")
    with trained.outer as outer:
        trained.step()
        if rank == 1:
            trained.plain.running_mean = torch.zeros(3)
        return outer.state_dict()


def _loads_states_of_two_times(address: str, rank: int) -> None:
    trained = Trained(address, "saved")
    states = []
    with trained.outer as outer:
        for _ in range(2):
            trained.step()
            states.append(outer.state_dict())
    with Trained(address, "saved").outer as outer:
        outer.load_state_dict(states[rank])


def _theta(address: str) -> str:
    """θ is a copy, and on the CPU."""
    trained = Trained(address, "theta")
    with trained.outer as outer:
        trained.step()
        before = trained.model[0].weight.to_local().clone()
        held = outer.global_state_dict()["0.weight"]
        assert held.device_mesh == trained.model[0].weight.device_mesh
        assert not held.to_local().equal(before)
        assert trained.model[0].weight.to_local().equal(before)
        return f"on the {held.to_local().device.type}"


def _cut_off(address: str, rank: int) -> str:
    """What rank 1 transfers does not reach the server for a while; the session, which rank 0 has, holds."""
    transport.FAILING_SECONDS = 0.3
    with ExitStack() as stack:
        link = stack.enter_context(Proxy(int(address.rpartition(":")[2]))) if rank == 1 else None
        trained = Trained(link.address if link else address, "cut off")
        outer = stack.enter_context(trained.outer)
        trained.step(4)
        assert not outer._courier._out_of_reach
        if link:
            link.refusing = True
            link.cut()
        while not outer._courier._out_of_reach:
            trained.step()
        trained.step(10)
        if link:
            link.refusing = False
        while outer._courier._out_of_reach:
            trained.step()
        counted = outer.stats.counted
        outer.flush()
        assert outer.stats.counted > counted
        return "trained on, and all was counted"


def _island() -> Island:
    return Island([0, 1], torch.device("cpu"), replicated=False)


def _out_of_step(rank: int) -> str:
    island = _island()
    island.step = 7 + rank
    return str(island.exchange(b"", "step" if rank == 0 else "work"))


def _stranger(rank: int) -> str:
    """A group of rank 0 alone."""
    return str(find(nn.Linear(3, 3), dist.new_group([0])))


def _old_torch() -> object:
    with patch("diloco_client.island.dtensors.DTensor", ()):
        return find(fully_shard(nn.Linear(3, 3)), None)


def _long_words(rank: int) -> str:
    """Those that fit, those that just fit, and those that take a second collective."""
    island, sizes = _island(), (0, 1, ROOM, ROOM + 1, 5000)
    assert island._talk.options._timeout == TIMEOUT
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
    island.exchange(b"anybody?")
    return "heard"


def _agrees(rank: int) -> str:
    _island().agree(StateMismatch("only rank 1 finds fault") if rank == 1 else None)
    return "no fault"


def attempts(rank: int, port: int, address: str, out: Path) -> None:
    """Of two ranks."""
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
        "out of step": lambda: _out_of_step(rank),
        "stranger": lambda: _stranger(rank),
        "old torch": _old_torch,
        "diverged": lambda: _saves_what_cannot_be_pushed(address, rank),
        "changed buffer": lambda: _saves_a_changed_buffer(address, rank),
        "two states": lambda: _loads_states_of_two_times(address, rank),
        "theta": lambda: _theta(address),
        "cut off": lambda: _cut_off(address, rank),
    }
    transport.Retry = lambda: Retry(first=0.02, cap=0.2)  # type: ignore[misc,assignment]
    _try(tries, rank, 2, port, out)


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "two"))


def _two_islands(rank: int) -> str:
    """In ranks that are in different numbers of groups; one after another, in one process."""
    dist.new_group([0, 2])
    group = _mesh().get_group("two")
    for _ in range(2):
        island = find(nn.Linear(3, 3), group)
        assert island is not None
        heard = island.exchange(bytes([rank]))
        island.close()
    return str([word[0] for word in heard])


def _gone_from_a_part(rank: int) -> str:
    island = find(nn.Linear(3, 3), _mesh().get_group("two"))
    assert island is not None
    if rank % 2:
        island.close()
    island.exchange(b"anybody?")
    return "heard"


def _tensor_parallel() -> nn.Module:
    return parallelize_module(nn.Linear(8, 8), _mesh()["two"], ColwiseParallel())


def parts(rank: int, port: int, out: Path) -> None:
    """Of four ranks, in islands of two."""
    tries: dict[str, Callable[[], object]] = {
        "two islands": lambda: _two_islands(rank),
        "gone": lambda: _gone_from_a_part(rank),
        "sliced": lambda: find(fully_shard(nn.Linear(8, 8), mesh=_mesh()["two"]), None),
        "by hand": lambda: find(_tensor_parallel(), None),
        "replicate": lambda: find(replicate(_tensor_parallel(), device_mesh=_mesh()["one"]), None),
        "all": lambda: len(find(_tensor_parallel(), dist.group.WORLD).exchange(b"")),  # type: ignore[union-attr]
    }
    _try(tries, rank, 4, port, out)


def _try(tries: dict[str, Callable[[], object]], rank: int, size: int, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    came_to = {}
    for name, attempt in tries.items():
        try:
            came_to[name] = str(attempt())
        except (DilocoError, ValueError) as error:
            came_to[name] = f"{type(error).__name__}: {error}"
    out.with_name(f"{out.name}.{rank}.json").write_text(json.dumps(came_to))
    dist.destroy_process_group()
