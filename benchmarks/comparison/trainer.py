"""What every run of the comparison trains: a byte-level GPT of 0.47 M parameters on the standard library's source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diloco_client.binding import Binding
from diloco_client.captured import Captured
from diloco_client.demo import corpus
from diloco_client.demo.model import ByteGPT, ModelConfig
from diloco_proto.codec import Encoded
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Layout

MODEL = ModelConfig(layers=4, width=96, heads=3, context=64)
BATCH = 8
TOKENS_A_STEP = BATCH * MODEL.context
LEARNING_RATE = 3e-3
WARMUP = 0.04
"""Share of the run."""
FINAL_LEARNING_RATE = 0.1
"""Share of the peak that is left at the end."""
VALIDATION_WINDOWS = 2048

Batches = Iterator[tuple[Tensor, Tensor]]


def learning_rate(progress: float) -> float:
    """At `progress` in [0, 1] of the run's tokens: linear warm-up, then a cosine."""
    if progress < WARMUP:
        return LEARNING_RATE * progress / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))
    return LEARNING_RATE * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def build(seed: int) -> tuple[ByteGPT, torch.optim.AdamW]:
    """Model and inner optimizer: equal weights for equal seeds."""
    torch.manual_seed(seed)
    model = ByteGPT(MODEL)
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)


def train_step(model: ByteGPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], rate: float) -> None:
    """One step of the inner optimizer, gradients clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    model(*batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class Texts:
    """The corpus, read once: what is trained on and what is not."""

    def __init__(self) -> None:
        root = corpus.standard_library()
        divided = corpus.divide(root, 1)
        (files,) = divided.shards
        self._files = files
        self._root = root
        self._all = corpus.read_bytes(files)
        validation = corpus.read_bytes(divided.validation)
        self.validation = corpus.spread(validation, size=VALIDATION_WINDOWS, context=MODEL.context)

    def shard(self, index: int, count: int, *, by_package: bool, seed: int) -> Batches:
        """Random windows of a worker's share: of everything, or of whole packages of its own."""
        data = corpus.read_bytes(self._packages(count)[index]) if by_package else self._all
        return corpus.batches(data, size=BATCH, context=MODEL.context, seed=1000 * seed + index)

    def _packages(self, count: int) -> list[list[Path]]:
        """Files dealt out by package, the largest first, always to the smallest share; single modules are packages."""
        packages: dict[str, list[Path]] = {}
        for path in self._files:
            packages.setdefault(path.relative_to(self._root).parts[0], []).append(path)
        sizes = {name: sum(p.stat().st_size for p in files) for name, files in packages.items()}
        shares: list[list[Path]] = [[] for _ in range(count)]
        filled = [0] * count
        for name in sorted(packages, key=lambda name: (-sizes[name], name)):
            smallest = filled.index(min(filled))
            shares[smallest] += packages[name]
            filled[smallest] += sizes[name]
        return shares

    @torch.no_grad()
    def loss(self, state: Mapping[str, Tensor]) -> float:
        """Validation loss in nats a byte."""
        model = ByteGPT(MODEL)
        model.load_state_dict(dict(state))
        total = 0.0
        for x, y in zip(*(torch.split(t, 64) for t in self.validation), strict=True):
            total += model(x, y).item() * len(x)
        return total / VALIDATION_WINDOWS


class Trainer:
    """One worker's model, as the simulator wants it. `progress` tells how far the whole run is, in [0, 1]."""

    def __init__(self, seed: int, batches: Batches, progress: Callable[[], float]) -> None:
        self.model, self.optimizer = build(seed)
        self.binding = Binding(self.model, [self.optimizer])
        self.manifest = self.binding.manifest
        self._batches = batches
        self._progress = progress

    def step(self) -> int:
        train_step(self.model, self.optimizer, next(self._batches), learning_rate(self._progress()))
        return TOKENS_A_STEP

    def attach(self, layout: Layout) -> None:
        self.binding.attach(layout)

    def seed_values(self, fragment: int) -> Floats:
        return self.binding.seed_values(fragment)

    def capture(self, fragment: int) -> Captured:
        return self.binding.capture(fragment)

    def rounded(self, fragment: int, theta: Floats) -> Floats:
        return self.binding.rounded(fragment, theta)

    def mix(self, fragment: int, theta: Floats, alpha: float) -> None:
        self.binding.mix(fragment, theta, alpha)

    def shift(self, fragment: int, change: Floats) -> None:
        self.binding.shift(fragment, change)

    def adopt(self, fragment: int, theta: Floats) -> None:
        self.binding.adopt(fragment, theta)

    def rebase_change(
        self, fragment: int, old: Floats, new: Floats, counted: Encoded | None, correction: Floats | None = None
    ) -> Floats:
        return self.binding.rebase_change(fragment, old, new, counted, correction)

    def state_dict(self, bases: Sequence[Floats]) -> dict[str, Tensor]:
        return self.binding.state_dict(bases)
