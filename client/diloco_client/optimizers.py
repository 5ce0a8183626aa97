"""Finds the optimizers that really step; refuses those that would undo a merge, or that train what this worker does not
synchronise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from diloco_proto.errors import MasterWeights, UnsupportedModel

_MASTER_ATTRIBUTES = (
    "fp32_from_fp16_groups",
    "fp32_groups",
    "shard_fp32_from_float16_groups",
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "_master_params",
    "master_params",
    "master_param_groups",
)

_WRAPPERS = {
    "accelerate.optimizer.AcceleratedOptimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer",
}
"""These pass as torch optimizers and have the one that steps as `optimizer`. They take no hooks, and call it only when
an inner step is complete: after the last batch that it accumulates, and if no gradient has overflowed."""


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer within what accelerate or Lightning make of it; any other as it is."""
    while any(f"{c.__module__}.{c.__qualname__}" in _WRAPPERS for c in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def check_not_captured() -> None:
    """Raises UnsupportedModel while a CUDA graph is captured: the steps of its replays are not seen."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if begun and torch.cuda.is_current_stream_capturing():
        raise UnsupportedModel(
            "the optimizer's step is captured in a CUDA graph, whose replays cannot be counted and within which no "
            "parameters can be merged. Capture the forward and backward passes alone"
        )


def check_optimizers(
    model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], frozen: Mapping[int, str]
) -> None:
    """Raises MasterWeights if an optimizer keeps its own copy of the parameters, UnsupportedModel if it steps a
    parameter that is not the model's, or one of `frozen` (id -> name)."""
    ours = {id(t): t for t in model.parameters()}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        _check_masters(optimizer, kind)
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if id(parameter) not in ours:
                raise _foreign_parameter(kind, parameter, ours.values())
            if parameter.requires_grad and id(parameter) in frozen:
                raise UnsupportedModel(
                    f"{frozen[id(parameter)]!r} was frozen when this worker joined and is trained now: it "
                    "would differ between workers. Unfreeze it, and give it to the optimizer, before join"
                )


def _check_masters(optimizer: torch.optim.Optimizer, kind: str) -> None:
    for attribute in _MASTER_ATTRIBUTES:
        if getattr(optimizer, attribute, None):
            raise _master_weights(kind, f"it has `{attribute}`")
    if getattr(optimizer, "master_weights", False) is True:
        raise _master_weights(kind, "it was made with master_weights=True")
    for state in optimizer.state.values():
        masters = [k for k, v in state.items() if "master" in str(k) and isinstance(v, torch.Tensor)]
        if masters:
            raise _master_weights(kind, f"its state holds {masters[0]!r}")


def _foreign_parameter(kind: str, parameter: torch.Tensor, ours: Iterable[torch.Tensor]) -> UnsupportedModel:
    """The error for a parameter that the optimizer steps and the model does not have."""
    shape = list(parameter.shape)
    if any(p.shape == parameter.shape for p in ours):
        return _master_weights(kind, f"it steps a {shape} tensor that is not one of the model's parameters")
    return UnsupportedModel(
        f"the optimizer {kind} steps a {shape} tensor that is no parameter of the model given to join: pass one "
        "module that holds all that the optimizer trains"
    )


def _master_weights(kind: str, why: str) -> MasterWeights:
    return MasterWeights(
        f"the optimizer {kind} keeps its own copy of the parameters ({why}) and would undo every merge of global "
        "parameters. Use one that steps the model's parameters in place, such as torch.optim.AdamW, with autocast"
    )
