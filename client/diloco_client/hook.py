"""A torch training loop, hooked into a run: what `join` gives.

The training thread does three things: after an inner step it copies the fragment that is due, or encodes it where it
lies in host memory (capture), it merges the global fragment that is due (apply), and it waits if that has not arrived
(stall). All else happens on the courier's threads. The schedule is Streaming DiLoCo's (arXiv 2501.18512).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch._compile import _disable_dynamo
from torch.profiler import record_function

from diloco_proto.errors import ConnectionClosed, DilocoError, RunMismatch, ServerUnreachable, StateMismatch
from diloco_proto.schedule import Schedule

from .link import Link
from .notice import Notice
from .optimizers import check_not_captured
from .replica import Replica, Rules
from .resume import Saved, account, read, resume, save
from .stats import Stats
from .tally import Tally
from .trainer import Shard
from .witness import CHANGED_BEFORE, CHANGED_NOW, Witness

log = logging.getLogger("diloco")

FLUSH_PATIENCE = 60.0
"""Seconds that `flush` waits for a server that is out of reach."""

NOTICE_SHARE = 0.8
"""Of the seconds from SIGTERM to the end: so long a worker waits for its last pushes. The rest is for its own end."""


class Outer:
    """A worker's part in a run, from `join` to the end of the `with` block.

    In an island (several ranks that train one model) every rank has one, and all call the methods that say *collective*
    at the same step, as they do with those of torch.distributed; docs/islands.md has the rest.

    Not thread safe: call it from the thread that trains. Processes forked from it, such as DataLoader workers, may read
    its properties and nothing else: the threads and connections are those of this process.
    """

    def __init__(
        self,
        link: Link,
        optimizers: Sequence[torch.optim.Optimizer],
        connect_timeout: float,
        saved: Saved | None = None,
        sigterm_seconds: float | None = None,
    ) -> None:
        self._link = link
        self._transport = transport = link.transport
        self._binding = link.binding
        self._replica: Replica | None = None
        self._closed = False
        self._finishing = False
        self._flushed = False
        self._swapped = False
        self._pid = os.getpid()
        self._tally = link.trainer = Tally(transport.counters)
        try:
            self._begin(link.join(connect_timeout))
            if saved is not None:
                self._resume(saved)
            sigterm_seconds = link.of_first(sigterm_seconds)
            if sigterm_seconds is not None:
                self._tally.notice = Notice(sigterm_seconds)
            self._courier.hurried = lambda: link.notice_left is not None
        except RunMismatch as error:
            link.close("could not join")
            if saved is None:
                raise
            raise StateMismatch(f"{error}. To join that run with its global parameters leave the state out") from None
        except BaseException:
            link.close("could not join")
            raise
        self._witness = Witness(self._binding.trained)
        before = _disable_dynamo(lambda *_: self._before_step())  # in a compiled step it is no part of the graph
        self._hooks = [o.register_step_pre_hook(before) for o in optimizers if o.param_groups]
        self._hooks.append(optimizers[-1].register_step_post_hook(self._after_step))
        log.info("joined run %s at %s as %s", link.run_id, transport.address, link.worker_id)

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
        self._tally.begin(self._replica)

    # -- what the trainer asks --

    @property
    def stats(self) -> Stats:
        """How this worker has fared so far, in the processes that this one resumed too. Bytes and seconds are those of
        this rank, what is counted that of the whole island."""
        return self._tally.stats

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
    def rank_shard(self) -> Shard:
        """This process's share of the data. Where the ranks of an island are one worker, that is its rank's part of
        `shard`: (index + count·rank, count·R) for R ranks; else `shard`. Ranks that compute one batch together (tensor
        parallel) must not use it: they take the same data."""
        return self._link.rank_shard

    @property
    def should_stop(self) -> bool:
        """The run has had the rounds or tokens that it was to have (`stop_after_rounds`, `stop_after_tokens`), or this
        worker has left it on SIGTERM: leave the training loop. All ranks of an island see it after the same step."""
        return bool(self._link.stopped) or self._link.notice_left is not None

    @property
    def closed(self) -> bool:
        """This worker has left the run: by `close`, at the end of the `with` block, or on SIGTERM."""
        return self._closed

    def report(self, *, tokens: int | None = None, loss: float | torch.Tensor | None = None) -> None:
        """Tell of an inner step, before its `optimizer.step()`: how many tokens (or examples) it trains on, and its
        loss.

        Contributions are weighed by tokens, or by inner steps in a run where nobody reports them; the loss is shown
        by `diloco-client status`. Each rank of an island tells its own: tokens are added up, of the losses the mean is
        shown. Raises ValueError for less than one token.
        """
        if tokens is not None and tokens < 1:
            raise ValueError(f"report(tokens={tokens}): an inner step trains on at least one token")
        value = loss.detach() if isinstance(loss, torch.Tensor) else loss
        self._link.report(tokens, None if value is None else float(value))

    def global_state_dict(self) -> dict[str, torch.Tensor]:
        """The model's `state_dict()` with the global parameters θ in it, as this worker last received them. Collective.

        Names and dtypes are the model's own; tensors are on the CPU. Evaluate and save these rather than the
        local parameters. After `flush` both are the same. What is sharded (a DTensor) in the model's `state_dict()` is
        so in this, with its local part on the CPU, as torch's `get_model_state_dict(..., cpu_offload=True)` has it.
        """
        self._must_be_its_process()
        return self._binding.state_dict([base.theta for base in self._courier.bases])

    @contextmanager
    def global_parameters(self) -> Iterator[None]:
        """Within the block the model holds the global parameters θ, as this worker last received them: to evaluate
        them, or to save them in the trainer's own way. Then it holds the local ones again, to the bit. Collective.

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
        """Fragment -> 64-bit digest of this worker's base, to be compared with the server's status. Collective."""
        self._must_be_its_process()
        return {p: self._link.digest(p, base) for p, base in enumerate(self._courier.bases)}

    def state_dict(self) -> dict[str, Any]:
        """What this worker needs beside model and optimizer to go on after a crash as if there had been none: put it
        into the trainer's checkpoint, taken between two inner steps. Collective; each rank has its own part, under a
        name of its own, so that torch.distributed.checkpoint keeps them apart.

        Dictionaries of tensors (on the CPU, copies), numbers and strings, for torch.save, weights_only or not, and
        torch.distributed.checkpoint. It has the base of each fragment and the contribution under way: 4.5 bytes a
        parameter, 12.5 with error feedback. Waits for no network. Raises NonFiniteParameter if what was to be pushed
        cannot be.
        """
        self._must_be_its_process()
        return self._link.label(save(self._link, self._joined, self._binding, self._tally.spent))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave to a former process of this worker, before the first inner step. Collective:
        on as many ranks as have saved it.

        Load model and optimizer of the same checkpoint too, before or after `join`, but before this. What the run has
        not counted since stays in the local parameters; of fragments in which it has later work of this worker they
        become the global ones, and the residual of error feedback begins anew: nothing counts twice. diloco_client's
        `resume` has the rule. Until then a joined worker holds the parameters that joining replaced, in host memory;
        `join(..., state=...)` does the same without.

        Raises StateMismatch, and leaves everything as it is, for a state of another worker, run or model, for a
        damaged one, or when the model does not hold the parameters that go with it.
        """
        self._must_be_its_process()
        self._resume(self._link.do(lambda: read(self._link.unlabel(state))))

    def _resume(self, saved: Saved) -> None:
        resume(saved, self._link, self._joined, self._binding)
        self._tally.resume(saved.spent)
        self._link.forget_replaced()

    def flush(self, *, together: bool = False) -> None:
        """End fully synchronised: what this worker still holds goes into the run, then its parameters become θ.
        Collective.

        If the parameters were changed since the last inner step, by loading the best checkpoint say, that is no
        training: what is not under way is not pushed, and a warning says so.

        With `together` it also waits until every live worker has flushed, so that all end on the same θ; call it
        so in every worker, or in none. Training may go on afterwards. Raises ServerUnreachable when the server
        stays away for FLUSH_PATIENCE seconds; the model keeps its local parameters then.
        """
        courier, replica = self._courier, self._joined
        self._must_be_its_process()
        if self._closed:
            raise ConnectionClosed("this worker has left the run; join again to flush")
        self._link.sync(replica.taken)
        if self._link.anywhere(self._witness.changed_now()):
            log.warning(CHANGED_NOW)
            replica.drop_remainders()
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
        self._witness.stepped()
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
        self._tally.end()
        for hook in self._hooks:
            hook.remove()
        if self._tally.notice is not None:
            self._tally.notice.restore()
        self._link.forget_replaced()
        self._link.close(reason)

    # -- before and after each inner step --

    def _before_step(self) -> None:
        check_not_captured()
        self._witness.begins()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if os.getpid() != self._pid:
            return  # a forked child of the trainer, such as a DataLoader worker
        if self._swapped:
            raise RuntimeError("an inner step within outer.global_parameters(): leave the block before you train on")
        if bool(getattr(optimizer, "found_inf", False)):
            self._witness.stepped()
            return  # of a GradScaler: the gradients had overflowed, and a fused optimizer has not made this step
        self._link.sync(self._joined.taken + 1)
        self._link.forget_replaced()
        if self._finishing:
            self._finishing = self._flushed = False
            self._link.ready()
        replica = self._joined
        self._heed_pace(replica)
        if replica.taken % self._check_every == 0:
            self._check()
        for fragment in replica.advance():
            with self._tally.stalled():
                self._courier.wait(fragment)
        self._heed_pace(replica)  # it comes with the round that was waited for, and holds from this merge on
        replica.merge()
        self._witness.stepped()
        if self._link.notice_left is not None:
            self._leave_on_notice(self._link.notice_left)

    def _check(self) -> None:  # not in each step
        self._binding.check_optimizers()
        if self._witness.changed_at_times():
            log.warning(CHANGED_BEFORE)

    def _heed_pace(self, replica: Replica) -> None:
        if self._link.pace is not None:
            replica.set_pace(self._link.pace)

    def _leave_on_notice(self, left: float) -> None:
        """SIGTERM: push what can be pushed, wait until the server has it, leave, and end as SIGTERM would have."""
        pushed = False
        try:
            pushed = self._push_all((1.0 - NOTICE_SHARE) * left)
        except DilocoError as error:
            log.warning("SIGTERM: %s", error)
        what = "the server has all of its work" if pushed else "not all of its work has reached the server"
        log.warning("SIGTERM: worker %s leaves the run; %s", self.worker_id, what)
        self._close("SIGTERM")
        if self._tally.notice is not None:
            self._tally.notice.pass_on()

    def _push_all(self, spare: float) -> bool:
        """Push all work there is, also what has to wait for the fate of a contribution under way. False if there are
        but `spare` seconds left of the notice before the server has it."""
        replica, courier = self._joined, self._courier

        def wait(condition: Callable[[], bool]) -> bool:
            left = (self._link.notice_left or 0.0) - spare
            return courier.wait_until(condition, left, left)

        replica.push_remainders()
        while wait(courier.staged):
            if replica.all_pushed:
                return True
            if not wait(courier.anything_ready):
                break
            replica.merge(early=True)
            replica.push_remainders()
        return False

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
        with record_function("diloco::wait"), self._tally.stalled():
            reached = self._courier.wait_until(lambda: condition() or self._courier.hurried(), FLUSH_PATIENCE)
        if self._link.notice_left is not None:
            self._leave_on_notice(self._link.notice_left)
            raise ConnectionClosed("this worker has left the run on SIGTERM; its parameters are the local ones")
        if not reached:
            raise ServerUnreachable(
                f"the server at {self._transport.address} has been out of reach for {FLUSH_PATIENCE:.0f} s while "
                "this worker flushed; its parameters are the local ones"
            )
