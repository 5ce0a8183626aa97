"""Many simulated runs, on several processes, and one report of them all."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from .world import Outcome, simulate

AT_A_TIME = 50
"""Runs that a process is given at once."""


@dataclass(slots=True)
class Report:
    """Of many runs."""

    schedules: int = 0
    seconds: float = 0.0
    """Virtual."""
    commits: int = 0
    fewest_events: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    """All kinds, faults included."""
    answers: Counter[str] = field(default_factory=Counter)
    """To contributions."""
    broken: list[tuple[int, int, str]] = field(default_factory=list)
    """(seed, promise, text)."""

    def add(self, outcome: Outcome) -> None:
        count = outcome.events.total()
        self.fewest_events = min(count, self.fewest_events) if self.schedules else count
        self.schedules += 1
        self.seconds += outcome.seconds
        self.commits += outcome.commits
        self.faults += outcome.faults
        self.events += outcome.events
        self.answers += outcome.answers
        if outcome.broken is not None:
            self.broken.append((outcome.seed, outcome.broken.promise, str(outcome.broken)))

    def as_json(self) -> dict[str, Any]:
        return {
            "schedules": self.schedules,
            "virtual_hours": round(self.seconds / 3600, 3),
            "outer_steps": self.commits,
            "events": self.events.total(),
            "fewest_events": self.fewest_events,
            "faults": dict(self.faults.most_common()),
            "events_by_kind": dict(self.events.most_common()),
            "answers_to_contributions": dict(self.answers.most_common()),
            "broken": [{"seed": seed, "promise": promise, "text": text} for seed, promise, text in self.broken],
        }


def simulate_all(first: int, count: int, jobs: int) -> Report:
    """Runs `first`, `first` + 1, … on so many processes."""
    report = Report()
    starts = range(first, first + count, AT_A_TIME)
    batches = [range(start, min(start + AT_A_TIME, first + count)) for start in starts]
    if jobs == 1:
        for batch in batches:
            _add_all(report, _batch(batch))
        return report
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for outcomes in pool.map(_batch, batches):
            _add_all(report, outcomes)
    return report


@contextmanager
def silence() -> Iterator[None]:
    """What workers and server log of thousands of runs helps nobody."""
    log = logging.getLogger("diloco")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _add_all(report: Report, outcomes: Iterable[Outcome]) -> None:
    for outcome in outcomes:
        report.add(outcome)


def _batch(seeds: Iterable[int]) -> list[Outcome]:
    with silence():
        outcomes = [simulate(seed) for seed in seeds]
    gc.collect()
    return outcomes
