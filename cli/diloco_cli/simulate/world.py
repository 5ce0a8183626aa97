"""One simulated run: server, workers, faults and promises, all from one seed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from diloco_proto.errors import Superseded

from .booked import BookedTrainer
from .broken import BrokenPromise
from .clock import Clock, Gate
from .faults import Faults
from .line import Line
from .link import VirtualLink
from .outages import Outages
from .promises import Promises
from .server import VirtualServer
from .setting import Ability, Setting, draw_ability, draw_setting
from .toy import toy_manifest
from .worker import VirtualWorker

LAST_STEPS = 2
"""Inner steps, at most, that survivors take after the last fault before they flush."""

MOST_ACTIONS = 50_000
"""Of a run; one that needs more goes round in circles."""

LEAST_EVENTS = 100
"""Before the last fault; faults go on until there are so many."""


@dataclass(slots=True)
class Outcome:
    """Of one simulated run."""

    seed: int
    seconds: float = 0.0
    """Virtual."""
    commits: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    """All of them, faults included."""
    answers: Counter[str] = field(default_factory=Counter)
    """To contributions, by kind."""
    trace: int = 0
    """A checksum of all events and their times."""
    broken: BrokenPromise | None = None


class World:
    """Everything of one run. `log` gets a line for every fault and whatever else is worth one."""

    def __init__(self, setting: Setting, log: list[str] | None = None) -> None:
        self.setting = setting
        self.rng = random.Random(f"world {setting.seed}")
        self.clock = Clock()
        self.promises = Promises(setting.config, self.clock, log)
        self.slow_commits: list[float] = []
        """How much longer the next outer steps take."""
        self.outages = Outages(self)
        self.server = VirtualServer(
            setting.config,
            self.clock,
            commit_seconds=self._commit_seconds,
            watch=self.promises,
            disk=self.outages.disk,
        )
        self.promises.begin(self.server.run, lambda: self.server.position)
        self.manifest = toy_manifest(setting.layers, size=setting.size, buffers=setting.buffers)
        self.workers: list[VirtualWorker] = []
        self.healing = False
        self._generations: dict[str, int] = {}
        self._abilities: dict[str, Ability] = {}
        self.faults = Faults(self)
        for _ in range(setting.workers):
            self.clock.after(self.rng.random() * 0.1 * setting.period, self._spawn_new)

    def _commit_seconds(self) -> float:
        more = self.slow_commits.pop() if self.slow_commits else 0.0
        return self.setting.commit_seconds * self.rng.uniform(0.5, 1.5) + more

    # -- processes --

    def spawn(self, worker_id: str | None = None) -> VirtualWorker:
        """A process starts: a new worker, or the next generation of one."""
        worker_id = worker_id or f"w{self.rng.randrange(100):02}-{len(self._generations)}"
        generation = self._generations[worker_id] = self._generations.get(worker_id, 0) + 1
        ability = self._abilities.setdefault(worker_id, draw_ability(self.rng, self.setting))
        process, rng = Gate(), self.rng
        line = Line(self.clock, ability.speed, lambda: self.server.gate, process, lambda: rng.random() * ability.jitter)
        numbers = np.random.Generator(np.random.SFC64(rng.getrandbits(32)))
        config, ledger = self.setting.config, self.promises.ledger
        trainer = BookedTrainer(self.manifest, numbers, config, ledger, worker_id, generation, ability.tokens)
        worker = VirtualWorker(
            self.clock,
            self.server,
            line,
            trainer,
            worker_id,
            generation,
            step_seconds=lambda: ability.step_seconds * rng.uniform(0.8, 1.2),
            stride=ability.stride,
            parts=ability.parts,
        )
        self.workers.append(worker)
        self.promises.note(f"{worker_id}#{generation} starts")
        if self.healing:
            self._finish_soon(worker)
        return worker

    def _spawn_new(self) -> None:
        self.spawn()

    def alive(self) -> list[VirtualWorker]:
        """Processes that run, stopped ones included."""
        return [w for w in self.workers if not w.over]

    def newest(self) -> list[VirtualWorker]:
        """Those that are no older process of a worker that was replaced."""
        return [w for w in self.alive() if w.generation == self._generations[w.worker_id]]

    # -- the run --

    def run(self) -> Outcome:
        """Live through it. Raises BrokenPromise."""
        setting, clock = self.setting, self.clock
        times = sorted(self.rng.random() * setting.duration for _ in range(setting.faults))
        for time in times:
            clock.after(time, self.faults.strike)
        clock.after(setting.duration, self._heal)
        self.outages.plan()
        try:
            self._go_on()
        except BrokenPromise as broken:
            broken.time = clock.now
            raise
        return self.outcome()

    def outcome(self) -> Outcome:
        promises = self.promises
        return Outcome(
            seed=self.setting.seed,
            seconds=self.clock.now,
            commits=self.server.run.rounds_committed,
            faults=self.faults.counts,
            events=promises.counts + self.faults.counts,
            answers=promises.answers,
            trace=promises.trace,
        )

    def _go_on(self) -> None:
        actions, failed = 0, self.promises.failed
        while not (self.healing and not self.alive()):
            if not self.clock.step():
                raise BrokenPromise(4, f"nothing happens any more, and {self._waiting()} wait")
            actions += 1
            if (self.healing and self.clock.now > self.deadline) or actions > MOST_ACTIONS:
                raise BrokenPromise(4, f"the run does not come to its end; {self._waiting()} wait")
            while failed:
                self._check_failure(failed.pop())
        self._check_end()

    def _check_failure(self, link: VirtualLink) -> None:
        error, worker_id = link.failure, link.worker_id
        self.promises.note(f"{worker_id}#{link.generation} fails: {error}")
        if not (isinstance(error, Superseded) and link.generation < self._generations[worker_id]):
            text = f"a healthy worker fails with {type(error).__name__}: {error}"
            raise BrokenPromise(5, text, worker_id=worker_id)

    def _waiting(self) -> str:
        return ", ".join(f"{w.worker_id}#{w.generation}" for w in self.alive()) or "nobody"

    def _check_end(self) -> None:
        self.promises.check_end([w.link for w in self.workers if w.done and w.flush])

    # -- the end --

    def _heal(self) -> None:
        """No more faults: whoever is left takes a few steps more, and all flush together."""
        if self.promises.counts.total() + self.faults.counts.total() < LEAST_EVENTS:
            if not self.alive():
                self.spawn()
            self.faults.strike()
            self.clock.after(0.3 * self.setting.period, self._heal)
            return
        self.healing = True
        self.promises.note("no more faults")
        self.faults.heal()
        self.outages.heal()
        for worker in self.alive():
            self._finish_soon(worker)
        needed = max(1, 0 if self.server.run.opened else self.setting.config.min_workers)
        for _ in range(needed - len(self.newest())):
            self.spawn()
        self.deadline = self.clock.now + self._patience()

    def _finish_soon(self, worker: VirtualWorker) -> None:
        if worker.steps is None:
            worker.together = True
            worker.steps = (worker.replica.taken if worker.replica else 0) + self.rng.randint(1, LAST_STEPS)

    def _patience(self) -> float:
        """Seconds in which all must be over once nothing breaks any more."""
        setting, config = self.setting, self.setting.config
        slowest = max(a.step_seconds for a in self._abilities.values()) * 1.2
        trip = max(a.speed.round_trip(4096) + a.jitter for a in self._abilities.values())
        usual = self.server.run.rounds.usual_seconds if self.server.run.seeded else None
        grace = 2.0 if config.grace is None or config.grace == float("inf") else config.grace
        once = 2 * config.sync_every * slowest + 10 * trip + 3 * config.lease_seconds + 3 * (usual or 0.0)
        return 4 * (once + grace + 4 * setting.commit_seconds)


def simulate(seed: int, log: list[str] | None = None) -> Outcome:
    """The run of a seed, with whatever promise it breaks."""
    world = World(draw_setting(seed), log)
    try:
        return world.run()
    except BrokenPromise as broken:
        broken.seed = seed
        outcome = world.outcome()
        outcome.broken = broken
        return outcome
