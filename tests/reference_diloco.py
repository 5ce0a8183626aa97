"""Streaming DiLoCo in one process and plain torch: the oracle, small enough to check by eye."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ReferenceDiloco:
    """N replicas, an outer optimizer for each fragment, no codec. The caller makes the inner steps of all
    replicas and then calls `after_step(k)`, k counted from 1. `theta` holds the global parameters by name."""

    def __init__(self, replicas: Sequence[nn.Module], fragments: Sequence[Sequence[str]], *, sync_every: int,
                 overlap_steps: int = 0, mixing_alpha: float = 0.0, outer_lr: float = 0.7,
                 outer_momentum: float = 0.9) -> None:  # fmt: skip
        self.locals: list[dict[str, Tensor]] = [dict(replica.named_parameters()) for replica in replicas]
        self.theta = {name: p.detach().clone() for name, p in self.locals[0].items()}
        self.fragments, self.H, self.tau, self.alpha = fragments, sync_every, overlap_steps, mixing_alpha
        self.outer = [
            torch.optim.SGD([self.theta[n] for n in names], lr=outer_lr, momentum=outer_momentum,
                            nesterov=outer_momentum > 0)
            for names in fragments
        ]  # fmt: skip
        self.pushed: dict[int, dict[str, Tensor]] = {}  # fragment -> mean outer gradient in flight

    def after_step(self, k: int) -> None:
        """What is due after inner step k. Fragment p: apply at floor((p+1)H/P), push τ steps earlier."""
        for p in range(len(self.fragments)):
            offset = (p + 1) * self.H // len(self.fragments)
            if (k + self.tau - offset) % self.H == 0:
                self.push(p)
            if (k - offset) % self.H == 0 and p in self.pushed:
                self.apply(p, self.alpha)

    @torch.no_grad()
    def push(self, p: int) -> None:
        deltas = {n: [self.theta[n] - x[n] for x in self.locals] for n in self.fragments[p]}
        self.pushed[p] = {n: torch.stack(each).mean(0) for n, each in deltas.items()}

    @torch.no_grad()
    def apply(self, p: int, alpha: float) -> None:
        for name, delta in self.pushed.pop(p).items():
            self.theta[name].grad = delta
        self.outer[p].step()
        for x in self.locals:
            for n in self.fragments[p]:
                x[n].copy_(alpha * x[n] + (1 - alpha) * self.theta[n])

    def flush(self) -> None:
        """Settles what is in flight, then pushes what is left of every fragment and adopts the result."""
        for p in sorted(self.pushed):
            self.apply(p, self.alpha)
        for p in range(len(self.fragments)):
            self.push(p)
            self.apply(p, 0.0)
