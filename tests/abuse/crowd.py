"""Many workers at once, made of bare messages: they push, wait for their fates and pull, and compute nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import numpy as np
from raw_worker import RawWorker, flat, frames_of

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Format, decode_fragment, digest, read_frame
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Manifest, Role, TensorSpec

T = TypeVar("T")

BEAT_SECONDS = 2.0

SESSION_SECONDS = 3600.0


def model_of(sizes: Sequence[int]) -> Manifest:
    """One trained tensor, and so one fragment, a size."""
    return Manifest(tuple(TensorSpec(f"layers.{i}.weight", (n,), "float32", Role.TRAINED) for i, n in enumerate(sizes)))


def settings(sizes: Sequence[int], workers: int, **changes: object) -> list[str]:
    """Arguments of a server whose rounds wait for all of them."""
    chosen = {
        "num_fragments": len(sizes),
        "min_workers": workers,
        "grace_seconds": "inf",
        "lease_seconds": 120,
        "log_level": "warning",
    } | changes
    return [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]


class Crowd(ExitStack):
    """`count` workers that have joined. All of them contribute the same bytes, in each round anew."""

    def __init__(
        self,
        address: str,
        sizes: Sequence[int],
        count: int,
        seed: int = 0,
        part: int = 0,
        seeded: Callable[[], None] = lambda: None,
    ) -> None:
        """Of several crowds of one run `part` 0 brings the parameters; `seeded` returns once they are there."""
        super().__init__()
        dice = np.random.default_rng(seed)
        self._sizes = sizes
        self._address = address
        self.version = 0
        """Of all fragments."""
        self.counted = 0
        """Contributions."""
        self.frames = [frames_of(dice.standard_normal(n, dtype=np.float32), Format.INT4) for n in sizes]
        self.encoded_bytes = sum(len(f) for frames in self.frames for f in frames)
        """Of what one worker contributes to all fragments."""
        self.workers = [self.enter_context(RawWorker(address, f"worker-{part}-{i:03}")) for i in range(count)]
        self._threads = self.enter_context(ThreadPoolExecutor(count))
        self._ended = threading.Event()
        self._join(part == 0, seeded)
        beating = threading.Thread(target=self._beat)
        beating.start()
        self.callback(beating.join)
        self.callback(self._ended.set)

    def _join(self, seeds: bool, seeded: Callable[[], None]) -> None:
        first, *others = self.workers
        manifest = model_of(self._sizes)
        if seeds:
            first.join(manifest, SESSION_SECONDS)
            first.expect("seed_wanted")
            first.seed(np.zeros(n, np.float32) for n in self._sizes)
            first.expect("seeded")
        else:
            others = self.workers
        seeded()

        def join(worker: RawWorker) -> None:
            worker.join(manifest, SESSION_SECONDS).expect("welcome")

        self.all(join, others)
        for worker in self.workers:
            worker.say(ready=pb.Ready())
        self.all(lambda worker: worker.expect("opened"))

    def all(self, do: Callable[[RawWorker], T], workers: Iterable[RawWorker] | None = None) -> list[T]:
        """For each worker, side by side."""
        return list(self._threads.map(do, self.workers if workers is None else workers))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            for worker in self.workers:
                worker.say(heartbeat=pb.Heartbeat(step=self.version))

    def round(self) -> float:
        """One round of every fragment, with the updates pulled by all; returns the seconds that it took."""
        began = time.monotonic()
        for fates in self.all(self._take_part):
            assert set(fates) == {(self.version + 1, pb.FATE_COUNTED)}, fates
            self.counted += len(fates)
        self.version += 1
        return time.monotonic() - began

    def _take_part(self, worker: RawWorker) -> list[tuple[int, int]]:
        for fragment, frames in enumerate(self.frames):
            outcome = worker.push(
                fragment, frames, codec=pb.CODEC_INT4, base_version=self.version, since_version=self.version
            )
            assert outcome.kind == pb.OUTCOME_STAGED, outcome
        events = [worker.expect("committed") for _ in self.frames]
        for fragment in range(len(self.frames)):
            ((item, frames),) = worker.pull(fragment, since_version=self.version)
            assert item.frames == len(frames)
        return [(event.version, event.fate) for event in events]

    def theta(self, fragment: int) -> Floats:
        """As a snapshot brings it, its digest checked."""
        ((item, frames),) = self.workers[0].pull(fragment, snapshot=True)
        found = np.concatenate([decode_fragment(read_frame(f).encoded) for f in frames])
        assert digest(found) == item.digest
        return found


def blocks(size: int) -> int:
    return -(-size // BLOCK)


__all__ = ["BEAT_SECONDS", "Crowd", "blocks", "flat", "model_of", "settings"]
