"""The manifest (which tensors a model has) and the layout (which fragment holds each of them).

The layout is a deterministic function of the manifest, the number of fragments and the pattern, so both
ends compute it and compare one fingerprint. A fragment is one flat float32 vector: its tensors in manifest
order, each starting on a block boundary, zero-padded (so no codec block spans two tensors).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

from .codec.formats import BLOCK
from .errors import ConfigError, UnsupportedModel

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes whose every value float32 holds exactly."""


MAX_DIMENSIONS = 64
"""Of a tensor, as in torch and numpy."""

MAX_BLOCKS = 1 << 32
"""Of a fragment: a frame says in 32 bits where it begins."""


class Role(StrEnum):
    """What becomes of a tensor: trained in rounds, averaged in rounds (BatchNorm statistics), or sent once with the
    snapshot."""

    TRAINED = "trained"
    BUFFER = "buffer"
    FROZEN = "frozen"


class Pattern(StrEnum):
    """How layers are dealt out to fragments (arXiv 2501.18512, section 3.1; balanced: 2604.21428)."""

    STRIDED = "strided"
    SEQUENTIAL = "sequential"
    BALANCED = "balanced"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model; `tied` are further names of the same storage."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    tied: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def describe(self) -> str:
        tied = f" (tied to {', '.join(self.tied)})" if self.tied else ""
        return f"{self.name} {self.dtype}{list(self.shape)} {self.role}{tied}"


@dataclass(frozen=True)
class Manifest:
    """All tensors of a model that take part in a run, in the model's own order."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(t.name for t in self.tensors).items() if count > 1]
        if twice:
            raise UnsupportedModel(f"tensor {twice[0]!r} is listed twice")
        for tensor in self.tensors:
            if len(tensor.shape) > MAX_DIMENSIONS:
                raise UnsupportedModel(
                    f"tensor {tensor.name!r} has {len(tensor.shape)} dimensions; at most {MAX_DIMENSIONS} are supported"
                )
            if tensor.dtype not in DTYPES:
                raise UnsupportedModel(
                    f"tensor {tensor.name!r} is {tensor.dtype}; the global parameters are float32, "
                    f"so parameters and buffers must be one of {', '.join(DTYPES)}"
                )
            if tensor.numel == 0:
                raise UnsupportedModel(f"tensor {tensor.name!r} has no elements (shape {list(tensor.shape)})")
        if not any(t.role is Role.TRAINED for t in self.tensors):
            raise UnsupportedModel("the model has no trained parameters")

    def first_difference(self, other: Manifest) -> str | None:
        """The first tensor in which `other` differs from this manifest, in words; None when they are equal."""
        for index, (ours, theirs) in enumerate(zip(self.tensors, other.tensors, strict=False)):
            if ours != theirs:
                return f"tensor {index}: the run has {ours.describe()}, this worker {theirs.describe()}"
        if len(self.tensors) > len(other.tensors):
            missing = self.tensors[len(other.tensors)]
            return f"tensor {len(other.tensors)}: the run has {missing.describe()}, this worker has no more tensors"
        if len(self.tensors) < len(other.tensors):
            extra = other.tensors[len(self.tensors)]
            return f"tensor {len(self.tensors)}: this worker has {extra.describe()}, the run has no more tensors"
        return None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in its fragment: `offset` values from the start, a multiple of BLOCK."""

    tensor: TensorSpec
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.tensor.numel


@dataclass(frozen=True)
class Fragment:
    """A fixed set of tensors, as one flat float32 vector of `length` values (a multiple of BLOCK)."""

    index: int
    role: Role
    slots: tuple[Slot, ...]
    length: int

    @property
    def num_blocks(self) -> int:
        return self.length // BLOCK

    @cached_property
    def parameters(self) -> int:
        """Values that are not padding."""
        return sum(slot.tensor.numel for slot in self.slots)

    def tensor_at(self, position: int) -> str:
        """Name of the tensor that holds value `position` of the flat vector."""
        return next(s.tensor.name for s in reversed(self.slots) if s.offset <= position)


