"""The public API: `join` hooks a torch training loop into a run.

The training thread does three things: after an inner step it copies the fragment that is due (capture), it
merges the global fragment that is due (apply), and it waits if that has not arrived (stall). All else
happens on the courier's threads. The schedule is Streaming DiLoCo's (arXiv 2501.18512).
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import record_function

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import digest
from diloco_proto.errors import ConnectionClosed, DilocoError, ServerUnreachable
from diloco_proto.schedule import Schedule

from .binding import Binding
from .link import Link, Shard
from .replica import Replica, Rules
from .stats import Stats
from .transport import Transport

log = logging.getLogger("diloco")

FLUSH_PATIENCE = 60.0
"""Seconds that `flush` waits for a server that is out of reach."""


def join(
    address: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    worker_id: str | None = None,
    connect_timeout: float = 120.0,
) -> Outer:
    """Join the run that the diloco-server at `address` (HOST:PORT) owns, and hook `optimizer.step()`.

    Blocks until the run is open (its `min_workers` have joined); then the model's parameters are the global ones.
    The first worker's parameters become the run's, unless the server was given some. With several optimizers an
    inner step is over when the last one in the list has stepped.

    `worker_id` names this worker; the same name in two live processes makes the older one stop. It defaults to
    host name, process id and a random suffix. `connect_timeout` (seconds) bounds the wait for the server to answer.

    Raises InvalidAddress, ServerUnreachable, UnsupportedModel, MasterWeights, ManifestMismatch (naming the first
    tensor that differs) or another DilocoError. Use the result in a `with` block; leaving it flushes.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    if not optimizers or not all(isinstance(o, torch.optim.Optimizer) for o in optimizers):
        raise TypeError("join(address, model, optimizer): optimizer must be a torch optimizer or a list of them")
    try:
        binding = Binding(model, optimizers)
        return Outer(Transport(address), binding, optimizers, worker_id or _default_id(), connect_timeout)
    except DilocoError as error:
        # What it says is for whoever runs the script: the way it took through threads and gRPC only hides it.
        raise error.with_traceback(None) from None


