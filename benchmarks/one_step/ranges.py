"""How long the client spends in each of its profiler ranges, by thread."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from diloco_client import binding, courier

PHASES = ("capture", "encode", "push", "wait", "decode", "apply")


class Ranges:
    """Takes the place of `record_function` in the client while it is installed: torch's profiler itself slows every
    operation down."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """Of each time that a phase was gone through."""
        self.trainer = threading.get_ident()
        self.on_trainer: dict[str, float] = defaultdict(float)
        """Seconds in all, on the thread that trains."""

    def forget(self) -> None:
        """All that was noted so far."""
        self.seconds.clear()
        self.on_trainer.clear()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            taken, phase = time.perf_counter() - began, name.removeprefix("diloco::")
            self.seconds[phase].append(taken)
            if threading.get_ident() == self.trainer:
                self.on_trainer[phase] += taken

    @contextmanager
    def installed(self) -> Iterator[None]:
        modules = (binding, courier)
        originals = [module.record_function for module in modules]
        for module in modules:
            module.record_function = self  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, original in zip(modules, originals, strict=True):
                module.record_function = original
