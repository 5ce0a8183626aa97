"""What a worker has done and spent: for its statistics and for the heartbeats of its session."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from diloco_proto import outer_pb2 as pb

from .counters import Counters
from .notice import Notice
from .replica import Replica
from .stats import Spent, Stats


class Tally:
    """Of this process, and of those that it has resumed. Written by the training thread, read by any."""

    def __init__(self, counters: Counters) -> None:
        self.notice: Notice | None = None
        self._counters = counters
        self._replica: Replica | None = None
        self._loss: float | None = None
        self._began = time.monotonic()
        self._ended: float | None = None
        self._stall_seconds = 0.0
        self._waiting_since: float | None = None
        self._former = Spent()
        self._former_steps = self._former_tokens = 0

    def begin(self, replica: Replica) -> None:
        """The training begins."""
        self._replica, self._began = replica, time.monotonic()

    def resume(self, former: Spent) -> None:
        """Count on from what former processes have spent; the replica has resumed already."""
        assert self._replica is not None
        self._former = former
        self._former_steps, self._former_tokens = self._replica.taken, self._replica.tokens

    def end(self) -> None:
        self._ended = time.monotonic()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Count the time within as stalled, also while it lasts."""
        self._waiting_since = began = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None
            self._stall_seconds += time.monotonic() - began

    def note(self, tokens: int | None, loss: float | None) -> None:
        """Of an inner step."""
        if tokens is not None:
            assert self._replica is not None
            self._replica.report(tokens)
        if loss is not None:
            self._loss = loss

    @property
    def notice_left(self) -> float | None:
        """Seconds left until this machine is taken away; None while there was no notice."""
        return None if self.notice is None else self.notice.left

    @property
    def spent(self) -> Spent:
        """By all processes."""
        return self._former + self._here

    @property
    def _here(self) -> Spent:
        """By this process alone."""
        now = self._ended or time.monotonic()
        waiting_since = self._waiting_since
        return Spent(
            stall_seconds=self._stall_seconds + (now - waiting_since if waiting_since else 0.0),
            train_seconds=now - self._began,
            bytes_up=self._counters.bytes_up,
            bytes_down=self._counters.bytes_down,
            contribution_bytes=self._counters.contribution_bytes,
            contribution_parameters=self._counters.contribution_parameters,
            update_bytes=self._counters.update_bytes,
            update_parameters=self._counters.update_parameters,
        )

    @property
    def stats(self) -> Stats:
        spent, replica = self.spent, self._replica
        return Stats(
            steps=replica.taken if replica else 0,
            rounds=replica.rounds if replica else 0,
            counted=replica.counted if replica else 0,
            not_counted=replica.not_counted if replica else 0,
            stall_seconds=spent.stall_seconds,
            train_seconds=spent.train_seconds,
            bytes_up=spent.bytes_up,
            bytes_down=spent.bytes_down,
            bits_up=_bits(spent.contribution_bytes, spent.contribution_parameters),
            bits_down=_bits(spent.update_bytes, spent.update_parameters),
        )

    def beat(self) -> pb.Heartbeat:
        here, replica = self._here, self._replica
        return pb.Heartbeat(
            step=replica.global_step if replica else 0,
            tokens=max(0, replica.tokens - self._former_tokens) if replica else 0,
            loss=self._loss,
            stall_seconds=here.stall_seconds,
            bytes_up=here.bytes_up,
            bytes_down=here.bytes_down,
            train_seconds=here.train_seconds,
            steps=max(0, replica.taken - self._former_steps) if replica else 0,
        )


def _bits(size: int, parameters: int) -> float:
    return 8 * size / parameters if parameters else 0.0
