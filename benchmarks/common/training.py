"""What stands for training: parameters of one size, and a step that moves them as a round of inner steps would."""

from __future__ import annotations

import torch

TENSORS = 16
TILE = 1 << 24
"""Values that noise is made of before it repeats: further apart than any compressor looks back."""


def make_model(parameters: int) -> torch.nn.Module:
    """`parameters` values in TENSORS matrices, the same in all processes."""
    each = parameters // TENSORS
    torch.manual_seed(0)
    tile = torch.randn(min(each, TILE)) * 0.02
    tensors = [torch.nn.Parameter(tile.repeat(-(-each // tile.numel()))[:each].view(-1, 500)) for _ in range(TENSORS)]
    model = torch.nn.Module()
    for i, tensor in enumerate(tensors):
        model.register_parameter(f"layer{i}", tensor)
    return model


class Drift(torch.optim.Optimizer):
    """Adds Gaussian noise of a round's size to the parameters: another in every process."""

    def __init__(self, model: torch.nn.Module, seed: int) -> None:
        super().__init__(model.parameters(), {})
        first = next(model.parameters())
        source = torch.Generator().manual_seed(seed)
        self._tile = torch.randn(min(first.numel(), TILE), generator=source) * 1e-3

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                flat, size = parameter.view(-1), self._tile.numel()
                for at in range(0, flat.numel(), size):
                    piece = flat[at : at + size]
                    piece.add_(self._tile[: piece.numel()])
