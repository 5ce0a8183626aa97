"""What a round costs the server, by workers and parameters, and where a small machine's limit lies.

    python benchmarks/scale.py [--workers 1,4,16,64] [--millions 1,4,16] [--rounds 5] [--processes 2] [--json]
                               [--cores 2] [--gbit 1] [--memory 8] [--period 25]

The server is a process of its own with a journal, as by default. The workers are bare messages from a few processes:
they push int4, wait for their fates, pull the updates, and compute nothing. The model has 4 fragments, and a round
here is one of each. It lasts from the moment that all workers begin until the last one holds the last update; on
few cores most of that is the workers' own. The server's CPU time is its alone, all threads, in user and kernel mode.

The line is fitted by least squares of the relative error, with no coefficient below 0:

    seconds = fixed + per_worker·n + per_parameter·p + per_both·n·p

A machine with `--cores`, `--gbit` both ways and `--memory` GB has to do with n workers of p parameters, each period of
`--period` seconds (H inner steps: by default 100 of a quarter of a second), one round. It is full when the first of
these holds (12 bytes are θ, momentum and residual; beside them is what all workers have staged):

    CPU       cpu(n, p) = cores·period
    network   n·p·max(bits up, bits down) = gbit·period
    memory    12·p + n·p·(bits up)/8 + 200 MB = memory

With --json the last line is one JSON object; N is a number of workers, M millions of parameters:

    cpu_N_M, wall_N_M       seconds a round, medians
    rss_N_M                 bytes, the most that the server had
    cpu_fixed, cpu_per_worker, cpu_per_parameter, cpu_per_both        seconds
    wall_fixed, wall_per_worker, wall_per_parameter, wall_per_both    seconds
    cpu_error, wall_error   median relative error of the line
    bits_up, bits_down      wire bits a parameter and round, of one worker
    full_M                  workers at which the machine is full
    full_by_M               what it is full by: cpu, network or memory
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass

from common.crew import Member, run_members, seconds_of
from common.line import TERMS, Line, Point, fit
from common.server import cpu_seconds, peak_rss, serving
from crowd import Crowd, settings
from rich.console import Console
from rich.table import Table

import diloco_client

FRAGMENTS = 4
QUESTIONS = (25, 100, 400, 1000)
"""Millions of parameters for which the limit is told."""

ALLOWANCE = 200e6
"""Bytes that a server takes beside the model and the open round."""

LEAST = 0.01
"""Seconds: CPU time is not told finer."""


@dataclass(frozen=True)
class Cell:
    """So many workers on so many parameters."""

    workers: int
    parameters: int
    cpu: float
    """Seconds of the server a round."""
    wall: float
    rss: int
    bits_up: float
    bits_down: float


@dataclass(frozen=True)
class Machine:
    """A server's machine, and how often it has a round to make."""

    cores: float
    gbit: float
    memory: float
    """GB."""
    period: float
    """Seconds."""

    def full(self, cpu: Line, bits_up: float, bits_down: float, parameters: float) -> tuple[str, float]:
        """By what it is full first, and at how many workers."""
        most = {
            "cpu": cpu.workers(self.cores * self.period, parameters),
            "network": self.gbit * 1e9 * self.period / (parameters * max(bits_up, bits_down)),
            "memory": max(0.0, (self.memory * 1e9 - ALLOWANCE - 12 * parameters) / (parameters * bits_up / 8)),
        }
        first = min(most, key=lambda name: most[name])
        return first, most[first]


