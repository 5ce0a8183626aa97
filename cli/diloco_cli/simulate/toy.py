"""A model of a few hundred values that is trained by adding random numbers."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from diloco_client.replica import Parameters
from diloco_proto.codec import Encoded, accumulate
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Layout, Manifest, Role, TensorSpec

STEP_SIZE = np.float32(0.01)


class Trainer(Parameters, Protocol):
    """A local model and what trains it."""

    manifest: Manifest

    def attach(self, layout: Layout) -> None: ...
    def seed_values(self, fragment: int) -> Floats: ...
    def rounded(self, fragment: int, theta: Floats) -> Floats:
        """As the local values are."""
        ...

    def step(self) -> int:
        """One inner step; returns the tokens that it trained on."""
        ...


class Copy:
    """Local values as they were when they were captured."""

    def __init__(self, values: Floats) -> None:
        self._values = values

    def wait(self) -> Floats:
        return self._values


def toy_manifest(layers: int, *, size: int = 64, buffers: bool = False) -> Manifest:
    """`layers` trained tensors, and perhaps a buffer and a frozen tensor."""
    tensors = [TensorSpec(f"layers.{i}.weight", (size,), "float32", Role.TRAINED) for i in range(layers)]
    if buffers:
        tensors.append(TensorSpec("norm.mean", (size,), "float32", Role.BUFFER))
        tensors.append(TensorSpec("table", (size,), "float32", Role.FROZEN))
    return Manifest(tuple(tensors))


class ToyTrainer:
    """Local parameters as flat fragments, and a random walk as training. `tokens` is what a step trains on."""

    def __init__(self, manifest: Manifest, rng: np.random.Generator, tokens: int = 1) -> None:
        self.manifest = manifest
        self.locals: list[Floats] = []
        self.tokens = tokens
        self._rng = rng

    def attach(self, layout: Layout) -> None:
        self.layout = layout
        lengths = [f.length for f in layout.fragments]
        whole = self._random(sum(lengths))
        ends = np.cumsum(lengths)
        self.locals = [whole[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        self._trained = whole[: sum(f.length for f in layout.scheduled)]

    def step(self) -> int:
        self._trained += STEP_SIZE * self._random(self._trained.size)
        return self.tokens

    def seed_values(self, fragment: int) -> Floats:
        return self.locals[fragment].copy()

    def capture(self, fragment: int) -> Copy:
        return Copy(self.locals[fragment].copy())

    def rounded(self, fragment: int, theta: Floats) -> Floats:
        return theta

    def mix(self, fragment: int, theta: Floats, alpha: float) -> None:
        local = self.locals[fragment]
        local += np.float32(1.0 - alpha) * (theta - local)

    def shift(self, fragment: int, change: Floats) -> None:
        self.locals[fragment] += change

    def adopt(self, fragment: int, theta: Floats) -> None:
        self.locals[fragment][:] = theta

    def rebase_change(
        self, fragment: int, old: Floats, new: Floats, counted: Encoded | None, correction: Floats | None = None
    ) -> Floats:
        change = new - old
        if counted is not None:
            accumulate(counted.format, counted.scales, counted.codes, 1.0, change)
        if correction is not None:
            change += correction
        return change

    def _random(self, size: int) -> Floats:
        return self._rng.standard_normal(size, np.float32)