@dataclass(frozen=True)
class Layout:
    """All fragments of a run: the trained ones first (0 … num_trained − 1), then the one of all buffers, if there are
    any, then the frozen one, if any. All but the frozen one have rounds: they are scheduled (0 … num_scheduled − 1)."""

    fragments: tuple[Fragment, ...]

    @cached_property
    def num_trained(self) -> int:
        return sum(f.role is Role.TRAINED for f in self.fragments)

    @property
    def trained(self) -> tuple[Fragment, ...]:
        return self.fragments[: self.num_trained]

    @cached_property
    def num_scheduled(self) -> int:
        return sum(f.role is not Role.FROZEN for f in self.fragments)

    @property
    def scheduled(self) -> tuple[Fragment, ...]:
        return self.fragments[: self.num_scheduled]

    @cached_property
    def fingerprint(self) -> int:
        """64 bits of SHA-256 over every tensor's place and description, in order."""
        text = "\n".join(
            f"{f.index}\t{f.role}\t{s.offset}\t{s.tensor.name}\t{s.tensor.dtype}\t{list(s.tensor.shape)}"
            for f in self.fragments
            for s in f.slots
        )
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def build_layout(manifest: Manifest, num_fragments: int, pattern: Pattern) -> Layout:
    """Deal the manifest's trained tensors out to fragments; all buffers make one more, all frozen tensors another.

    Strided and sequential keep a layer whole; balanced deals single tensors, the largest first, to the
    fragment with the fewest bytes. A model with fewer trained tensors than `num_fragments` gets one fragment for each.
    """
    if num_fragments < 1:
        raise ConfigError(f"num_fragments is {num_fragments}; it must be at least 1")
    trained = [t for t in manifest.tensors if t.role is Role.TRAINED]
    count = min(num_fragments, len(trained))
    groups = _DEAL[pattern](trained, count)
    order = {tensor.name: i for i, tensor in enumerate(manifest.tensors)}
    fragments = [_place(i, Role.TRAINED, sorted(group, key=lambda t: order[t.name])) for i, group in enumerate(groups)]
    for role in (Role.BUFFER, Role.FROZEN):
        tensors = [t for t in manifest.tensors if t.role is role]
        if tensors:
            fragments.append(_place(len(fragments), role, tensors))
    return Layout(tuple(fragments))


def _place(index: int, role: Role, tensors: Iterable[TensorSpec]) -> Fragment:
    slots, offset = [], 0
    for tensor in tensors:
        slots.append(Slot(tensor, offset))
        offset += -(-tensor.numel // BLOCK) * BLOCK
    if offset > MAX_BLOCKS * BLOCK:
        raise UnsupportedModel(
            f"fragment {index} would have {offset} values; {MAX_BLOCKS * BLOCK} are the most: set num_fragments higher"
        )
    return Fragment(index, role, tuple(slots), offset)


def _layers(tensors: Sequence[TensorSpec], at_least: int) -> list[list[TensorSpec]]:
    """Tensors grouped by layer: a name up to its first number (`blocks.3`), else its first part (`head`).

    Single tensors when there are fewer layers than `at_least`.
    """
    groups: dict[str, list[TensorSpec]] = {}
    for tensor in tensors:
        numbered = re.match(r"(?:.*?\.)??\d+(?=\.)", tensor.name)
        key = numbered.group() if numbered else tensor.name.split(".")[0]
        groups.setdefault(key, []).append(tensor)
    return list(groups.values()) if len(groups) >= at_least else [[t] for t in tensors]


def _strided(tensors: Sequence[TensorSpec], count: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[] for _ in range(count)]
    for i, layer in enumerate(_layers(tensors, count)):
        groups[i % count].extend(layer)
    return groups


def _sequential(tensors: Sequence[TensorSpec], count: int) -> list[list[TensorSpec]]:
    layers = _layers(tensors, count)
    bounds = [i * len(layers) // count for i in range(count + 1)]
    return [[t for layer in layers[a:b] for t in layer] for a, b in pairwise(bounds)]


def _balanced(tensors: Sequence[TensorSpec], count: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[] for _ in range(count)]
    sizes = [0] * count
    for tensor in sorted(tensors, key=lambda t: -t.numel):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(tensor)
        sizes[smallest] += tensor.numel
    return groups


_DEAL: dict[Pattern, Callable[[Sequence[TensorSpec], int], list[list[TensorSpec]]]] = {
    Pattern.STRIDED: _strided,
    Pattern.SEQUENTIAL: _sequential,
    Pattern.BALANCED: _balanced,
}