class Outer:
    """A worker's part in a run, from `join` to the end of the `with` block.

    Not thread safe: call it from the thread that trains.
    """

    def __init__(
        self,
        transport: Transport,
        binding: Binding,
        optimizers: Sequence[torch.optim.Optimizer],
        worker_id: str,
        connect_timeout: float,
    ) -> None:
        self._transport = transport
        self._binding = binding
        self._replica: Replica | None = None
        self._loss: float | None = None
        self._joined_at = time.monotonic()
        self._stall_seconds = 0.0
        self._closed = False
        self._closed_at: float | None = None
        self._finishing = False
        self._flushed = False
        self._waiting_since: float | None = None
        self._pid = os.getpid()
        self._link = Link(transport, binding, worker_id, self._beat)
        try:
            start_step = self._link.join(connect_timeout)
        except BaseException:
            self._link.close("could not join")
            raise
        settings = self._link.settings
        self._courier = self._link.courier
        layout = self._link.layout
        buffers = layout.num_scheduled > layout.num_trained
        rules = Rules(
            schedule=Schedule(settings.sync_every, layout.num_trained, settings.overlap_steps, buffers),
            alpha=settings.mixing_alpha,
            error_feedback=settings.error_feedback,
        )
        self._check_every = settings.sync_every
        self._replica = Replica(layout, rules, binding, self._courier, start_step)
        self._joined_at = time.monotonic()
        self._hook = optimizers[-1].register_step_post_hook(self._after_step)
        log.info("joined run %s at %s as %s", self._link.run_id, transport.address, worker_id)

    # -- what the trainer asks --

    @property
    def stats(self) -> Stats:
        """How this worker has fared so far."""
        counters = self._transport.counters
        now = self._closed_at or time.monotonic()
        waiting_since, replica = self._waiting_since, self._replica
        return Stats(
            steps=replica.taken if replica else 0,
            rounds=replica.rounds if replica else 0,
            counted=replica.counted if replica else 0,
            not_counted=replica.not_counted if replica else 0,
            stall_seconds=self._stall_seconds + (now - waiting_since if waiting_since else 0.0),
            train_seconds=now - self._joined_at,
            bytes_up=counters.bytes_up,
            bytes_down=counters.bytes_down,
            bits_up=_bits(counters.contribution_bytes, counters.contribution_parameters),
            bits_down=_bits(counters.update_bytes, counters.update_parameters),
        )

    @property
    def worker_id(self) -> str:
        return self._link.worker_id

    @property
    def global_step(self) -> int:
        """Inner steps in the run's count: a worker that joins late begins where the run is, and one that was given
        a smaller H (`dynamic_local_updates`) advances as far a round as the others. For learning rate schedules."""
        return self._joined.global_step

    @property
    def shard(self) -> Shard:
        """This worker's share of the data, (index, count). The index is its own as long as it lives and when it
        comes back; the count grows when more workers join than there were, so look again from time to time, or
        start the server with `min_workers` as many as there will be."""
        return self._link.shard

    @property
    def should_stop(self) -> bool:
        """The run has had the rounds or tokens that it was to have (`stop_after_rounds`, `stop_after_tokens`):
        leave the training loop."""
        return bool(self._link.stopped)

    def report(self, *, tokens: int | None = None, loss: float | None = None) -> None:
        """Tell of an inner step, before its `optimizer.step()`: how many tokens (or examples) it trains on, and its
        loss.

        Contributions are weighed by tokens, or by inner steps in a run where nobody reports them; the loss is shown
        by `diloco-client status`. Raises ValueError for less than one token.
        """
        if tokens is not None:
            if tokens < 1:
                raise ValueError(f"report(tokens={tokens}): an inner step trains on at least one token")
            self._joined.report(tokens)
        if loss is not None:
            self._loss = float(loss)

    def global_state_dict(self) -> dict[str, torch.Tensor]:
        """The model's `state_dict()` with the global parameters θ in it, as this worker last received them.

        Names and dtypes are the model's own; tensors are on the CPU. Evaluate and save these rather than the
        local parameters. After `flush` both are the same.
        """
        return self._binding.state_dict([base.theta for base in self._courier.bases])

    def base_digests(self) -> dict[int, int]:
        """Fragment -> 64-bit digest of this worker's base, to be compared with the server's status."""
        return {p: digest(base.theta) for p, base in enumerate(self._courier.bases)}

    def flush(self, *, together: bool = False) -> None:
        """End fully synchronised: what this worker still holds goes into the run, then its parameters become θ.

        With `together` it also waits until every live worker has flushed, so that all end on the same θ; call it
        so in every worker, or in none. Training may go on afterwards. Raises ServerUnreachable when the server
        stays away for FLUSH_PATIENCE seconds; the model keeps its local parameters then.
        """
        courier, replica = self._courier, self._joined
        if self._closed:
            raise ConnectionClosed("this worker has left the run; join again to flush")
        replica.push_remainders()
        self._wait_until(courier.staged)
        self._finishing = True
        self._link.finishing()
        while not courier.none_in_flight():
            self._wait_until(courier.anything_ready)
            replica.merge(early=True)
            replica.push_remainders()
        if together:
            self._link.finished()
            self._wait_until(self._link.everyone_finished)
        replica.merge(early=True)
        replica.adopt_all()
        self._flushed = True

    def close(self) -> None:
        """Leave the run without flushing; hooks are removed. Leaving the `with` block does it."""
        self._close("left")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._closed and not self._flushed:
                self.flush()
        finally:
            self._close("done" if kind is None else f"stopped by {kind.__name__}")

    def _close(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        self._closed_at = time.monotonic()
        self._hook.remove()
        self._link.close(reason)

    # -- after each inner step --

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if os.getpid() != self._pid:
            return  # a forked child of the trainer, such as a DataLoader worker
        self._courier.raise_fatal()
        if self._finishing:
            self._finishing = self._flushed = False
            self._link.ready()
        replica = self._joined
        if self._link.pace is not None:
            replica.set_pace(self._link.pace)
        if replica.taken % self._check_every == 0:
            self._binding.check_optimizers()
        for fragment in replica.advance():
            with self._stalled():
                self._courier.wait(fragment)
        replica.merge()

    @property
    def _joined(self) -> Replica:
        assert self._replica is not None
        return self._replica

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        with record_function("diloco::wait"), self._stalled():
            reached = self._courier.wait_until(condition, FLUSH_PATIENCE)
        if not reached:
            raise ServerUnreachable(
                f"the server at {self._transport.address} has been out of reach for {FLUSH_PATIENCE:.0f} s while "
                "this worker flushed; its parameters are the local ones"
            )

    @contextmanager
    def _stalled(self) -> Iterator[None]:
        """Count the time within as stalled, also while it lasts."""
        self._waiting_since = began = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None
            self._stall_seconds += time.monotonic() - began

    def _beat(self) -> pb.Heartbeat:
        stats = self.stats
        return pb.Heartbeat(
            step=self._replica.global_step if self._replica else 0,
            tokens=self._replica.tokens if self._replica else 0,
            loss=self._loss,
            stall_seconds=stats.stall_seconds,
            bytes_up=stats.bytes_up,
            bytes_down=stats.bytes_down,
            train_seconds=stats.train_seconds,
            steps=stats.steps,
        )


def _bits(size: int, parameters: int) -> float:
    return 8 * size / parameters if parameters else 0.0


def _default_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
