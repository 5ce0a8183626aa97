"""Streaming DiLoCo in plain Python floats: k workers, P fragments of one number each. Small enough to check by eye.

Written from the papers alone (arXiv 2311.08105, 2501.18512; delayed Nesterov 2401.09135) and the rules of the run:
tokens as weights, at most twice their median; staleness s weighs (1 + s)^-1/2, relative to the running median.
"""

from dataclasses import dataclass
from statistics import median

INNER_LR = 0.25
START = (1.0, -0.5, 2.0, 0.25)  # of each fragment; all numbers have few binary digits, so that float32 rounds little
TARGETS = ((1.0, -2.0, 0.5, 3.0, -1.5), (-0.75, 1.25, 2.5, -3.0, 0.5), (2.0, 2.0, -1.0, 0.25, -2.75))


def target(worker: int, fragment: int, step: int) -> float:
    return TARGETS[worker][(step + fragment) % 5]


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 24
    workers: int = 2
    sync_every: int = 8
    num_fragments: int = 1
    overlap_steps: int = 0
    mixing_alpha: float = 0.0
    outer_optimizer: str = "nesterov"
    outer_lr: float = 0.75
    outer_momentum: float = 0.875
    delay_buffer: int = 1
    tokens: tuple[tuple[int, ...], ...] = ()  # of each worker in inner steps 1, 2, … and over again; () is uniform
    curvature: float = 1.0  # inner steps are gradient descent on curvature/2 · x² - target · x


class PlainDiloco:
    def __init__(self, settings: Settings) -> None:
        self.s, self.k, P = settings, 0, settings.num_fragments
        self.local = [list(START[:P]) for _ in range(settings.workers)]
        self.base = list(START[:P])  # θ as the workers hold it
        self.versions = [[x] for x in START[:P]]  # θ as the server has had it
        self.momentum, self.buffer, self.sizes = [0.0] * P, [0.0] * P, [[] for _ in range(P)]
        self.tokens = [[0] * settings.workers for _ in range(P)]  # since the fragment's last push
        self.since = [None] * P  # version of the base when the first of those steps was taken
        self.flying = set()  # pushed, not yet applied

    def advance(self) -> tuple[list[int], list[int]]:
        """One inner step of every worker, and what is due after it: which fragments were pushed, which applied."""
        s, self.k = self.s, self.k + 1
        for p in range(s.num_fragments):
            if self.since[p] is None:
                self.since[p] = len(self.versions[p]) - 1 - (p in self.flying)
            for w, x in enumerate(self.local):
                x[p] -= INNER_LR * (s.curvature * x[p] - target(w, p, self.k))
                self.tokens[p][w] += s.tokens[w][(self.k - 1) % len(s.tokens[w])] if s.tokens else 1
        pushed = self.due(self.k + s.overlap_steps)
        for p in pushed:
            self.push(p)
        applied = [p for p in self.due(self.k) if p in self.flying]
        for p in applied:
            self.apply(p)
        return pushed, applied

    def due(self, k: int) -> list[int]:
        H, P = self.s.sync_every, self.s.num_fragments
        return [p for p in range(P) if (k - (p + 1) * H // P) % H == 0]

    def push(self, p: int) -> None:
        """Δ = θ_base - θ_local of every worker; the server makes its outer step of them."""
        deltas = [self.base[p] - x[p] for x in self.local]
        outer = self.delayed_step if self.s.outer_optimizer == "delayed-nesterov" else self.step_on_mean
        self.versions[p].append(self.versions[p][-1] - self.s.outer_lr * outer(p, deltas))
        self.tokens[p], self.since[p] = [0] * self.s.workers, None
        self.flying.add(p)

    def step_on_mean(self, p: int, deltas: list[float]) -> float:
        weights = [min(n, 2 * median(self.tokens[p])) if self.s.tokens else 1 for n in self.tokens[p]]
        mean = sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
        if self.s.outer_optimizer == "sgd":
            return mean
        self.momentum[p] = self.s.outer_momentum * self.momentum[p] + mean
        return mean + self.s.outer_momentum * self.momentum[p]

    def delayed_step(self, p: int, deltas: list[float]) -> float:
        """Every push is a step; the momentum moves with every N-th. Of one worker: others' steps would come between."""
        (delta,), staleness = deltas, len(self.versions[p]) - 1 - self.since[p]
        self.sizes[p].append((self.tokens[p][0] if self.s.tokens else 1) / (1 + staleness) ** 0.5)
        share = min(2, self.sizes[p][-1] / median(self.sizes[p])) * delta / self.s.delay_buffer
        self.buffer[p] += share
        if len(self.versions[p]) % self.s.delay_buffer:
            return share
        self.momentum[p], self.buffer[p] = self.s.outer_momentum * self.momentum[p] + self.buffer[p], 0.0
        return share + self.s.outer_momentum * self.momentum[p]

    def apply(self, p: int) -> None:
        """τ steps after the push: local ← α·local + (1 - α)·θ."""
        self.flying.remove(p)
        theta = self.base[p] = self.versions[p][-1]
        for x in self.local:
            x[p] = self.s.mixing_alpha * x[p] + (1 - self.s.mixing_alpha) * theta
