"""How a worker has fared."""

from __future__ import annotations

from dataclasses import dataclass


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
