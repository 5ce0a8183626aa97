"""A planned run: how it would go with workers, lines and failures like these."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from diloco_cli.options import fields_of
from diloco_proto.errors import ConfigError
from diloco_proto.manifest import Layout, build_layout
from diloco_server.config import RunConfig

from .clock import Clock, Gate
from .line import Line, Speed
from .server import VirtualServer
from .toy import STEP_SIZE, Copy, ToyTrainer, toy_manifest
from .worker import VirtualWorker

SIZE = 4096
"""Values of a layer of the toy model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is planned. `step_seconds` are dealt out to the workers in turn."""

    config: RunConfig
    hours: float
    workers: int
    step_seconds: tuple[float, ...]
    parameters: float
    speed: Speed
    commit_seconds: float = 0.0
    mtbf_hours: float = float("inf")
    """Of one worker; it dies as by SIGKILL."""
    rejoin_minutes: float = 5.0
    seed: int = 0

    @classmethod
    def from_options(cls, hours: float, seed: int, values: dict[str, Any]) -> Self:
        """From the command line's. Raises ConfigError."""
        try:
            steps = tuple(float(s) for s in values["step_seconds"].split(","))
        except ValueError:
            steps = ()
        if not steps or min(steps) <= 0:
            raise ConfigError(f"--step-seconds is {values['step_seconds']!r}; it must be numbers of seconds: 0.5,0.5,1")
        known = {name: value for name, value in values.items() if name in RunConfig.__dataclass_fields__}
        defaults = fields_of(RunConfig, {f: getattr(RunConfig(), f) for f in RunConfig.__dataclass_fields__})
        return cls(
            config=RunConfig(**(defaults | known)),
            hours=hours,
            workers=values["workers"],
            step_seconds=steps,
            parameters=values["parameters"],
            speed=Speed(latency=values["latency"], up=values["mbit_up"] * 1e6 / 8, down=values["mbit_down"] * 1e6 / 8),
            commit_seconds=values["commit_seconds"],
            mtbf_hours=values["mtbf_hours"],
            rejoin_minutes=values["rejoin_minutes"],
            seed=seed,
        )


class LazyTrainer(ToyTrainer):
    """Takes the random steps of a fragment all at once, when they are looked at."""

    def attach(self, layout: Layout) -> None:
        super().attach(layout)
        self._taken = 0
        self._until = [0] * layout.num_scheduled

    def step(self) -> int:
        self._taken += 1
        return self.tokens

    def capture(self, fragment: int) -> Copy:
        steps, self._until[fragment] = self._taken - self._until[fragment], self._taken
        local = self.locals[fragment]
        local += np.float32(math.sqrt(steps)) * STEP_SIZE * self._random(local.size)
        return super().capture(fragment)


@dataclass(slots=True)
class Share:
    """What one worker id has done, over all its processes."""

    worker_id: str
    step_seconds: float
    steps: int = 0
    computed: float = 0.0
    stalled: float = 0.0
    alive: float = 0.0
    """Seconds that it was paid for."""
    counted: int = 0
    not_counted: int = 0
    deaths: int = 0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    sync_every: int = 0

    def add(self, worker: VirtualWorker, scale: float) -> None:
        """One of its processes is over."""
        self.computed += worker.compute_seconds
        self.stalled += worker.stall_seconds
        self.bytes_up += worker.traffic.up * scale
        self.bytes_down += worker.traffic.down * scale
        if worker.replica is not None:
            self.steps += worker.replica.taken
            self.counted += worker.replica.counted
            self.not_counted += worker.replica.not_counted
            self.sync_every = worker.replica.sync_every


@dataclass(slots=True)
class Planned:
    """How it went."""

    seconds: float = 0.0
    rounds: float = 0.0
    """Every fragment has had so many."""
    server_up: float = 0.0
    """Bytes that left the server."""
    server_down: float = 0.0
    shares: list[Share] = field(default_factory=list)


class _Crew:
    """Keeps the planned workers going: each dies now and then, and comes back."""

    def __init__(self, plan: Plan, clock: Clock, server: VirtualServer, scale: float) -> None:
        self.shares: list[Share] = []
        self._plan = plan
        self._clock = clock
        self._server = server
        self._scale = scale
        self._rng = random.Random(plan.seed)
        self._running: dict[int, tuple[VirtualWorker, float]] = {}
        for i in range(plan.workers):
            self.shares.append(Share(f"w{i}", plan.step_seconds[i % len(plan.step_seconds)]))
            self._start(i, 1)

    def _start(self, i: int, generation: int) -> None:
        plan, share = self._plan, self.shares[i]
        line = Line(self._clock, plan.speed, lambda: self._server.gate, Gate())
        manifest = toy_manifest(plan.config.num_fragments, size=SIZE)
        worker = VirtualWorker(
            self._clock,
            self._server,
            line,
            LazyTrainer(manifest, np.random.default_rng((plan.seed, i, generation))),
            share.worker_id,
            generation,
            step_seconds=lambda: share.step_seconds,
            stride=1 << 20,
            wire_scale=self._scale,
        )
        self._running[i] = (worker, self._clock.now)
        if plan.mtbf_hours != float("inf"):
            life = self._rng.expovariate(1 / (3600 * plan.mtbf_hours))
            self._clock.after(life, lambda: self._die(i, generation))

    def _die(self, i: int, generation: int) -> None:
        self._running[i][0].kill()
        self._stop(i)
        self.shares[i].deaths += 1
        self._clock.after(60 * self._plan.rejoin_minutes, lambda: self._start(i, generation + 1))

    def _stop(self, i: int) -> None:
        worker, since = self._running.pop(i)
        if worker.stalled_since is not None:
            worker.stall_seconds += self._clock.now - worker.stalled_since
        self.shares[i].alive += self._clock.now - since
        self.shares[i].add(worker, self._scale)

    def stop_all(self) -> None:
        for i in list(self._running):
            self._stop(i)


def plan_run(plan: Plan) -> Planned:
    """Simulate it."""
    clock = Clock()
    server = VirtualServer(plan.config, clock, commit_seconds=lambda: plan.commit_seconds)
    layout = build_layout(
        toy_manifest(plan.config.num_fragments, size=SIZE), plan.config.num_fragments, plan.config.pattern
    )
    scale = plan.parameters / sum(f.parameters for f in layout.fragments)
    crew = _Crew(plan, clock, server, scale)
    end = 3600 * plan.hours
    over: list[bool] = []
    clock.after(end, lambda: over.append(True))
    while not over and clock.step():
        pass
    crew.stop_all()
    rounds = server.run.rounds_committed / layout.num_scheduled if server.run.seeded else 0.0
    return Planned(end, rounds, server.bytes_out * scale, server.bytes_in * scale, crew.shares)
