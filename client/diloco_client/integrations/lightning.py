"""A Lightning `Trainer` as a worker: the extra `lightning`; docs/integrations.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .membership import Asked, Evaluate, Membership

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.exceptions import SIGTERMException
except ImportError as error:
    raise ImportError(
        f"diloco_client.integrations.lightning needs Lightning ({error}): pip install '.[lightning]' in diloco's folder"
    ) from error


STATE = "diloco"
"""In a checkpoint: what `Outer.state_dict` gave, of all ranks of the worker."""


class DilocoCallback(Asked, Callback):
    """Makes the `Trainer` that it is given to a worker of the run that the diloco-server at `address` owns.

    >>> trainer = Trainer(callbacks=[DilocoCallback("127.0.0.1:50051")])  # doctest: +SKIP
    >>> trainer.fit(module)

    `address` and `options` are those of `diloco_client.join`; `state` comes from the Trainer's checkpoints.

    `evaluate`: validation sees the global parameters θ; with "local" this worker's own. `loss_metric`: which of the
    metrics that validation logs is the loss. `report_tokens`: each step reports the number of its examples, or what a
    function of a batch says (tokens); with False contributions are weighed by steps. `flush_together`: at the end wait
    for the other workers, so that all end on the same θ. `save_global`: a safetensors file for θ at the end of
    training, relative to `trainer.default_root_dir`.

    The worker joins before the Trainer asks for its training data: `train_dataloader` of the module may use
    `diloco.outer`. (Not with strategies that load checkpoints late, such as FSDP: there it joins when training begins.)
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        evaluate: Evaluate = "global",
        loss_metric: str = "val_loss",
        report_tokens: bool | Callable[[Any], int] = True,
        flush_together: bool = True,
        save_global: str | Path | None = None,
        **options: Any,
    ) -> None:
        self._membership = Membership(
            address, options, evaluate=evaluate, flush_together=flush_together, save_global=save_global
        )
        self._loss_metric = loss_metric
        self._count: Callable[[Any], int] | None = None
        if report_tokens:
            self._count = examples if report_tokens is True else report_tokens
        self._saved: dict[str, Any] | None = None
        self._tokens = 0
        self._stepped = False
        self._hosts: dist.ProcessGroup | None = None

    # -- begin and end --

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._saved = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._join(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._membership.active is None:
            self._join(trainer)

    def _join(self, trainer: Trainer) -> None:
        saved, self._saved, self._hosts = self._saved, None, None
        assert trainer.model is not None
        self._membership.join(trainer.model, trainer.optimizers, saved, str(trainer.ckpt_path or ""))
        self._tokens, self._stepped = 0, False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._membership.finish(trainer.default_root_dir)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._membership.finish(trainer.default_root_dir)  # there was nothing to train on

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            self._membership.leave_on_notice()
        self._membership.abandon(exception)

    # -- checkpoints --

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._membership.end_evaluation()  # what the checkpoint has by now are references to the model's parameters
        outer = self._membership.outer
        if outer is not None and not (outer.closed and trainer.world_size > 1):  # the ranks must be together for it
            checkpoint[STATE] = self._of_all_ranks(outer.state_dict(), trainer.world_size)

    def _of_all_ranks(self, state: dict[str, Any], world_size: int) -> dict[str, Any]:
        """The parts of all ranks of a worker, on the first of them, which writes the checkpoint. They go from host
        memory to host memory: NCCL would take all of them through the first GPU."""
        if world_size == 1:
            return state
        if self._hosts is None:
            self._hosts = dist.new_group(backend="gloo")
        parts: list[dict[str, Any]] | None = [{} for _ in range(world_size)] if dist.get_rank() == 0 else None
        dist.gather_object(state, parts, group=self._hosts)
        return {rank: part for each in parts or [state] for rank, part in each.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get(STATE)

    # -- steps --

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._count is not None:
            self._tokens += self._count(batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if optimizer is not trainer.optimizers[-1]:
            return  # the inner step is not over with this one
        self._stepped = True
        outer = self._membership.active
        if outer is not None and self._tokens > 0:
            outer.report(tokens=self._tokens)
        self._tokens = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        outer = self._membership.active
        if outer is None or not self._stepped:
            return
        self._stepped = False
        if self._membership.stopped():
            trainer.should_stop = True
        if trainer.barebones:
            return
        pl_module.log_dict(self._membership.values(), on_step=True, on_epoch=False)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        every: int = getattr(trainer, "log_every_n_steps", 50)  # to read the loss is to wait for the device
        if isinstance(loss, torch.Tensor) and trainer.global_step % max(1, every) == 0:
            outer.report(loss=loss * trainer.accumulate_grad_batches)

    # -- evaluation --

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._membership.begin_evaluation()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        was_global = self._membership.end_evaluation()
        loss = trainer.callback_metrics.get(self._loss_metric)
        if was_global and loss is not None and not trainer.sanity_checking:
            for logger in trainer.loggers:
                step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as Lightning logs its own metrics
                logger.log_metrics({"diloco/global_loss": float(loss)}, step=step)


def examples(batch: Any) -> int:
    """The length of the first tensor found in a batch: its number of examples; 0 if there is none."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    parts = batch if isinstance(batch, list | tuple) else []
    return next((n for n in map(examples, parts) if n), 0)
