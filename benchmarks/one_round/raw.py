"""The floor: the same bytes over bare gRPC, up from all processes and then down to all; and a disk's rate."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from common.crew import Member, run_crew, typical
from common.raw import RawClient, messages, random_messages, raw_server


def measure(up: int, down: int, workers: int, rounds: int) -> float:
    """Seconds for `up` bytes from each of the workers and `down` bytes to each."""
    with raw_server() as port:
        return typical(run_crew(workers, _work, port, up, down, rounds))


def disk_seconds(size: int, folder: Path, times: int = 3) -> float:
    """To write so many bytes to one file and sync it; the median."""
    pool = random_messages()
    taken = []
    for _ in range(times):
        path = folder / "raw"
        began = time.monotonic()
        with path.open("wb", buffering=0) as file:
            for piece in messages(size, pool):
                file.write(piece)
            os.fsync(file.fileno())
        taken.append(time.monotonic() - began)
        path.unlink()
    return statistics.median(taken)


def _work(member: Member, port: int, up: int, down: int, rounds: int) -> None:
    with RawClient(port) as client:
        for _ in range(rounds):
            member.begin()
            client.push(up)
            member.barrier.wait()  # a round's update is there once all have pushed
            client.pull(down)
            member.end()
