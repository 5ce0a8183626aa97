"""How a worker has fared."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot of one worker's counters since it joined."""

    steps: int
    """Inner steps taken."""
    rounds: int
    """Global fragments merged."""
    counted: int
    """Contributions that were counted."""
    not_counted: int
    """Contributions that came too late for their round; their work stayed in the parameters."""
    stall_seconds: float
    """Time in which the training thread waited: for the network, or for other workers."""
    train_seconds: float
    """Time since the run opened for this worker."""
    bytes_up: int
    """Bytes of all messages sent, the seed included."""
    bytes_down: int
    """Bytes of all messages received, the first download included."""
    bits_up: float
    """Wire bits a parameter and contribution: codes, scales, frames and messages."""
    bits_down: float
    """Wire bits a parameter and update, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What adds up over the processes of a worker that is resumed; see Stats and Counters."""

    stall_seconds: float = 0.0
    train_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    contribution_bytes: int = 0
    contribution_parameters: int = 0
    update_bytes: int = 0
    update_parameters: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Spent)})
