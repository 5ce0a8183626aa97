"""One run of the comparison, in virtual time: real server core, real hook arithmetic, real training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from diloco_cli.simulate.clock import Clock
from diloco_cli.simulate.line import Line, Speed
from diloco_cli.simulate.server import VirtualServer
from diloco_cli.simulate.worker import VirtualWorker
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec.formats import Floats
from diloco_server.config import RunConfig
from diloco_server.pushes import Ticket

from .cases import Case
from .trainer import TOKENS_A_STEP, Texts, Trainer, build, learning_rate, train_step

WORKERS = 4
"""Of most cases: a run of `steps` steps trains on steps·WORKERS batches, however many workers share them."""

Result = dict[str, Any]


def run(case: Case, seed: int, steps: int, texts: Texts) -> Result:
    """`steps` inner steps of four workers' worth of tokens. The result has loss, tokens, and bytes a worker."""
    torch.set_num_threads(1)
    if not case.config:
        return _data_parallel(case, seed, steps, texts)
    return _Diloco(case, seed, steps, texts).run()


def _result(case: Case, seed: int, steps: int, loss: float, up: float, down: float, **more: object) -> Result:
    settings = case.config | {"workers": case.workers, "steps": steps}
    for name in ("by_package", "dropped", "step_seconds", "joins", "leaves"):
        if getattr(case, name):
            settings[name] = getattr(case, name)
    tokens = steps * WORKERS * TOKENS_A_STEP
    return {"name": case.name, "settings": settings, "seed": seed, "loss": loss, "tokens": tokens} | {
        "bytes_up": round(up),
        "bytes_down": round(down),
        **more,
    }


def _data_parallel(case: Case, seed: int, steps: int, texts: Texts) -> Result:
    """The gradient of all workers' batches together, at every step; 4 bytes a parameter up and down."""
    model, optimizer = build(seed)
    shards = [texts.shard(i, case.workers, by_package=False, seed=seed) for i in range(case.workers)]
    for step in range(steps):
        parts = [next(shard) for shard in shards]
        x, y = (torch.cat(both) for both in zip(*parts, strict=True))
        train_step(model, optimizer, (x, y), learning_rate(step / steps))
    traffic = 4 * sum(p.numel() for p in model.parameters()) * steps
    return _result(case, seed, steps, texts.loss(model.state_dict()), traffic, traffic)


class _DroppingServer(VirtualServer):
    """Loses a share of the contributions: such a worker is not in the round, and learns it when that closes. In each
    round at least one gets through, since without any there is no round."""

    def __init__(self, config: RunConfig, clock: Clock, dropped: float, workers: int, seed: int) -> None:
        super().__init__(config, clock)
        self._dropped = dropped
        self._workers = workers
        self._seed = seed
        self.lossy = True
        """Until the workers finish: what they bring in last is not lost."""

    def _lost(self, worker: int, fragment: int, version: int) -> bool:
        draws = np.random.default_rng((self._seed, fragment, version)).random(self._workers)
        return bool(self.lossy and draws[worker] < self._dropped and draws[worker] < draws.max())

    def finish_push(self, ticket: Ticket, frames: Any) -> pb.Outcome:
        header = ticket.header
        if header.purpose != pb.PURPOSE_CONTRIBUTION or not self._lost(
            int(header.worker_id), header.fragment, header.base_version
        ):
            return super().finish_push(ticket, frames)
        current = self.run.rounds.round(header.fragment)
        assert current is not None
        # All have joined: from now on a round may close with as few as get through.
        self.run.config = dataclasses.replace(self.run.config, min_workers=1)
        self.run.rounds.floor = 1
        current.expected.discard(header.worker_id)
        self.settle()
        return pb.Outcome(kind=pb.OUTCOME_STAGED, version=header.base_version)


class _Diloco:
    """A case as a simulated run."""

    def __init__(self, case: Case, seed: int, steps: int, texts: Texts) -> None:
        self._case = case
        self._seed = seed
        self._steps = steps
        self._texts = texts
        self._budget = steps * WORKERS
        self._taken = 0
        self._clock = Clock()
        joins = case.joins or (0.0,) * case.workers
        config = RunConfig(min_workers=joins.count(0.0), lease_seconds=60.0, max_away=10**6, **case.config)
        if case.dropped:
            self._server: VirtualServer = _DroppingServer(config, self._clock, case.dropped, case.workers, seed)
        else:
            self._server = VirtualServer(config, self._clock)
        self._joins = list(enumerate(joins))
        self._workers: list[VirtualWorker] = []

    def _progress(self) -> float:
        return self._taken / self._budget

    def _batches(self, index: int) -> Any:
        shard = self._texts.shard(index, self._case.workers, by_package=self._case.by_package, seed=self._seed)
        for batch in shard:
            self._taken += 1
            yield batch

    def _join(self, index: int) -> None:
        case = self._case
        seconds = case.step_seconds[index] if case.step_seconds else 1.0
        step_seconds: Callable[[], float] = lambda: seconds  # noqa: E731
        self._workers.append(
            VirtualWorker(
                self._clock,
                self._server,
                Line(self._clock, Speed()),
                Trainer(self._seed, self._batches(index), self._progress),
                str(index),
                1,
                step_seconds=step_seconds,
                together=True,
            )
        )

    def run(self) -> Result:
        leaves = self._case.leaves or (1.0,) * self._case.workers
        while not self._workers or not all(w.done for w in self._workers):
            while self._joins and self._progress() >= self._joins[0][1]:
                self._join(self._joins.pop(0)[0])
            if isinstance(self._server, _DroppingServer) and self._progress() >= 1.0:
                self._server.lossy = False
            for index, worker in enumerate(self._workers):
                if self._progress() >= leaves[index]:
                    worker.steps = 0
            failed = next((w.failure for w in self._workers if w.failure), None)
            if failed is not None:
                raise failed
            assert self._clock.step(), "the run stands still"
        count = len(self._workers)
        trainer = self._workers[0].trainer
        assert isinstance(trainer, Trainer)
        return _result(
            self._case,
            self._seed,
            self._steps,
            self._texts.loss(trainer.state_dict(self._theta())),
            sum(w.traffic.up for w in self._workers) / count,
            sum(w.traffic.down for w in self._workers) / count,
            bits_up=_bits([(w.traffic.contributions, w.traffic.contributed) for w in self._workers]),
            bits_down=_bits([(w.traffic.updates, w.traffic.updated) for w in self._workers]),
            rounds=self._server.run.rounds_committed,
        )

    def _theta(self) -> list[Floats]:
        """The server's parameters, which every worker ended with: the workers' digests were compared on the way."""
        parameters = self._server.run.parameters
        pinned = [parameters.pin(p) for p in range(self._server.run.layout.num_scheduled)]
        thetas = []
        for snapshot in pinned:
            assert snapshot.theta is not None
            thetas.append(snapshot.theta.copy())
            parameters.unpin(snapshot)
        return thetas


def _bits(pairs: list[tuple[int, int]]) -> float:
    """Wire bits a parameter, from (bytes, parameters)."""
    size, count = (sum(column) for column in zip(*pairs, strict=True))
    return 8 * size / count if count else 0.0
