"""Finds the module that a script trains, of which only optimizers are known.

Its names should be those that the script's author would expect, and the same in every worker that runs the script: the
outermost module that holds the trained tensors, without what torch wraps around it (DistributedDataParallel,
DataParallel, torch.compile). Where there are several such modules, as in a GAN, they become parts `0`, `1`, … in the
order in which the optimizers hold them; a tensor that no module holds is named by its place in its optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from .steps import living, trained_by

log = logging.getLogger("diloco")

_WRAPPED = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}
"""Modules around a model -> the name under which they have it."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a script trains."""

    module: nn.Module
    """For `join`: in DistributedDataParallel if the script has it so, which tells who the ranks are."""
    root: nn.Module
    """The same without, as the script's author would name its tensors."""
    optimizers: tuple[torch.optim.Optimizer, ...]
    left_out: tuple[torch.optim.Optimizer, ...]
    """Their tensors belong to no module while others' do: an image that is optimized, say, or a multiplier."""


@dataclass(frozen=True, slots=True)
class Held:
    """What of a Trained is kept while the script trains: its optimizers are the script's to give up."""

    module: nn.Module
    root: nn.Module
    tensors: frozenset[int]
    """The ids of those that are trained; the module holds them."""
    kinds: str
    """Of the optimizers, to name them."""

    @classmethod
    def of(cls, trained: Trained) -> Self:
        tensors = frozenset(id(t) for optimizer in trained.optimizers for t in trained_by(optimizer))
        return cls(trained.module, trained.root, tensors, ", ".join(type(o).__name__ for o in trained.optimizers))


class Parts(nn.Module):
    """Several modules, and tensors of none, under one roof."""

    def __init__(self, modules: Iterable[nn.Module], tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for number, module in enumerate(modules):
            self.add_module(str(number), module)
        # As they are: a new Parameter, or a name without dots, would be another tensor than the optimizer's.
        self._parameters.update(tensors)  # type: ignore[arg-type]


def find_trained(optimizers: Sequence[torch.optim.Optimizer]) -> Trained:
    """The module that these optimizers train: those that have stepped come first, in the order of their steps."""
    places = {
        id(tensor): f"optimizer{o}.group{g}.{i}"
        for o, optimizer in reversed(list(enumerate(optimizers)))
        for g, group in enumerate(optimizer.param_groups)
        for i, tensor in enumerate(group["params"])
        if tensor.requires_grad
    }
    order = {id(tensor): None for optimizer in optimizers for tensor in trained_by(optimizer)}
    roots = _roots(list(order))
    held = {key for root in roots for key in _tensors(root)}
    left_out = [o for o in optimizers if held and not any(_belongs(t, held) for t in trained_by(o))]
    used = tuple(o for o in optimizers if o not in left_out)
    loose = {places[id(t)]: t for o in used for t in trained_by(o) if id(t) not in held}
    _tell(roots, used, left_out, loose)
    if len(roots) == 1 and not loose:
        return Trained(_replicated(roots[0]), roots[0], used, tuple(left_out))
    parts = Parts(map(_replicated, roots), loose)
    return Trained(parts, parts, used, tuple(left_out))


def modules_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """The kinds of the modules that hold the tensors that it steps; nothing if none does."""
    return [type(root).__name__ for root in _roots([id(tensor) for tensor in trained_by(optimizer)])]


def _belongs(tensor: torch.Tensor, held: set[int]) -> bool:
    return id(tensor) in held or isinstance(tensor, nn.Parameter)


def _roots(wanted: Sequence[int]) -> list[nn.Module]:
    """The outermost modules that hold the tensors with these ids, in their order."""
    tops = {id(m): m for m in map(_unwrapped, _outermost(set(wanted)))}
    covers = {key: frozenset(wanted) & _tensors(top) for key, top in tops.items()}
    alike: dict[frozenset[int], list[nn.Module]] = {}
    for key, cover in covers.items():
        if not any(cover < other for other in covers.values()):
            alike.setdefault(cover, []).append(tops[key])
    rank = {key: number for number, key in enumerate(wanted)}
    ordered = sorted(alike.items(), key=lambda item: min(rank[key] for key in item[0]))
    return [_one_of(those, cover) for cover, those in ordered]


def _outermost(wanted: set[int]) -> list[nn.Module]:
    """All modules that hold one of these tensors and are in no other module."""
    modules = [m for m in living(nn.Module) if "_modules" in vars(m) and "_parameters" in vars(m)]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            parents.setdefault(id(child), []).append(module)
    found = []
    pending = [m for m in modules if any(id(p) in wanted for p in m._parameters.values())]
    seen = set(map(id, pending))
    for module in pending:  # it grows on the way
        above = parents.get(id(module), [])
        if not above:
            found.append(module)
        pending += [m for m in above if id(m) not in seen]
        seen.update(map(id, above))
    # The graphs of torch.compile and torch.fx hold the parameters of the model that they were made of.
    return [m for m in found if not isinstance(m, torch.fx.GraphModule)] or found


def _unwrapped(module: nn.Module) -> nn.Module:
    while (name := _WRAPPED.get(f"{type(module).__module__}.{type(module).__qualname__}")) is not None:
        module = getattr(module, name)
    return module


def _replicated(root: nn.Module) -> nn.Module:
    """The DistributedDataParallel around this module, or itself if there is none."""
    around = living(nn.parallel.DistributedDataParallel)
    return next((ddp for ddp in around if _unwrapped(ddp) is root), root)


def _one_of(tops: list[nn.Module], cover: frozenset[int]) -> nn.Module:
    """Of modules that hold the same trained tensors: the largest that all of them share, such as the model in a loss
    and in a metric; else the first by name and size."""
    if len(tops) == 1:
        return tops[0]
    shared = [m for m in tops[0].modules() if all(any(m is n for n in top.modules()) for top in tops[1:])]
    for module in shared:  # from the outside in
        if cover <= _tensors(module):
            return _unwrapped(module)
    return min(tops, key=lambda top: (type(top).__qualname__, len(_tensors(top))))


def _tensors(module: nn.Module) -> frozenset[int]:
    return frozenset(map(id, module.parameters()))


def _tell(
    roots: list[nn.Module],
    used: Sequence[torch.optim.Optimizer],
    left_out: Sequence[torch.optim.Optimizer],
    loose: dict[str, torch.Tensor],
) -> None:
    tensors = {id(t): t for o in used for t in trained_by(o)}
    log.info(
        "found %d tensors with %.2f M values, which %s trains: %s",
        len(tensors),
        sum(t.numel() for t in tensors.values()) / 1e6,
        ", ".join(type(o).__name__ for o in used),
        ", ".join([type(root).__name__ for root in roots] + ([f"{len(loose)} of no module"] if loose else [])),
    )
    if len(roots) > 1 or loose:
        log.warning(
            "no single module holds all that is trained, so tensors are named by their place: only workers that run "
            "this script can share the run. diloco_client.join gives them names of your choice (docs/launcher.md)"
        )
    for optimizer in left_out:
        log.warning(
            "what a %s trains belongs to no module, and stays this worker's own: %s",
            type(optimizer).__name__,
            ", ".join(str(list(t.shape)) for t in trained_by(optimizer)[:4]),
        )
