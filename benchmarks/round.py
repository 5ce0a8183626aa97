"""One complete round: every worker captures, encodes and pushes, the server commits, every worker pulls and applies.

    python benchmarks/round.py [--sizes 25,100] [--workers 4] [--rounds N] [--large] [--json]

Server and workers are processes of their own on this machine; H = P = 1 and τ = 0, so that an inner step is a round of
the whole model. A round lasts from the moment that all workers have made their step until the last one holds θ. Against

- raw: the same bytes over bare gRPC streams of 1 MiB messages, up from all at once and then down to all, and the time
  that this disk takes to write what came up to one file and to sync it;
- gloo: DiLoCo written by hand: an all-reduce in float32 between as many processes, torch's SGD as outer optimizer.

With --large a last part compares 2 workers at 25, 100 and 400 million parameters: time and memory are to grow in a
straight line. With --json the last line is one JSON object; N is the size in millions:

    round_N, round_snapshots_N   seconds, with the default journal, and with --durability snapshots
    raw_N, disk_N, gloo_N        seconds
    over_raw_N                   round_N / (raw_N + disk_N); at most 1.5 is wanted
    gloo_over_snapshots_N        gloo_N / round_snapshots_N; at least 2 is wanted at 100
    gloo_over_round_N            gloo_N / round_N; at least 1 is wanted
    rss_N, rss_bound_N           bytes: the most that the server had, and 12 a parameter, the open round, and 200 MB
    large_N, large_rss_N         with --large: seconds and bytes of 2 workers
    line_100, line_400           with --large: seconds a parameter, over those at 25 million
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from one_round import gloo, ours, raw
from rich.console import Console
from rich.table import Table

MB = 1e6
ALLOWANCE = 200e6
"""Bytes beside the model and the open round."""


def compare(millions: int, workers: int, rounds: int) -> dict[str, float]:
    """All of one size."""
    parameters = millions * 1_000_000
    kept = ours.measure(parameters, workers, rounds)
    loose = ours.measure(parameters, workers, rounds, durability="snapshots")
    bare = raw.measure(kept.bytes_up, kept.bytes_down, workers, rounds)
    with tempfile.TemporaryDirectory(prefix="diloco-disk-") as folder:
        disk = raw.disk_seconds(kept.bytes_up * workers, Path(folder))
    by_hand = gloo.measure(parameters, workers, rounds)
    return {
        f"round_{millions}": kept.seconds,
        f"round_snapshots_{millions}": loose.seconds,
        f"raw_{millions}": bare,
        f"disk_{millions}": disk,
        f"gloo_{millions}": by_hand,
        f"over_raw_{millions}": kept.seconds / (bare + disk),
        f"gloo_over_snapshots_{millions}": by_hand / loose.seconds,
        f"gloo_over_round_{millions}": by_hand / kept.seconds,
        f"rss_{millions}": kept.server_rss,
        f"rss_bound_{millions}": 12 * parameters + workers * parameters * 33 / 64 + ALLOWANCE,
    }


def straight(rounds: int) -> dict[str, float]:
    """Whether two workers take four times as long, and as much memory, for four times as many parameters."""
    found: dict[str, float] = {}
    for millions in (25, 100, 400):
        one = ours.measure(millions * 1_000_000, 2, rounds)
        found[f"large_{millions}"], found[f"large_rss_{millions}"] = one.seconds, one.server_rss
    for millions in (100, 400):
        found[f"line_{millions}"] = found[f"large_{millions}"] / found["large_25"] * 25 / millions
    return found


def show(found: dict[str, float], sizes: list[int], workers: int) -> None:
    table = Table("million parameters", *map(str, sizes), title=f"seconds a round, {workers} workers")
    rows = {
        "diloco": "round",
        "diloco, --durability snapshots": "round_snapshots",
        "raw gRPC": "raw",
        "disk": "disk",
        "gloo by hand": "gloo",
        "diloco / (raw + disk)": "over_raw",
        "gloo / diloco": "gloo_over_round",
        "gloo / diloco, snapshots": "gloo_over_snapshots",
    }
    for title, key in rows.items():
        table.add_row(title, *(f"{found[f'{key}_{size}']:.2f}" for size in sizes))
    for title, key in {"server's memory, MB": "rss", "its bound, MB": "rss_bound"}.items():
        table.add_row(title, *(f"{found[f'{key}_{size}'] / MB:.0f}" for size in sizes))
    console = Console()
    console.print(table)
    if "line_400" in found:
        table = Table("2 workers, million parameters", "25", "100", "400")
        table.add_row("seconds a round", *(f"{found[f'large_{m}']:.2f}" for m in (25, 100, 400)))
        table.add_row("server's memory, MB", *(f"{found[f'large_rss_{m}'] / MB:.0f}" for m in (25, 100, 400)))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="25,100", help="millions of parameters")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="the first is not counted")
    parser.add_argument("--large", action="store_true", help="400 million parameters as well, with 2 workers; 16 GiB")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    found: dict[str, float] = {}
    for size in sizes:
        found |= compare(size, options.workers, options.rounds)
    if options.large:
        found |= straight(options.rounds)
    show(found, sizes, options.workers)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