def measure(workers: int, parameters: int, rounds: int, processes: int) -> Cell:
    sizes = [parameters // FRAGMENTS] * FRAGMENTS
    with serving(*settings(sizes, workers)) as (server, _):
        pid = server.process.pid
        members = run_members(min(processes, workers), _work, server.address, pid, sizes, workers, rounds)
        update = sum(f["update_bytes"] for f in diloco_client.status(server.address)["fragments"])
        cpu, encoded = members[0].notes
        return Cell(
            workers,
            sum(sizes),
            cpu=cpu,
            wall=statistics.median(seconds_of(members)),
            rss=peak_rss(pid),
            bits_up=8 * encoded / sum(sizes),
            bits_down=8 * update / sum(sizes),
        )


def _work(member: Member, address: str, server: int, sizes: list[int], workers: int, rounds: int) -> None:
    """This process's share of the workers."""
    count = workers // member.count + (member.index < workers % member.count)
    with Crowd(address, sizes, count, part=member.index, seeded=member.barrier.wait) as crowd:
        crowd.round()  # the first one touches new memory
        used = []
        for _ in range(rounds):
            member.begin()
            began = cpu_seconds(server)
            crowd.round()
            member.end()
            member.barrier.wait()  # until the last one is done
            used.append(cpu_seconds(server) - began)
        member.notes += [statistics.mean(used), crowd.encoded_bytes]


def lines_of(cells: list[Cell]) -> dict[str, Line]:
    """By "cpu" and "wall"."""
    return {
        name: fit([Point(c.workers, c.parameters, max(getattr(c, name), LEAST)) for c in cells])
        for name in ("cpu", "wall")
    }


def results(cells: list[Cell], machine: Machine) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for c in cells:
        name = f"{c.workers}_{c.parameters / 1e6:g}"
        found |= {f"cpu_{name}": c.cpu, f"wall_{name}": c.wall, f"rss_{name}": c.rss}
    for name, line in lines_of(cells).items():
        points = [Point(c.workers, c.parameters, max(getattr(c, name), LEAST)) for c in cells]
        found |= {f"{name}_{term}": getattr(line, term) for term in TERMS} | {f"{name}_error": line.error(points)}
    largest = max(cells, key=lambda c: c.parameters)
    found |= {"bits_up": largest.bits_up, "bits_down": largest.bits_down}
    for millions in QUESTIONS:
        by, most = machine.full(lines_of(cells)["cpu"], largest.bits_up, largest.bits_down, millions * 1e6)
        found |= {f"full_{millions}": int(most), f"full_by_{millions}": by}
    return found


def show(cells: list[Cell], found: dict[str, float | str], machine: Machine) -> None:
    console = Console()
    table = Table("workers", "million parameters", "server's CPU, s", "wall, s", "memory, MB", title="a round")
    for c in cells:
        row = (f"{c.parameters / 1e6:g}", f"{c.cpu:.3f}", f"{c.wall:.3f}", f"{c.rss / 1e6:.0f}")
        table.add_row(str(c.workers), *row)
    console.print(table)
    table = Table("", "fixed, ms", "a worker, ms", "a M parameters, ms", "both, ms", "error", title="the line")
    for name in ("cpu", "wall"):
        fixed, worker, parameter, both = (float(found[f"{name}_{term}"]) for term in TERMS)
        shown = (1e3 * fixed, 1e3 * worker, 1e9 * parameter, 1e9 * both)
        table.add_row(name, *(f"{value:.3g}" for value in shown), f"{float(found[f'{name}_error']):.0%}")
    console.print(table)
    title = f"{machine.cores:g} cores, {machine.gbit:g} Gbit/s, {machine.memory:g} GB, {machine.period:g} s a round"
    table = Table("million parameters", "full at workers", "by", title=title)
    for millions in QUESTIONS:
        table.add_row(str(millions), str(found[f"full_{millions}"]), str(found[f"full_by_{millions}"]))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,4,16,64")
    parser.add_argument("--millions", default="1,4,16", help="of parameters")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--processes", type=int, default=2, help="that share the workers")
    parser.add_argument("--cores", type=float, default=2, help="of the machine that is asked about")
    parser.add_argument("--gbit", type=float, default=1, help="a second, its network both ways")
    parser.add_argument("--memory", type=float, default=8, help="GB")
    parser.add_argument("--period", type=float, default=25, help="seconds in which each fragment is synchronised once")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    machine = Machine(options.cores, options.gbit, options.memory, options.period)
    cells = []
    for millions in map(float, options.millions.split(",")):
        for workers in map(int, options.workers.split(",")):
            cells.append(measure(workers, int(millions * 1e6), options.rounds, options.processes))
            print(f"{workers} workers, {millions:g} M parameters: {cells[-1].wall:.2f} s a round", flush=True)
    found = results(cells, machine)
    show(cells, found, machine)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
