"""What the callbacks for Transformers and Lightning share: a worker's part in a run, from a trainer's begin to its end.

The frameworks say when what happens; here is what then has to be done, and nothing of either framework.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.distributed as dist

from diloco_proto.errors import DilocoError

from ..hook import Outer
from ..joining import join
from ..trainer import Shard

log = logging.getLogger("diloco")

Evaluate = Literal["global", "local"]


class Membership:
    """One trainer's part in a run. `outer` is that of the newest training, also when it has ended.

    `options` are keyword arguments of `diloco_client.join`; unknown ones raise TypeError here and now.
    """

    def __init__(
        self,
        address: str | None,
        options: Mapping[str, Any],
        *,
        evaluate: Evaluate,
        flush_together: bool,
        save_global: str | Path | None,
    ) -> None:
        if "state" in options:
            raise TypeError("state comes from the trainer's own checkpoint: resume from that, and leave state out")
        inspect.signature(join).bind(address, None, None, **options)
        if evaluate not in ("global", "local"):
            raise ValueError(f"evaluate={evaluate!r}: it must be 'global' (θ) or 'local' (this worker's parameters)")
        self.outer: Outer | None = None
        self._address = address
        self._options = dict(options)
        self._evaluate = evaluate
        self._flush_together = flush_together
        self._save_global = save_global
        self._active = False
        self._swapped: AbstractContextManager[None] | None = None

    @property
    def active(self) -> Outer | None:
        """The `Outer` between `join` and `finish` or `abandon`."""
        return self.outer if self._active else None

    def join(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        state: Mapping[str, Any] | None,
        checkpoint: str,
    ) -> None:
        """Model and optimizer are as they will be trained, loaded from `checkpoint` if there is one ("" for none);
        `state` is what that had of the worker. Raises what `diloco_client.join` raises, and ValueError for a sharded
        model with `save_global`."""
        self.close()
        if self._save_global is not None and any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError("save_global: no rank holds all of a sharded model; use `diloco-client export` instead")
        if checkpoint and state is None:
            log.warning(
                "the checkpoint %s has no state of a worker in it: this one joins anew, with the global parameters in "
                "place of the checkpoint's",
                checkpoint,
            )
        self.outer = join(self._address, model, optimizer, state=state, **self._options)
        self._active = True

    def global_step(self) -> int:
        """Inner steps in the run's count; 0 before there is one."""
        return 0 if self.outer is None else self.outer.global_step

    # -- θ in the model --

    def begin_evaluation(self) -> bool:
        """From here to `end_evaluation` the model holds θ. False, and nothing happens, when it does already, without a
        run, and with `evaluate="local"`."""
        outer = self.active
        if outer is None or self._evaluate == "local" or self._swapped is not None:
            return False
        swapped = outer.global_parameters()
        swapped.__enter__()
        self._swapped = swapped
        return True

    def end_evaluation(self) -> bool:
        """The model holds the local parameters again. False, and nothing happens, if it does already."""
        swapped, self._swapped = self._swapped, None
        if swapped is None:
            return False
        swapped.__exit__(None, None, None)
        return True

    # -- what is told --

    def stopped(self) -> bool:
        """Whether training should end: see `Outer.should_stop`."""
        return self.active is not None and self.active.should_stop

    def values(self) -> dict[str, float]:
        """What goes to the trainer's loggers, by name; nothing without a run."""
        if self.active is None:
            return {}
        stats = self.active.stats
        return {
            "diloco/stall_share": stats.stall_seconds / stats.train_seconds if stats.train_seconds else 0.0,
            "diloco/bytes_up": stats.bytes_up,
            "diloco/bytes_down": stats.bytes_down,
            "diloco/rounds": stats.rounds,
            "diloco/counted": stats.counted,
            "diloco/not_counted": stats.not_counted,
        }

    # -- the end --

    def finish(self, directory: str | Path) -> None:
        """Training has ended: all of its work goes into the run, the model becomes θ, and the worker leaves.

        `save_global` is relative to `directory`. Raises ServerUnreachable if the server stays away; the worker leaves
        in any case.
        """
        outer = self.active
        if outer is None:
            return
        try:
            self.end_evaluation()
            if outer.closed:  # on SIGTERM, with all that it had; whoever handles that signal too has ended training
                log.warning("this worker has left the run on SIGTERM; the model holds its local parameters")
                return
            outer.flush(together=self._flush_together)
            if self._save_global is not None:
                self._save(outer, Path(directory, self._save_global))
        finally:
            self.close()

    def _save(self, outer: Outer, path: Path) -> None:
        theta = outer.global_state_dict()  # in an island by all ranks
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            write(path, lambda file: safetensors.torch.save_file(theta, file))

    def leave_on_notice(self) -> None:
        """SIGTERM has ended training before an inner step could: with `sigterm_seconds` do now what that step would
        have done, which is to push what is left, to leave, and to end as SIGTERM would."""
        self.end_evaluation()
        outer = self.active
        if outer is not None and not outer.closed and self._options.get("sigterm_seconds") is not None:
            with suppress(DilocoError):  # it has left
                outer.flush()

    def abandon(self, error: BaseException) -> None:
        """Training has failed: the worker leaves without a flush, the model keeps its local parameters."""
        self.end_evaluation()
        if self.active is not None:
            self.active.__exit__(type(error), error, error.__traceback__)
        self.close()

    def close(self) -> None:
        """Leave the run without a flush, if this has not happened yet."""
        self.end_evaluation()
        if self.active is not None:
            self.active.close()
        self._active = False


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write a file, which has its name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    save(temporary)
    temporary.replace(path)


class Asked:
    """What a training script may ask of its callback."""

    _membership: Membership

    @property
    def outer(self) -> Outer:
        """The worker's `Outer`, from the beginning of training on, and still when it has ended. Raises RuntimeError
        before."""
        if self._membership.outer is None:
            raise RuntimeError("the worker joins its run when training begins: there is no outer yet")
        return self._membership.outer

    @property
    def shard(self) -> Shard:
        """`outer.shard`, so that `diloco_client.shard_stream` takes the callback before training begins."""
        return self.outer.shard

    @property
    def rank_shard(self) -> Shard:
        """`outer.rank_shard`, likewise; what a trainer divides among the ranks by itself is not divided here."""
        return self.outer.rank_shard

    @property
    def global_step(self) -> int:
        """`outer.global_step`, and 0 before training begins: for learning rate schedules."""
        return self._membership.global_step()
