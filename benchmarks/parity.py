"""Validation loss at equal tokens: data parallel, DiLoCo in its forms, codecs, workers that fail or are slow.

    python benchmarks/parity.py [--json] [--only NAME] [--steps N] [--jobs N] [--fresh]

Each run trains a byte-level GPT of 0.47 M parameters from scratch on the standard library's source, by the server's
and the hook's own code, in one process and in virtual time: so a run is repeatable to the bit, and slow workers cost
nothing. `--steps` (800) is the inner steps of each of four workers; runs with other numbers of workers see as many
tokens in total. `--only` runs one case and prints it.

All runs together (40) take about 80 minutes of one core; `--jobs` (2) share them. Their results go to
benchmarks/results/parity.json as they come, and runs found there are not made again, unless `--fresh`. From them
docs/results/parity.md and parity.png are made. The list's entries have the keys name, settings, seed, loss (nats a
byte), tokens, bytes_up and bytes_down (of frames, mean of the workers, first download and seed included), bits_up and
bits_down (wire bits a parameter of contributions and updates), rounds. With --json the last line is one JSON object:
the mean loss of each case by name.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

from comparison.cases import CASES, Case
from comparison.report import mean_losses, write_report
from comparison.runs import Result, run
from comparison.trainer import Texts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "parity.json"

Job = tuple[Case, int, int]


def work(job: Job) -> Result:
    """One run, in a process of its own."""
    case, seed, steps = job
    return run(case, seed, steps, Texts())


def jobs_of(cases: tuple[Case, ...], steps: int, done: list[Result]) -> list[Job]:
    """What is still to be run; the first seeds of all cases first."""
    have = {(r["name"], r["seed"], r["settings"]["steps"]) for r in done}
    jobs = [(case, seed, steps) for case in cases for seed in case.seeds]
    return sorted((j for j in jobs if (j[0].name, j[1], steps) not in have), key=lambda j: j[1])


def results_of(jobs: list[Job], processes: int) -> Iterator[Result]:
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(work, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    names = [c.name for c in CASES]
    parser.add_argument("--only", metavar="NAME", choices=names, help="run this case and keep nothing")
    parser.add_argument("--steps", type=int, default=800, help="inner steps of each of four workers")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--fresh", action="store_true", help="make every run again")
    options = parser.parse_args()
    cases = tuple(c for c in CASES if options.only in (None, c.name))
    keep = options.only is None
    results: list[Result] = []
    if keep and RESULTS.exists() and not options.fresh:
        results = [r for r in json.loads(RESULTS.read_text()) if r["settings"]["steps"] == options.steps]
    for result in results_of(jobs_of(cases, options.steps, results), options.jobs):
        print(f"{result['name']:20} seed {result['seed']}  loss {result['loss']:.4f}", flush=True)
        results.append(result)
        if keep:
            results.sort(key=lambda r: (names.index(r["name"]), r["seed"]))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text("[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n")
    if keep:
        write_report(results, ROOT / "docs" / "results")
    if options.json:
        print(json.dumps(mean_losses(results)))


if __name__ == "__main__":
    main()
