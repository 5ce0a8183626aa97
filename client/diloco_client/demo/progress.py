"""What the demo has heard from its processes so far."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

ALONE = "alone"
"""Name of the lone worker's process."""

SMOOTHING = 0.95
"""Of the training loss on display: the weight of what was before the latest step."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Track:
    """One training process."""

    step: int = 0
    phase: str = "starting"
    initial: tuple[float, int] = (0.0, 0)
    """Validation loss of the initial parameters over this process' windows, and their number."""
    parameters: int = 0
    """Of the model."""
    loss: float = 0.0
    """Training loss in nats a byte, smoothed."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """The smoothed training loss after steps 1, 2, …"""
    seconds: float = 0.0
    """Time spent training."""
    stall: float = 0.0
    """Seconds of it spent waiting for the server."""
    up: int = 0
    down: int = 0
    """Bytes moved, the first download included."""
    curve: dict[int, tuple[float, int]] = dataclasses.field(default_factory=dict)
    """Step -> validation loss over this process' windows, and their number."""
    final: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The last event, once there is one."""

    def hear(self, event: Mapping[str, Any]) -> None:
        """Takes one event of this process in."""
        match event["event"]:
            case "initial":
                self.initial = (event["loss"], event["windows"])
                self.parameters = event["parameters"]
            case "ready":
                self.phase = "ready"
            case "step":
                self.phase = "training"
                self._step(event)
            case "curve":
                self.curve[event["step"]] = (event["loss"], event["windows"])
            case "done":
                self.phase = "done"
                self.up, self.down = event["up"], event["down"]
                self.seconds, self.stall = event["seconds"], event["stall"]
                self.final = event

    def _step(self, event: Mapping[str, Any]) -> None:
        # Corrected for its start, like Adam's moments: the first value is the first loss, not a part of it.
        before = 1 - SMOOTHING**self.step
        self.step = event["step"]
        after = 1 - SMOOTHING**self.step
        self.loss = (SMOOTHING * before * self.loss + (1 - SMOOTHING) * event["loss"]) / after
        self.losses.append(self.loss)
        self.up, self.down = event["up"], event["down"]
        self.seconds, self.stall = event["seconds"], event["stall"]

    @property
    def stall_share(self) -> float:
        """Part of the training time spent waiting."""
        return self.stall / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Progress:
    """All of them."""

    workers: Mapping[str, Track]
    alone: Track

    @classmethod
    def of(cls, workers: int) -> "Progress":
        """Nothing heard yet, of `workers` workers and the lone one."""
        return cls(workers={f"worker-{i}": Track() for i in range(workers)}, alone=Track())

    @property
    def tracks(self) -> dict[str, Track]:
        """By the process' name."""
        return {**self.workers, ALONE: self.alone}

    def hear(self, name: str, event: Mapping[str, Any]) -> None:
        """Takes one event of process `name` in."""
        self.tracks[name].hear(event)

    def all_in(self, phase: str) -> bool:
        """Whether every process has come to `phase`."""
        return all(track.phase == phase for track in self.tracks.values())

    def initial_loss(self) -> float:
        """Validation loss of the initial parameters, once every worker has told its part."""
        return weighted_mean(track.initial for track in self.workers.values())

    def parameters(self) -> int:
        """Of the model, which is the same for all."""
        return max(track.parameters for track in self.workers.values())

    def global_curve(self) -> dict[int, float]:
        """Step -> validation loss of θ, at the steps of which every worker has told its part."""
        tracks = list(self.workers.values())
        steps = sorted(set.intersection(*(set(track.curve) for track in tracks)))
        return {step: weighted_mean(track.curve[step] for track in tracks) for step in steps}

    def alone_curve(self) -> dict[int, float]:
        """Step -> validation loss of the lone worker."""
        return {step: loss for step, (loss, _) in self.alone.curve.items()}


def weighted_mean(parts: Iterable[tuple[float, int]]) -> float:
    """The mean of values that are themselves means over so many windows."""
    pairs = list(parts)
    return sum(value * count for value, count in pairs) / sum(count for _, count in pairs)
