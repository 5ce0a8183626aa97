"""A torch training loop, hooked into a run: what `join` gives.

The training thread does three things: after an inner step it copies the fragment that is due (capture), it
merges the global fragment that is due (apply), and it waits if that has not arrived (stall). All else
happens on the courier's threads. The schedule is Streaming DiLoCo's (arXiv 2501.18512).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import record_function

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import digest
from diloco_proto.errors import ConnectionClosed, DilocoError, RunMismatch, ServerUnreachable, StateMismatch
from diloco_proto.schedule import Schedule

from .binding import Binding
from .link import Link, Shard
from .notice import Notice
from .replica import Replica, Rules
from .resume import Saved, account, read, resume, save
from .stats import Spent, Stats
from .transport import Transport

log = logging.getLogger("diloco")

FLUSH_PATIENCE = 60.0
"""Seconds that `flush` waits for a server that is out of reach."""

NOTICE_SHARE = 0.8
"""Of the seconds from SIGTERM to the end: so long a worker waits for its last pushes. The rest is for its own end."""


class Outer:
    """A worker's part in a run, from `join` to the end of the `with` block.

    Not thread safe: call it from the thread that trains. Processes forked from it, such as DataLoader workers, may read
    its properties and nothing else: the threads and connections are those of this process.
    """

    def __init__(
        self,
        transport: Transport,
        binding: Binding,
        optimizers: Sequence[torch.optim.Optimizer],
        worker_id: str,
        connect_timeout: float,
        saved: Saved | None = None,
        sigterm_seconds: float | None = None,
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
        self._swapped = False
        self._waiting_since: float | None = None
        self._pid = os.getpid()
        self._spent = Spent()
        self._former_steps = self._former_tokens = 0
        self._notice: Notice | None = None
        self._link = Link(
            transport,
            binding,
            worker_id,
            self._beat,
            former_run=saved.run_id if saved else "",
            former_generation=saved.generation if saved else 0,
        )
        try:
            self._begin(self._link.join(connect_timeout))
            if saved is not None:
                self._resume(saved)
            if sigterm_seconds is not None:
                self._notice = Notice(sigterm_seconds)
                self._courier.hurried = lambda: self._notice is not None and self._notice.left is not None
        except RunMismatch as error:
            self._link.close("could not join")
            if saved is None:
                raise
            raise StateMismatch(f"{error}. To join that run with its global parameters leave the state out") from None
        except BaseException:
            self._link.close("could not join")
            raise
        self._hook = optimizers[-1].register_step_post_hook(self._after_step)
        log.info("joined run %s at %s as %s", self._link.run_id, transport.address, worker_id)

    def _begin(self, start_step: int) -> None:
        """The run is open, and counts `start_step` inner steps."""
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
        self._replica = Replica(layout, rules, self._binding, self._courier, start_step)
        account(self._link, self._replica)
        self._joined_at = time.monotonic()

    # -- what the trainer asks --

    @property
    def stats(self) -> Stats:
        """How this worker has fared so far, in the processes that this one resumed too."""
        spent, replica = self._spent + self._spent_here, self._replica
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

    @property
    def _spent_here(self) -> Spent:
        """By this process alone."""
        counters = self._transport.counters
        now = self._closed_at or time.monotonic()
        waiting_since = self._waiting_since
        return Spent(
            stall_seconds=self._stall_seconds + (now - waiting_since if waiting_since else 0.0),
            train_seconds=now - self._joined_at,
            bytes_up=counters.bytes_up,
            bytes_down=counters.bytes_down,
            contribution_bytes=counters.contribution_bytes,
            contribution_parameters=counters.contribution_parameters,
            update_bytes=counters.update_bytes,
            update_parameters=counters.update_parameters,
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
        """The run has had the rounds or tokens that it was to have (`stop_after_rounds`, `stop_after_tokens`), or this
        worker has left it on SIGTERM: leave the training loop."""
        return bool(self._link.stopped) or (self._notice is not None and self._notice.left is not None)

    def report(self, *, tokens: int | None = None, loss: float | torch.Tensor | None = None) -> None:
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
            self._loss = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)

    def global_state_dict(self) -> dict[str, torch.Tensor]:
        """The model's `state_dict()` with the global parameters θ in it, as this worker last received them.

        Names and dtypes are the model's own; tensors are on the CPU. Evaluate and save these rather than the
        local parameters. After `flush` both are the same.
        """
        self._must_be_its_process()
        return self._binding.state_dict([base.theta for base in self._courier.bases])

    @contextmanager
    def global_parameters(self) -> Iterator[None]:
        """Within the block the model holds the global parameters θ, as this worker last received them: to evaluate
        them, or to save them in the trainer's own way. Then it holds the local ones again, to the bit.

        The local values wait on their own device meanwhile. Raises RuntimeError for an inner step within the block: it
        would be lost.
        """
        self._must_be_its_process()
        if self._swapped:
            raise RuntimeError("global_parameters() within global_parameters(): the model holds them already")
        local = self._binding.local_values()
        self._swapped = True
        try:
            for fragment, base in enumerate(self._courier.bases):
                self._binding.adopt(fragment, base.theta)
            yield
        finally:
            self._binding.put_back(local)
            self._swapped = False

    def base_digests(self) -> dict[int, int]:
        """Fragment -> 64-bit digest of this worker's base, to be compared with the server's status."""
        self._must_be_its_process()
        return {p: digest(base.theta) for p, base in enumerate(self._courier.bases)}

    def state_dict(self) -> dict[str, Any]:
        """What this worker needs beside model and optimizer to go on after a crash as if there had been none: put it
        into the trainer's checkpoint, taken between two inner steps.

        Dictionaries of tensors (on the CPU, copies), numbers and strings, for torch.save, weights_only or not, and
        torch.distributed.checkpoint. It has the base of each fragment and the contribution under way: 4.5 bytes a
        parameter, 12.5 with error feedback. Waits for no network. Raises NonFiniteParameter if what was to be pushed
        cannot be.
        """
        self._must_be_its_process()
        return save(self._link, self._joined, self._binding, self._spent + self._spent_here)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave to a former process of this worker, before the first inner step.

        Load model and optimizer of the same checkpoint too, before or after `join`, but before this. What the run has
        not counted since stays in the local parameters; of fragments in which it has later work of this worker they
        become the global ones, and the residual of error feedback begins anew: nothing counts twice. diloco_client's
        `resume` has the rule. Until then a joined worker holds the parameters that joining replaced, in host memory;
        `join(..., state=...)` does the same without.

        Raises StateMismatch, and leaves everything as it is, for a state of another worker, run or model, for a
        damaged one, or when the model does not hold the parameters that go with it.
        """
        self._must_be_its_process()
        self._resume(read(state))

    def _resume(self, saved: Saved) -> None:
        resume(saved, self._link, self._joined, self._binding)
        self._spent = saved.spent
        self._former_steps, self._former_tokens = self._joined.taken, self._joined.tokens
        self._link.forget_replaced()

    def flush(self, *, together: bool = False) -> None:
        """End fully synchronised: what this worker still holds goes into the run, then its parameters become θ.

        With `together` it also waits until every live worker has flushed, so that all end on the same θ; call it
        so in every worker, or in none. Training may go on afterwards. Raises ServerUnreachable when the server
        stays away for FLUSH_PATIENCE seconds; the model keeps its local parameters then.
        """
        courier, replica = self._courier, self._joined
        self._must_be_its_process()
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
            if kind is None and not self._closed and not self._flushed and os.getpid() == self._pid:
                self.flush()
        finally:
            self._close("done" if kind is None else f"stopped by {kind.__name__}")

    def _close(self, reason: str) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._closed_at = time.monotonic()
        self._hook.remove()
        if self._notice is not None:
            self._notice.restore()
        self._link.forget_replaced()
        self._link.close(reason)

    # -- after each inner step --

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if os.getpid() != self._pid:
            return  # a forked child of the trainer, such as a DataLoader worker
        if self._swapped:
            raise RuntimeError("an inner step within outer.global_parameters(): leave the block before you train on")
        self._courier.raise_fatal()
        self._link.forget_replaced()
        if self._finishing:
            self._finishing = self._flushed = False
            self._link.ready()
        replica = self._joined
        self._heed_pace(replica)
        if replica.taken % self._check_every == 0:
            self._binding.check_optimizers()
        for fragment in replica.advance():
            with self._stalled():
                self._courier.wait(fragment)
        self._heed_pace(replica)  # it comes with the round that was waited for, and holds from this merge on
        replica.merge()
        if self._notice is not None and self._notice.left is not None:
            self._leave_on(self._notice)

    def _heed_pace(self, replica: Replica) -> None:
        if self._link.pace is not None:
            replica.set_pace(self._link.pace)

    def _leave_on(self, notice: Notice) -> None:
        """SIGTERM: push what can be pushed, wait until the server has it, leave, and end as SIGTERM would have."""
        assert notice.left is not None
        staged, limit = False, NOTICE_SHARE * notice.left
        try:
            self._joined.push_remainders()
            staged = self._courier.wait_until(self._courier.staged, limit, limit)
        except DilocoError as error:
            log.warning("SIGTERM: %s", error)
        what = "the server has all of its work" if staged else "not all of its work has reached the server"
        log.warning("SIGTERM: worker %s leaves the run; %s", self.worker_id, what)
        self._close("SIGTERM")
        notice.pass_on()

    def _must_be_its_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this process was forked from that of worker {self.worker_id!r}, perhaps as a DataLoader worker: only "
                "the one that joined can use its Outer. Hand over values instead, such as outer.shard"
            )

    def __getstate__(self) -> Any:
        raise TypeError(
            "an Outer cannot be pickled or copied: it belongs to the process that joined. Hand values to DataLoader "
            "workers instead, such as outer.shard; to save a checkpoint use outer.state_dict()"
        )

    @property
    def _joined(self) -> Replica:
        assert self._replica is not None
        return self._replica

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        notice = self._notice
        with record_function("diloco::wait"), self._stalled():
            reached = self._courier.wait_until(lambda: condition() or self._courier.hurried(), FLUSH_PATIENCE)
        if notice is not None and notice.left is not None:
            self._leave_on(notice)
            raise ConnectionClosed("this worker has left the run on SIGTERM; its parameters are the local ones")
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
        spent, replica = self._spent_here, self._replica
        return pb.Heartbeat(
            step=replica.global_step if replica else 0,
            tokens=max(0, replica.tokens - self._former_tokens) if replica else 0,
            loss=self._loss,
            stall_seconds=spent.stall_seconds,
            bytes_up=spent.bytes_up,
            bytes_down=spent.bytes_down,
            train_seconds=spent.train_seconds,
            steps=max(0, replica.taken - self._former_steps) if replica else 0,
        )


def _bits(size: int, parameters: int) -> float:
    return 8 * size / parameters if parameters else 0.0
