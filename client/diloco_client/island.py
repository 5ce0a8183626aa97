"""An island: the processes (ranks) that train one replica of the model together, and are one worker of the run.

Who they are is read from the model: the mesh of its DTensors (`fully_shard`, `parallelize_module`), or the process
group of `DistributedDataParallel`. Each rank owns one range of every fragment's blocks. Of a sharded model all ranks
own about as much, however its tensors are sharded; of a replicated one the first rank owns all, and alone speaks to the
server.

What the ranks say to one another goes through a gloo group of their own, so it neither waits for the device nor meets
with the training's collectives. Values travel over the training's own backend.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from diloco_proto import errors
from diloco_proto.errors import DilocoError, IslandBroken, UnclearIsland, UnsupportedModel

ROOM = 504
"""Bytes of a rank's message that go with its length in one collective; longer ones take a second."""

_HEAD = 8
"""Bytes of a message's length."""


class Island:
    """The ranks of one worker, in order; the first leads. Collective: every rank makes it, and calls its methods, in
    the same order."""

    def __init__(
        self, ranks: Sequence[int], device: torch.device, *, replicated: bool, group: dist.ProcessGroup | None = None
    ) -> None:
        self.ranks = tuple(sorted(ranks))
        """In the world."""
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.device = device
        """Over which values travel between the ranks."""
        self.replicated = replicated
        self._data = group
        self._talk: dist.ProcessGroup | None = None
        self._whole_world = self.size == dist.get_world_size()
        if self.size > 1:
            local = not self._whole_world  # the others do not take part in making it
            self._talk = dist.new_group(list(self.ranks), backend="gloo", use_local_synchronization=local)

    @property
    def leads(self) -> bool:
        """This rank has the session."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """This rank speaks to the server at all."""
        return self.leads or not self.replicated

    def bounds(self, blocks: int) -> list[int]:
        """Where the ranks' ranges of so many blocks begin and end: rank r owns [bounds[r], bounds[r + 1])."""
        if self.replicated:
            return [0] + [blocks] * self.size
        return [blocks * r // self.size for r in range(self.size + 1)]

    def owners(self, blocks: int) -> frozenset[int]:
        """The ranks whose range is not empty."""
        bounds = self.bounds(blocks)
        return frozenset(r for r in range(self.size) if bounds[r] < bounds[r + 1])

    # -- words --

    def exchange(self, message: bytes) -> list[bytes]:
        """What each rank says now, by rank: one collective of half a KiB a rank, and another if somebody says more.

        Raises IslandBroken when a rank is gone.
        """
        if self._talk is None:
            return [message]
        every = self._gather(len(message).to_bytes(_HEAD, "little") + message[:ROOM], _HEAD + ROOM)
        lengths = [int.from_bytes(text[:_HEAD], "little") for text in every]
        longest = max(lengths)
        rest = self._gather(message[ROOM:], longest - ROOM) if longest > ROOM else [b""] * self.size
        return [(text[_HEAD:] + more)[:n] for text, more, n in zip(every, rest, lengths, strict=True)]

    def _gather(self, said: bytes, size: int) -> list[bytes]:
        """Every rank's bytes, filled up to `size`."""
        mine = torch.zeros(size, dtype=torch.uint8)
        mine.numpy()[: len(said)] = np.frombuffer(said, np.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with _Whole(self):
            dist.all_gather(every, mine, group=self._talk)
        return [theirs.numpy().tobytes() for theirs in every]

    def share(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; of what JSON can say. Raises IslandBroken."""
        return [json.loads(text) for text in self.exchange(json.dumps(value).encode())]

    def agree(self, error: BaseException | None) -> None:
        """Raises on every rank what one of them brings: the first's, if there are several. Raises IslandBroken."""
        for rank, told in enumerate(self.share(None if error is None else tell(error))):
            if told is None:
                continue
            if rank == self.rank and error is not None:
                raise error
            raise heard(told)

    # -- values --

    def broadcast(self, pieces: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Fill tensors on the island's device from the rank named with each, which has the values already."""
        if self.size == 1:
            return
        with _Whole(self):
            works = [
                dist.broadcast(tensor, self.ranks[rank], group=self._data, async_op=True) for tensor, rank in pieces
            ]
            for work in works:
                if work is not None:
                    work.wait()

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of the ranks' tensors, in float64, so that of equal ones it is the same; on the island's device."""
        total = tensor.to(self.device, torch.float64, copy=True)
        if self.size > 1:
            with _Whole(self):
                dist.all_reduce(total, group=self._data)
        return total / self.size

    def close(self) -> None:
        """Leave: a rank that still waits for this one learns that it is gone."""
        talk, self._talk = self._talk, None
        # A group of part of the world is named after its ranks alone: another of that name, made when this one is gone,
        # would look for the former one's addresses. So this one stays until the process ends.
        if talk is not None and self._whole_world and dist.is_initialized():
            dist.destroy_process_group(talk)


class _Whole:
    """Within the block a failure of torch.distributed means that a rank is gone."""

    def __init__(self, island: Island) -> None:
        self._island = island

    def __enter__(self) -> None:
        if self._island.size > 1 and self._island._talk is None:
            raise IslandBroken("this worker has left its island")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            island = self._island
            raise IslandBroken(
                f"rank {island.rank} of {island.size} has lost another rank of its worker ({error}): start all ranks "
                "again; torchrun --max-restarts does so by itself"
            ) from error


def find(model: torch.nn.Module, island: dist.ProcessGroup | bool | None) -> Island | None:
    """The island that trains `model`; None for a worker of one process. torch.distributed is initialised.

    `island` is what the caller says: a process group, False, or None to go by the model. Raises UnclearIsland when
    neither says it, or both do and differ; UnsupportedModel for a model whose parameters are not its own.
    """
    _check_kind(model)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    replicas = next((m for m in model.modules() if isinstance(m, torch.nn.parallel.DistributedDataParallel)), None)
    if island is True:
        raise UnclearIsland("join(island=True): pass the process group whose ranks are one worker")
    if island is False:
        if sharded or replicas is not None:
            raise UnclearIsland(
                "join(island=False), but this model is trained by several processes together (DTensor or "
                "DistributedDataParallel): they are one worker, leave island out"
            )
        return None
    device = _device_of(model, sharded)
    if island is not None:
        return Island(dist.get_process_group_ranks(island), device, replicated=not sharded, group=island)
    if sharded and replicas is not None:
        raise UnclearIsland(
            "this model is sharded, and its shards are replicated by DistributedDataParallel: pass island=group with "
            "the process group of all of its ranks"
        )
    if sharded:
        mesh = _mesh_of(sharded)
        group = mesh.get_group() if mesh.ndim == 1 else None
        return Island(mesh.mesh.flatten().tolist(), device, replicated=False, group=group)
    if replicas is not None:
        group = replicas.process_group
        return Island(dist.get_process_group_ranks(group), device, replicated=True, group=group)
    if dist.get_world_size() > 1:
        raise UnclearIsland(
            f"this process is one of a process group of {dist.get_world_size()} ranks, and its model is neither "
            "sharded (fully_shard) nor wrapped in DistributedDataParallel. Pass join(..., island=group), such as "
            "torch.distributed.group.WORLD, if its ranks hold replicas of one model that they keep equal and are one "
            "worker; island=False if each process is a worker of its own"
        )
    return None


def _check_kind(model: torch.nn.Module) -> None:
    """Raises UnsupportedModel where the parameters are flattened or partitioned in a way of their own."""
    flat = any(isinstance(m, FullyShardedDataParallel) for m in model.modules())
    deepspeed = any(c.__module__.partition(".")[0] == "deepspeed" for c in type(model).__mro__)
    if flat or deepspeed or any(hasattr(p, "ds_id") for p in model.parameters()):
        kind = "FullyShardedDataParallel (FSDP1)" if flat else "DeepSpeed"
        raise UnsupportedModel(
            f"{kind} keeps the parameters in a form of its own, which cannot be synchronised: shard the model with "
            "torch.distributed.fsdp.fully_shard, whose parameters are DTensors"
        )


def _mesh_of(sharded: Sequence[DTensor]) -> DeviceMesh:
    """The mesh that has all ranks of the meshes of all tensors."""
    meshes = {id(p.device_mesh): p.device_mesh for p in sharded}.values()
    every = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
    largest = max(meshes, key=lambda mesh: mesh.size())
    if largest.size() < len(every) or (largest.ndim > 1 and largest.size() < dist.get_world_size()):
        raise UnclearIsland(
            "the parameters of this model are sharded over several meshes, or over one of several dimensions that is "
            "part of the world: pass island=group with the process group of all ranks that train the model"
        )
    return largest


def _device_of(model: torch.nn.Module, sharded: Sequence[DTensor]) -> torch.device:
    """Over which the ranks exchange values. Parameters may be offloaded to the CPU while their mesh is one of GPUs."""
    if sharded:
        kind = sharded[0].device_mesh.device_type
        return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    first = next(model.parameters(), None)
    if first is None:
        raise UnsupportedModel("the model has no parameters")
    return first.device


def tell(error: BaseException) -> list[str]:
    """An error as it is told to the other ranks."""
    if isinstance(error, DilocoError):
        return [type(error).__name__, str(error)]
    return [DilocoError.__name__, f"another rank of this worker has failed: {error!r}"]


def heard(told: Sequence[str]) -> DilocoError:
    """The error that another rank has told of."""
    name, text = told
    kind = getattr(errors, name, None)
    error: DilocoError = (kind if isinstance(kind, type) and issubclass(kind, DilocoError) else DilocoError)(text)
    return error
