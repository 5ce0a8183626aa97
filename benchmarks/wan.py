"""Workers far apart: the share of their time in which they compute, by link and settings of the run.

    python benchmarks/wan.py [--full] [--cells NAMES] [--links 1000,100,20] [--workers 2] [--at-once 4] [--json]
                             [--millions 25] [--step-seconds 0.25] [--round-trip 0.1]

Each worker has a link of its own to the server, through a process that delays all bytes by half of the round trip (100
ms) and lets a fixed number of Mbit/s pass each way. An inner step is a wait of `--step-seconds`, for which the
processor is idle as beside a GPU, and a small change of the parameters. By default that is a model of 25 M parameters
at a quarter of a second: 65,000 tokens a step on a GPU that does 40 TFLOP/s. What counts is parameters against seconds
a step, so a model of 250 M parameters at 2.5 s a step fares alike, and a little better. Workers join before the links
become long; then one period is measured, from the first step to the last merge. Server and workers share this machine.

The share is 1 − stall/time of the hook's own statistics. Against it stands the blocking synchronisation of all
parameters in fp32, both ways (P = 1, τ = 0): it is timed by itself, and its share is H·step/(H·step + seconds).

A last part has connections that stand still now and then, each by itself: for half a second, after two in the mean, as
a TCP stream does that lost a packet. fp32, H = 50, P = 4, τ = 5 over one data connection, and over four.

Some cells by default, some of them side by side; all 72 with --full, in an hour. With --json the last line is one
JSON object; C is int4 or fp32, M the link's Mbit/s, H, P, T the settings, N a number of connections:

    C_M_H_P_T            share of time computing; at least 0.99 is wanted at 100 Mbit/s where blocking_M_H is under 0.6
    blocking_M_H         the same of blocking synchronisation
    blocking_seconds_M   of one such synchronisation
    stalls_M_N           share of time computing with stalls, over N data connections
    relay_gbit_s         what a relay here carries at most, one way; a link has no more than half of it
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from common.links import Controls, links
from far_apart.cells import LINKS, PERIODS, Cell, blocking, every, named, some, stalling
from far_apart.run import Load, Outcome, run
from rich.console import Console
from rich.table import Table

STALLING = 100
"""Mbit/s of the link whose connections stall."""


def ceiling(nbytes: int = 256 << 20) -> float:
    """Gbit/s that a relay carries, without limit or delay, one way."""
    with socket.create_server(("127.0.0.1", 0)) as sink:
        swallowing = threading.Thread(target=_swallow, args=(sink,), daemon=True)
        swallowing.start()
        with links(sink.getsockname()[1], 1, Controls()) as (port,):
            with socket.create_connection(("127.0.0.1", port)) as source:
                piece = bytes(1 << 20)
                began = time.monotonic()
                for _ in range(0, nbytes, len(piece)):
                    source.sendall(piece)
                source.shutdown(socket.SHUT_WR)
                source.recv(1)
                taken = time.monotonic() - began
            swallowing.join()
    return 8 * nbytes / taken / 1e9


def _swallow(sink: socket.socket) -> None:
    connection, _ = sink.accept()
    with connection:
        while connection.recv(1 << 20):
            pass
        connection.sendall(b".")


def measure(cells: list[Cell], load: Load, at_once: int) -> dict[str, tuple[Cell, Outcome]]:
    """By name. The longest begin first."""

    def one(cell: Cell) -> tuple[Cell, Outcome]:
        outcome = run(cell, load)
        print(f"{cell.name}: {outcome.share:.3f}, {outcome.seconds:.2f} s stalled a merge", flush=True)
        return cell, outcome

    ordered = sorted(cells, key=lambda c: _expected(c, load), reverse=True)
    with ThreadPoolExecutor(at_once) as threads:
        return {cell.name: (cell, outcome) for cell, outcome in threads.map(one, ordered)}


def _expected(cell: Cell, load: Load) -> float:
    """Seconds, about."""
    bits = 2 * load.parameters * (32 if cell.codec == "fp32" else 3.2)
    return cell.rounds * (cell.period * load.step_seconds + bits / (cell.mbit * 1e6))


def flat(found: dict[str, tuple[Cell, Outcome]], load: Load) -> dict[str, float]:
    results: dict[str, float] = {}
    for name, (cell, outcome) in found.items():
        if not cell.blocking:
            results[name] = outcome.share
            continue
        results[f"blocking_seconds_{cell.mbit}"] = outcome.seconds
        for period in PERIODS:
            computing = period * load.step_seconds
            results[f"blocking_{cell.mbit}_{period}"] = computing / (computing + outcome.seconds)
    return results


def show(found: dict[str, tuple[Cell, Outcome]], results: dict[str, float]) -> None:
    columns = ("Mbit/s", "H", "P", "τ", "codec", "computing", "stalled a merge, s", "blocking fp32 computes")
    table = Table(*columns, title="share of time computing")
    order = sorted(found.values(), key=lambda f: (-f[0].mbit, f[0].codec, f[0].period, f[0].fragments, f[0].overlap))
    for cell, outcome in order:
        if cell.blocking or cell.stalls:
            continue
        settings = (cell.mbit, cell.period, cell.fragments, cell.overlap, cell.codec)
        against = results.get(f"blocking_{cell.mbit}_{cell.period}")
        shown = (f"{outcome.share:.1%}", f"{outcome.seconds:.2f}", "" if against is None else f"{against:.1%}")
        table.add_row(*map(str, settings), *shown)
    console = Console()
    console.print(table)
    table = Table("connections", "computing", "stalled a merge, s", title="connections that stall")
    for cell, outcome in found.values():
        if cell.stalls:
            table.add_row(str(cell.connections), f"{outcome.share:.1%}", f"{outcome.seconds:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every combination of H, P, τ and codec")
    parser.add_argument("--cells", metavar="NAMES", help="these instead, such as int4_100_50_4_5,blocking_100")
    parser.add_argument("--links", default=",".join(map(str, LINKS)), help="Mbit/s")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=4, help="runs side by side")
    parser.add_argument("--millions", type=float, default=25, help="of parameters")
    parser.add_argument("--step-seconds", type=float, default=0.25)
    parser.add_argument("--round-trip", type=float, default=0.1, help="seconds")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    load = Load(int(options.millions * 1e6), options.step_seconds, options.workers, options.round_trip / 2)
    most = ceiling()
    print(f"a relay carries {most:.1f} Gbit/s at most", flush=True)
    speeds = sorted({min(mbit, int(500 * most)) for mbit in map(int, options.links.split(","))}, reverse=True)
    if options.cells:
        cells = [named(name, load.parameters) for name in options.cells.split(",")]
    else:
        cells = [cell for mbit in speeds for cell in (every(mbit) if options.full else some(mbit))]
        cells += [blocking(mbit, load.parameters) for mbit in speeds]
        cells += [stalling(STALLING, count) for count in (1, 4)]
    found = measure(cells, load, options.at_once)
    results = flat(found, load) | {"relay_gbit_s": most}
    show(found, results)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
