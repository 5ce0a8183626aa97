"""A round with diloco: capture, encode, push, commit, pull, decode, apply. H = P = 1, so that a step is a round, and
α = 0 as in DiLoCo: afterwards all workers hold θ, as after one by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common.crew import Member, run_crew, typical
from common.server import peak_rss, serving
from common.training import Drift, make_model

import diloco_client

SETTINGS = (
    "--sync-every=1",
    "--num-fragments=1",
    "--overlap-steps=0",
    "--mixing-alpha=0",
    "--grace-seconds=inf",
    "--lease-seconds=120",
)


@dataclass(frozen=True)
class Round:
    """What a round took, and moved."""

    seconds: float
    bytes_up: int
    """Of one worker's contribution, on the wire."""
    bytes_down: int
    server_rss: int
    """The most memory that the server had, in bytes."""


def measure(parameters: int, workers: int, rounds: int, *, durability: str = "journal") -> Round:
    settings = (*SETTINGS, f"--min-workers={workers}", f"--durability={durability}", "--snapshot-every=1000")
    with serving(*settings) as (server, _):
        seconds = run_crew(workers, _work, server.address, parameters, rounds)
        status = diloco_client.status(server.address)
        up = status["bytes_in"] - 4 * parameters
        return Round(
            seconds=typical(seconds),
            bytes_up=max(0, up) // (workers * rounds),
            bytes_down=status["fragments"][0]["update_bytes"],
            server_rss=peak_rss(server.process.pid),
        )


def _work(member: Member, address: str, parameters: int, rounds: int) -> None:
    torch.set_num_threads(1)
    model = make_model(parameters)
    optimizer = Drift(model, seed=member.index)
    optimizer.register_step_post_hook(lambda *_: member.begin())  # before diloco's, which is registered by join
    with diloco_client.join(address, model, optimizer, worker_id=f"worker-{member.index}") as outer:
        for _ in range(rounds):
            optimizer.step()
            member.end()
        assert outer.stats.counted == rounds, f"{outer.stats.counted} of {rounds} rounds counted"
