"""The way in for the ranks of an island: they make their links together, under one name."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from diloco_proto.errors import ManifestMismatch

from ..resume import Saved, check_same, new_generation, read
from ..transport import Transport
from .binding import IslandBinding
from .link import IslandLink, unlabelled
from .ranks import Island, find

__all__ = ["find", "island_link"]

ID_VARIABLE = "DILOCO_WORKER_ID"


def island_link(
    island: Island,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    reach: Callable[[], Transport],
    worker_id: str | None,
    state: Mapping[str, Any] | None,
) -> tuple[IslandLink, Saved | None]:
    """This rank's link, and what it takes up of a former process. Raises on every rank what goes wrong on one of them;
    ManifestMismatch if the ranks have different models, StateMismatch if they have not all a state, or none."""
    try:
        return _island_link(island, model, optimizers, reach, worker_id, state)
    except BaseException:
        island.close()
        raise


def _island_link(
    island: Island,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    reach: Callable[[], Transport],
    worker_id: str | None,
    state: Mapping[str, Any] | None,
) -> tuple[IslandLink, Saved | None]:
    binding: IslandBinding | None = None
    transport: Transport | None = None
    saved: Saved | None = None
    failed: Exception | None = None
    try:
        binding = IslandBinding(model, optimizers, island)
        transport = reach()
        saved = None if state is None else read(unlabelled(state, island))
    except Exception as error:
        failed = error
    island.agree(failed)
    assert binding is not None
    assert transport is not None
    _check_same(island, binding, saved)
    name = worker_id or (saved.worker_id if saved else default_id(island))
    name, generation = island.share((name, new_generation(saved)))[0]
    return IslandLink(island, transport, binding, name, generation, saved.run_id if saved else ""), saved


def _check_same(island: Island, binding: IslandBinding, saved: Saved | None) -> None:
    text = "\n".join(tensor.describe() for tensor in binding.manifest.tensors)
    other = island.odd_one(hashlib.sha256(text.encode()).hexdigest())
    if other is not None:
        raise ManifestMismatch(
            f"rank {other} of this island has another model than rank 0: all ranks of a worker train one model"
        )
    check_same(island.odd_one(None if saved is None else saved.place))


def default_id(island: Island) -> str:
    """A name that the island has again after torchrun has started it anew."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run == "none":  # that of torchrun without --rdzv-id: the port tells jobs on one machine apart
        run = os.environ.get("MASTER_PORT", run)
    name = os.environ.get(ID_VARIABLE) or f"{socket.gethostname()}-{run or secrets.token_hex(4)}"
    return name if island.size == dist.get_world_size() else f"{name}-{island.ranks[0]}"
