"""A straight line through measurements, in the number of workers n and of parameters p."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TERMS = ("fixed", "per_worker", "per_parameter", "per_both")


@dataclass(frozen=True)
class Point:
    workers: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """seconds = fixed + per_worker·n + per_parameter·p + per_both·n·p"""

    fixed: float
    per_worker: float
    per_parameter: float
    per_both: float

    def seconds(self, workers: float, parameters: float) -> float:
        n, p = workers, parameters
        return self.fixed + self.per_worker * n + self.per_parameter * p + self.per_both * n * p

    def workers(self, seconds: float, parameters: float) -> float:
        """As many as so much time is enough for."""
        left = seconds - self.fixed - self.per_parameter * parameters
        each = self.per_worker + self.per_both * parameters
        return max(0.0, left / each) if each else float("inf")

    def error(self, points: Sequence[Point]) -> float:
        """The median of the relative errors."""
        return statistics.median(abs(self.seconds(p.workers, p.parameters) / p.seconds - 1) for p in points)


def fit(points: Sequence[Point]) -> Line:
    """By least squares of the relative error. No coefficient is below 0: the most negative one is left out until none
    is."""
    n, p, y = np.array([(q.workers, q.parameters, q.seconds) for q in points], float).T
    columns = np.stack([np.ones_like(n), n, p, n * p], axis=1) / y[:, None]
    scale = columns.max(axis=0)
    kept = list(range(len(TERMS)))
    while True:
        found, *_ = np.linalg.lstsq(columns[:, kept] / scale[kept], np.ones_like(y), rcond=None)
        if (found >= 0).all():
            break
        del kept[int(found.argmin())]
    values = dict.fromkeys(TERMS, 0.0) | {TERMS[i]: float(v / scale[i]) for i, v in zip(kept, found, strict=True)}
    return Line(**values)
