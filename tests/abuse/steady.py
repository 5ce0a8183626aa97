"""Workers that train on whatever else happens: what they contribute depends on the version alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from raw_worker import RawWorker, flat, frames_of

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Manifest, Role, TensorSpec

SIZES = (640, 320, 130, 100)
"""Of the fragments: two that are trained, buffers, frozen."""

FORMATS = (Format.INT4, Format.INT4, Format.FP32)

MODEL = Manifest(
    (
        TensorSpec("layers.0.weight", (640,), "float32", Role.TRAINED),
        TensorSpec("layers.1.weight", (32, 10), "float32", Role.TRAINED),
        TensorSpec("mean", (130,), "float32", Role.BUFFER),
        TensorSpec("table", (100,), "float32", Role.FROZEN),
    )
)

STEADY = ("steady-0", "steady-1")

GENERATION = 1 << 63
"""Of their processes: nobody has a larger one."""

SETTINGS = {"num_fragments": 2, "min_workers": 2, "grace_seconds": "inf", "lease_seconds": 4.0}
"""Of their run: no round without both of them."""


def _values(worker: int, fragment: int, version: int) -> Floats:
    dice = np.random.default_rng((worker, fragment, version))
    return flat(dice.standard_normal(SIZES[fragment]).astype(np.float32))


class Steady:
    """Both workers. They have joined within the block."""

    def __init__(self, address: str) -> None:
        self._workers = [RawWorker(address, name, GENERATION) for name in STEADY]
        self.rounds = 0
        """That are over, of every fragment."""
        self.error: BaseException | None = None
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Steady:
        first, second = self._workers
        first.join(MODEL, timeout=600)
        first.expect("seed_wanted")
        first.seed(_values(9, fragment, 0) for fragment in range(len(SIZES)))
        first.expect("seeded")
        second.join(MODEL, timeout=600)
        for worker in self._workers:
            worker.say(ready=pb.Ready())
        for worker in self._workers:
            worker.expect("opened")
        self._go(self._beat)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for worker in self._workers:
            worker.__exit__()

    def begin(self, goal: Callable[[], int]) -> None:
        """Keep to so many rounds, on a thread, until `stop`."""

        def rounds() -> None:
            while not self._ended.wait(0.01):
                self.run_to(goal())

        self._go(rounds)

    def stop(self) -> None:
        """Raises what went wrong in the threads."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def run_to(self, rounds: int) -> None:
        while self.rounds < rounds:
            self.round()

    def round(self) -> None:
        """One of every fragment."""
        for fragment, fmt in enumerate(FORMATS):
            for index, worker in enumerate(self._workers):
                frames = frames_of(_values(index, fragment, self.rounds), fmt)
                outcome = worker.push(
                    fragment, frames, codec=int(fmt), base_version=self.rounds, since_version=self.rounds
                )
                assert outcome.kind == pb.OUTCOME_STAGED, outcome
        for worker in self._workers:
            for _ in FORMATS:
                event = worker.expect("committed")
                assert (event.version, event.fate) == (self.rounds + 1, pb.FATE_COUNTED)
        self.rounds += 1

    def _beat(self) -> None:
        while not self._ended.wait(0.5):
            for worker in self._workers:
                worker.say(heartbeat=pb.Heartbeat(step=self.rounds))

    def _go(self, body: object) -> None:
        def run() -> None:
            try:
                body()
            except BaseException as error:
                self.error = self.error or error
                self._ended.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def digests(self) -> dict[int, tuple[int, int]]:
        """Fragment -> version and digest, as the server has them."""
        status = self._workers[0].stub.Status(pb.StatusRequest(), timeout=30)
        return {f.index: (f.version, f.digest) for f in status.fragments}
