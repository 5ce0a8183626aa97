"""A round of DiLoCo as one writes it by hand: an all-reduce in float32 over gloo, an outer step of torch's SGD."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist
from common.crew import Member, run_crew, typical
from common.training import Drift, make_model


def measure(parameters: int, workers: int, rounds: int) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return typical(run_crew(workers, _work, port, parameters, rounds))


def _work(member: Member, port: int, parameters: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=member.index, world_size=member.count)
    model, base = make_model(parameters), make_model(parameters)
    inner = Drift(model, seed=member.index)
    outer = torch.optim.SGD(base.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(rounds):
        inner.step()
        member.begin()
        with torch.no_grad():
            for theta, local in zip(base.parameters(), model.parameters(), strict=True):
                theta.grad = theta - local
                dist.all_reduce(theta.grad)
                theta.grad /= member.count
            outer.step()
            for theta, local in zip(base.parameters(), model.parameters(), strict=True):
                local.copy_(theta)
        member.end()
