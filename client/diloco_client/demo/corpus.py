"""The demo's text: the Python standard library's own source, as bytes.

Which files, in which order and whose they are follows from their names and sizes alone, so that every
process of a demo (and the same demo run again) sees the same shards without exchanging anything.
"""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diloco_proto.errors import ConfigError

Bytes = npt.NDArray[np.uint8]

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"})
"""Folders not read: installed packages, tests (which distributions strip), and tables that are data."""

VALIDATION_SHARE = 0.08
"""Part of the files that nobody trains on."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Files of the standard library, divided."""

    validation: tuple[Path, ...]
    shards: tuple[tuple[Path, ...], ...]
    """One tuple of files for each worker; no file is in two of them, none is in the validation set."""


def standard_library() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path) -> list[Path]:
    """Every .py file under `root` that the demo reads, sorted by its path relative to `root`."""
    found = [path for path in root.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(root).parts)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def divide(root: Path, workers: int) -> Corpus:
    """Sets validation files apart and deals the others out to `workers`.

    Largest first, always to the smallest shard: so the shards are of nearly equal size, whatever single
    large files there are.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    validation: list[Path] = []
    training: list[Path] = []
    for path in source_files(root):
        chosen = _name_hash(path.relative_to(root)) < VALIDATION_SHARE
        (validation if chosen else training).append(path)
    if not validation or len(training) < workers:
        raise ConfigError(f"{root} has too few Python files for {workers} workers and a validation set")
    return Corpus(validation=tuple(validation), shards=_deal(training, workers))


def _name_hash(relative: Path) -> float:
    """A number in [0, 1) from a file's name, the same on every machine (Python's own hash() is salted)."""
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _deal(files: Sequence[Path], workers: int) -> tuple[tuple[Path, ...], ...]:
    sizes = {path: path.stat().st_size for path in files}
    shards: list[list[Path]] = [[] for _ in range(workers)]
    filled = [0] * workers
    for path in sorted(files, key=lambda path: (-sizes[path], path.as_posix())):
        worker = filled.index(min(filled))
        shards[worker].append(path)
        filled[worker] += sizes[path]
    return tuple(tuple(sorted(shard)) for shard in shards)


def read_bytes(files: Sequence[Path]) -> Bytes:
    """The files one after another, as one array of bytes."""
    return np.frombuffer(b"".join(path.read_bytes() for path in files), dtype=np.uint8)


def batches(data: Bytes, *, size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of `data`: (tokens, targets), each (size, context) int64.

    Targets are one byte ahead of tokens.
    """
    generator = np.random.default_rng(seed)
    while True:
        yield windows(data, generator.integers(0, len(data) - context, size=size), context)


def windows(data: Bytes, starts: npt.NDArray[np.int64], context: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets) of the windows beginning at `starts`, each (len(starts), context) int64."""
    index = starts[:, None] + np.arange(context + 1)[None, :]
    both = torch.from_numpy(data[index].astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def spread(data: Bytes, *, size: int, context: int) -> tuple[Tensor, Tensor]:
    """`size` windows spread evenly over `data`, the same for everybody: (tokens, targets) as in `batches`."""
    starts = np.linspace(0, len(data) - context - 1, num=size).astype(np.int64)
    return windows(data, starts, context)
