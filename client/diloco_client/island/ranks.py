"""An island: the processes (ranks) that train one replica of the model together, and are one worker of the run.

Who they are is read from the model: the mesh of its DTensors (`fully_shard`, `parallelize_module`), or the process
group of `DistributedDataParallel`. Each rank owns one range of every fragment's blocks. Of a sharded model all ranks
own about as much, however its tensors are sharded; of a replicated one the first rank owns all, and alone speaks to the
server.

What the ranks say to one another goes over gloo connections of their own, so it neither waits for the device nor meets
with the training's collectives. Values travel over the training's own backend.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, _get_default_group, _get_default_store
from torch.distributed.fsdp import FullyShardedDataParallel

from diloco_proto import errors
from diloco_proto.errors import DilocoError, IslandBroken, UnclearIsland, UnsupportedModel

from .dtensors import DTensor, is_slice, refuse_unknown, replicates

_HEAD = struct.Struct("<q8sq")
"""Before each message: its length, what it is about, and after which inner step."""

ROOM = 512 - _HEAD.size
"""Bytes of a rank's message that go with its head in one collective; longer ones take a second."""


class Island:
    """The ranks of one worker, in order; the first leads. Collective: every rank makes it, and calls its methods, in
    the same order. `group` is that of these ranks, over which values travel; None if they are all of the world."""

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
        self.step = 0
        """Inner step after which this rank is."""
        self._data: dist.ProcessGroup = group or _get_default_group()
        self._talk = self._connected() if self.size > 1 else None

    def _connected(self) -> dist.ProcessGroupGloo:
        """Connections between these ranks. No group of torch.distributed's books: that would need ranks that are not
        of this island to take part, or all to have made as many groups before; and could not be given up alone.

        They find one another by a name that the first rank draws. So nobody takes the addresses of a former island,
        whose store torchrun may have kept over a restart, for those of this one.
        """
        name = torch.tensor([secrets.randbits(62)], dtype=torch.int64, device=self.device)
        with self._failing():
            dist.broadcast(name, self.ranks[0], group=self._data)
            store = PrefixStore(f"diloco/{int(name):x}", _get_default_store())
            return dist.ProcessGroupGloo(store, self.rank, self.size, self._timeout())

    def _timeout(self) -> timedelta:
        """That of the training's own collectives: a rank may be as long away from a meeting as from one of those."""
        timeout: timedelta = self._data._get_backend(self.device).options._timeout
        return timeout

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

    def exchange(self, message: bytes, about: str = "values") -> list[bytes]:
        """What each rank says now, by rank: one collective of half a KiB a rank, and another if somebody says more.

        `about` is a word of up to 8 letters. Raises IslandBroken when a rank is gone, or speaks about something else or
        after another step: it has gone its own way.
        """
        if self.size == 1:
            return [message]
        every = self._gather(_HEAD.pack(len(message), about.encode(), self.step) + message[:ROOM], _HEAD.size + ROOM)
        heads = [_HEAD.unpack_from(text) for text in every]
        self._check_in_step([(step, word.rstrip(b"\0").decode()) for _, word, step in heads])
        lengths = [length for length, _, _ in heads]
        longest = max(lengths)
        rest = self._gather(message[ROOM:], longest - ROOM) if longest > ROOM else [b""] * self.size
        return [(text[_HEAD.size :] + more)[:n] for text, more, n in zip(every, rest, lengths, strict=True)]

    def _check_in_step(self, places: Sequence[tuple[int, str]]) -> None:
        other = self._odd_one(places)
        if other is not None:
            (step, about), (its_step, its_about) = places[0], places[other]
            raise IslandBroken(
                f"the ranks of this worker are out of step: rank 0 is at {about!r} after inner step {step} and rank "
                f"{other} is at {its_about!r} after inner step {its_step}. All ranks must take every inner step, and "
                "call the collective methods of Outer after the same ones"
            )

    def _gather(self, said: bytes, size: int) -> list[bytes]:
        """Every rank's bytes, filled up to `size`."""
        mine = torch.zeros(size, dtype=torch.uint8)
        mine.numpy()[: len(said)] = np.frombuffer(said, np.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with self.together():
            talk: Any = self._talk
            talk.allgather([every], [mine]).wait()
        return [theirs.numpy().tobytes() for theirs in every]

    def share(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; of what JSON can say. Raises IslandBroken."""
        return [json.loads(text) for text in self.exchange(json.dumps(value).encode())]

    def odd_one(self, value: Any) -> int | None:
        """The first rank that has another value than the first rank, if there is one. Raises IslandBroken."""
        return self._odd_one(self.share(value))

    @staticmethod
    def _odd_one(values: Sequence[Any]) -> int | None:
        return next((rank for rank, value in enumerate(values) if value != values[0]), None)

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
        with self.together():
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
            with self.together():
                dist.all_reduce(total, group=self._data)
        return total / self.size

    def close(self) -> None:
        """Leave: a rank that still waits for this one learns that it is gone, since the connections end with this."""
        self._talk = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks do in the block they do together. Raises IslandBroken when that fails."""
        if self.size > 1 and self._talk is None:
            raise IslandBroken("this worker has left its island")
        with self._failing():
            yield

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """In a collective torch.distributed raises RuntimeError when a rank is gone, and knows no better word."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise IslandBroken(
                f"rank {self.rank} of {self.size} has lost another rank of its worker, or failed itself in what they "
                f"do together ({error}): start all ranks again; torchrun --max-restarts does so by itself"
            ) from error


def find(model: torch.nn.Module, island: dist.ProcessGroup | bool | None) -> Island | None:
    """The island that trains `model`; None for a worker of one process, which needs none unless its model has
    DTensors. torch.distributed is initialised.

    `island` is what the caller says: a process group, False, or None to go by the model. Raises UnclearIsland when
    neither says it, or both do and differ; UnsupportedModel for a model whose parameters are not its own.
    """
    _check_kind(model)
    refuse_unknown(model)
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
        if dist.get_rank(island) < 0:
            raise UnclearIsland(
                f"join(island=group): rank {dist.get_rank()}, which calls this, is not one of that group's ranks"
            )
        return _of_group(island, device, sharded)
    if sharded and replicas is not None:
        raise UnclearIsland(
            "this model is sharded, and its shards are replicated by DistributedDataParallel: pass island=group with "
            "the process group of all of its ranks"
        )
    if sharded:
        mesh = _mesh_of(model, sharded)
        group = mesh.get_group() if mesh.ndim == 1 else None
        return Island(mesh.mesh.flatten().tolist(), device, replicated=False, group=group)
    if replicas is not None:
        return _of_group(replicas.process_group, device, sharded)
    if dist.get_world_size() > 1:
        raise UnclearIsland(
            f"this process is one of a process group of {dist.get_world_size()} ranks, and its model is neither "
            "sharded (fully_shard) nor wrapped in DistributedDataParallel. Pass join(..., island=group), such as "
            "torch.distributed.group.WORLD, if its ranks hold replicas of one model that they keep equal and are one "
            "worker; island=False if each process is a worker of its own"
        )
    return None


def _of_group(group: dist.ProcessGroup, device: torch.device, sharded: Sequence[DTensor]) -> Island | None:
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1 and not sharded:
        return None
    return Island(ranks, device, replicated=not sharded, group=group)


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


def _mesh_of(model: torch.nn.Module, sharded: Sequence[DTensor]) -> DeviceMesh:
    """The mesh that has all ranks of the meshes of all tensors, and all that train this model. Raises UnclearIsland."""
    meshes = {id(p.device_mesh): p.device_mesh for p in sharded}.values()
    every = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
    largest = max(meshes, key=lambda mesh: mesh.size())
    if largest.size() < len(every) or (largest.ndim > 1 and largest.size() < dist.get_world_size()):
        raise UnclearIsland(
            "the parameters of this model are sharded over several meshes, or over one of several dimensions that is "
            "part of the world: pass island=group with the process group of all ranks that train the model"
        )
    if largest.size() < dist.get_world_size() and (is_slice(largest) or replicates(model)):
        raise UnclearIsland(
            "the parameters of this model are sharded over a part of a larger mesh, and nothing says whether the other "
            "ranks hold replicas of them, or are workers of their own. Pass island=group with the process group of all "
            "ranks that train this model together: torch.distributed.group.WORLD in the first case, that of the "
            "part, such as mesh['shard'].get_group(), in the second"
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
