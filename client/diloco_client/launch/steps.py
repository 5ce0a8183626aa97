"""Which steps of a script's optimizers make an inner step."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, overload
from weakref import WeakKeyDictionary, WeakSet

import torch

from diloco_client.optimizers import inner_optimizer

log = logging.getLogger("diloco")

PATIENCE = 16
"""Steps of the others after which an optimizer that takes none is no longer waited for. A critic that is trained
several times for each step of its generator takes fewer."""


class Clock(torch.optim.Optimizer):
    """Steps when an inner step is over. It trains nothing: `join` takes it as the last of the script's optimizers, and
    counts its steps."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(0)], {})  # torch refuses an optimizer without a tensor
        self.param_groups.clear()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return None


class InnerSteps:
    """An inner step is over when every optimizer of the script has stepped since the last one was, in whatever order
    and however often. One that has not stepped while the others took PATIENCE steps is left out until it does."""

    def __init__(self) -> None:
        self._waited: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()
        self._stepped: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._ranks: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()

    @property
    def order(self) -> list[torch.optim.Optimizer]:
        """Those that have stepped so far, in the order of their first step."""
        return sorted(self._ranks, key=lambda optimizer: self._ranks[optimizer])

    def watch(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """These are waited for."""
        for optimizer in optimizers:
            self._waited.setdefault(optimizer, 0)

    @property
    def waited_for(self) -> list[torch.optim.Optimizer]:
        return list(self._waited)

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        return optimizer in self._waited

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        self._waited.pop(optimizer, None)
        self._stepped.discard(optimizer)

    def over(self, stepped: torch.optim.Optimizer) -> bool:
        """Whether the inner step is over with this step."""
        self._ranks.setdefault(stepped, len(self._ranks))
        for optimizer in self._waited:
            self._waited[optimizer] += 1
            if self._waited[optimizer] == PATIENCE and optimizer is not stepped:
                log.warning(
                    "the %s has taken no step while other optimizers took %d: inner steps are counted without it until "
                    "it does",
                    type(optimizer).__name__,
                    PATIENCE,
                )
        self._waited[stepped] = 0
        self._stepped.add(stepped)
        if any(waited < PATIENCE and optimizer not in self._stepped for optimizer, waited in self._waited.items()):
            return False
        self._stepped.clear()
        return True


def living_optimizers() -> list[torch.optim.Optimizer]:
    """All torch optimizers of this process that train a tensor, and do not merely wrap another."""
    return [
        o
        for o in living(torch.optim.Optimizer)
        if inner_optimizer(o) is o and "param_groups" in vars(o) and trained_by(o)
    ]


def trained_by(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors that it steps."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def living(kind: type[Any]) -> list[Any]:
    """All objects of this kind or a subclass that Python's collector knows, in a fixed order; with those that it has
    not collected yet."""
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()  # what a script has put out of the collector's sight would not be listed
    try:
        objects = gc.get_objects()
        kinds = {found for found in set(map(type, objects)) if issubclass(found, kind)}
        return [o for o in objects if type(o) in kinds]
    finally:
        if frozen:
            gc.freeze()


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that was just taken has changed nothing, for a gradient had overflowed. GradScaler leaves that
    to an optimizer that can tell by itself (a fused one); it does not call the others."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.item())


def within_its_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is a base class's step, called by the step of the same optimizer: torch hooks both."""
    frame, depth = sys._getframe(1), 0
    while frame.f_back is not None:
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename.endswith("optimizer.py"):
            depth += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return depth > 1
