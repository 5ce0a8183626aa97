"""One run over long links: a server, and workers whose inner step is a wait of fixed length."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from common.crew import Member, run_members, seconds_of
from common.links import Controls, links
from common.server import serving
from common.training import TENSORS, make_model

import diloco_client

from .cells import Cell


@dataclass(frozen=True)
class Load:
    """What the workers train, and how fast."""

    parameters: int
    step_seconds: float
    workers: int
    delay: float
    """Seconds each way."""


@dataclass(frozen=True)
class Outcome:
    """How a run went: means over the workers."""

    share: float
    """Of the time, not stalled."""
    seconds: float
    """Stalled, for each merge."""


class Pace(torch.optim.Optimizer):
    """An inner step of fixed length, in which the processor has nothing to do: a GPU's. Then one tensor in turn is
    moved by a little."""

    def __init__(self, model: torch.nn.Module, seed: int, seconds: float) -> None:
        super().__init__(model.parameters(), {})
        self._seconds = seconds
        self._noise = torch.randn(next(model.parameters()).shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
        self._count = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        time.sleep(self._seconds)
        self.param_groups[0]["params"][self._count % TENSORS].add_(self._noise)
        self._count += 1


def run(cell: Cell, load: Load) -> Outcome:
    settings = (
        f"--sync-every={cell.period}",
        f"--num-fragments={cell.fragments}",
        f"--overlap-steps={cell.overlap}",
        f"--uplink-codec={cell.codec}",
        f"--downlink-codec={cell.codec}",
        f"--min-workers={load.workers}",
        "--grace-seconds=inf",
        "--lease-seconds=600",
    )
    controls = Controls()
    with serving(*settings) as (server, _), links(server.port, load.workers, controls) as ports:
        members = run_members(load.workers, _work, cell, load, ports, controls)
    (taken,) = seconds_of(members)
    stalled = sum(stall for member in members for stall, _ in member.notes) / load.workers
    merged = sum(merged for member in members for _, merged in member.notes) / load.workers
    return Outcome(share=1 - stalled / taken, seconds=stalled / merged)


def _work(member: Member, cell: Cell, load: Load, ports: list[int], controls: Controls) -> None:
    torch.set_num_threads(1)
    model = make_model(load.parameters)
    optimizer = Pace(model, member.index, load.step_seconds)
    address, name = f"127.0.0.1:{ports[member.index]}", f"worker-{member.index}"
    outer = diloco_client.join(address, model, optimizer, worker_id=name, data_connections=cell.connections)
    member.barrier.wait()  # the first download is over: from now on the link is a long one
    controls.set(cell.mbit * 1e6 / 8, load.delay, cell.stalls)
    before = outer.stats
    member.begin()
    for _ in range(cell.period * cell.rounds):
        optimizer.step()
    member.end()
    after = outer.stats
    assert after.not_counted == 0, f"{after.not_counted} contributions were not counted"
    member.notes.append((after.stall_seconds - before.stall_seconds, after.rounds - before.rounds))
    controls.set()
    member.barrier.wait()
    outer.close()
