"""Two training loops of the same model in one process, one with the hook: they take turns."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import nn

from .ranges import Ranges

CONTEXT = 64
VOCABULARY = 4096


class Transformer(nn.Module):
    """A decoder of so many layers; with the default width and 7 of them, 25 M parameters."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(torch.zeros(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(tokens) + self.place, mask=self.mask, is_causal=True))


class Loop:
    """One model, its optimizer, and the same batches as its twin's."""

    def __init__(self, layers: int, width: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = Transformer(layers, width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._source = torch.Generator().manual_seed(0)
        self._batch = batch

    def step(self) -> float:
        """The seconds that it took."""
        tokens = torch.randint(VOCABULARY, (self._batch, CONTEXT + 1), generator=self._source)
        began = time.perf_counter()
        logits = self.model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


@dataclass
class Steps:
    """Seconds of each step, in order. The hooked ones without those in which they waited for the network."""

    bare: list[float] = field(default_factory=list)
    hooked: list[float] = field(default_factory=list)
    within: list[float] = field(default_factory=list)
    """Of each hooked step, in the hook."""
    waited: list[float] = field(default_factory=list)
    blocks: list[tuple[float, float]] = field(default_factory=list)
    """Mean bare and hooked step of each turn."""


class Clocks:
    """When the last step went into diloco's hook and came out of it: make one before joining, `close` it after."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.begin = self.end = 0.0
        optimizer.register_step_post_hook(self._begin)
        self._optimizer = optimizer

    def close(self) -> None:
        self._optimizer.register_step_post_hook(self._end)

    @property
    def within(self) -> float:
        """Seconds between the two."""
        return self.end - self.begin

    def _begin(self, *_: object) -> None:
        self.begin = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.end = time.perf_counter()


def take_turns(hooked: Loop, bare: Loop, clocks: Clocks, ranges: Ranges, block: int, turns: int) -> Steps:
    """`block` steps each: from one merge to the next, so that nothing of the hooked loop goes on beside the bare
    one's steps."""
    steps = Steps()
    for _ in range(turns):
        for _ in range(block):
            before = ranges.on_trainer["wait"]
            taken = hooked.step()
            waited = ranges.on_trainer["wait"] - before
            steps.hooked.append(taken - waited)
            steps.within.append(clocks.within - waited)
            steps.waited.append(waited)
        steps.bare += [bare.step() for _ in range(block)]
        steps.blocks.append((statistics.mean(steps.bare[-block:]), statistics.mean(steps.hooked[-block:])))
    return steps
