"""A `transformers.Trainer` as a worker: the extra `hf`; docs/integrations.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..trainer import Shard
from .membership import Asked, Evaluate, Membership, write

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise ImportError(
        f"diloco_client.integrations.transformers needs Transformers and accelerate ({error}): pip install '.[hf]' in "
        "diloco's folder"
    ) from error


def state_file(args: TrainingArguments) -> str:
    """In a checkpoint's folder, what `Outer.state_dict` gave to this process: one of several of a worker, perhaps."""
    return "diloco_state.pt" if args.world_size == 1 else f"diloco_state_{args.process_index}.pt"


class DilocoCallback(Asked, TrainerCallback):
    """Makes the `Trainer` that it is attached to a worker of the run that the diloco-server at `address` owns.

    >>> diloco = DilocoCallback("127.0.0.1:50051")  # doctest: +SKIP
    >>> diloco.attach(trainer)
    >>> trainer.train()

    `address` and `options` are those of `diloco_client.join`; `state` comes from the Trainer's checkpoints.

    `evaluate`: `trainer.evaluate()` and `trainer.predict()` see the global parameters θ, also in the midst of training;
    with "local" this worker's own. `report_tokens`: each step reports the growth of `num_input_tokens_seen`, or the
    number of its examples where the Trainer does not count tokens (`include_num_input_tokens_seen`); without it
    contributions are weighed by steps. `flush_together`: at the end wait for the other workers, so that all end on the
    same θ. `save_global`: a safetensors file for θ at the end of training, relative to `args.output_dir`.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        evaluate: Evaluate = "global",
        report_tokens: bool = True,
        flush_together: bool = True,
        save_global: str | Path | None = None,
        **options: Any,
    ) -> None:
        self._membership = Membership(
            address, options, evaluate=evaluate, flush_together=flush_together, save_global=save_global
        )
        self._report_tokens = report_tokens
        self._trainer: Trainer | None = None
        self._checkpoint: Path | None = None
        self._tokens_seen = 0

    @property
    def rank_shard(self) -> Shard:
        """`outer.shard`: what it takes of the data the Trainer divides among the worker's processes by itself."""
        return self.shard

    def attach(self, trainer: Trainer) -> None:
        """Become a callback of `trainer`, and wrap its `train`, `evaluation_loop` and `log`: no event tells from which
        checkpoint training is resumed, that it failed, that an evaluation begins, or what will be logged.

        Raises RuntimeError if this callback has a Trainer already.
        """
        if self._trainer is not None:
            raise RuntimeError("this callback is attached to a Trainer already: one callback, one Trainer")
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._inner_train = trainer.train
        self._inner_evaluation_loop = trainer.evaluation_loop
        self._inner_log = trainer.log
        for wrapped in (self._train, self._evaluation_loop, self._log):
            setattr(trainer, wrapped.__name__.removeprefix("_"), wrapped)

    # -- what of the Trainer is wrapped --

    def _train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        trainer = self._attached
        if trainer.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True would put the parameters of an older step in place of θ. Leave it out; "
                "`diloco-client snapshots` lists former θ, `diloco-client export --snapshot NUMBER` fetches one"
            )
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(trainer.args.output_dir)
        self._checkpoint = Path(found) if found else None
        try:
            return self._inner_train(resume_from_checkpoint, *args, **kwargs)
        except BaseException as error:
            self._membership.abandon(error)
            raise

    def _evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        began = self._membership.begin_evaluation()
        try:
            output = self._inner_evaluation_loop(*args, **kwargs)
        finally:
            if began:
                self._membership.end_evaluation()
        if began and output.metrics is not None and "eval_loss" in output.metrics:
            output.metrics["diloco/global_loss"] = output.metrics["eval_loss"]
        return output

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        outer = self._membership.active
        if outer is not None and "loss" in logs:
            outer.report(loss=logs["loss"])
        if "loss" in logs or "train_loss" in logs:  # not an evaluation
            logs.update(self._membership.values())
        self._inner_log(logs, *args, **kwargs)

    # -- events --

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, saved = self._attached, None
        checkpoint = self._checkpoint
        if checkpoint is not None and (checkpoint / state_file(args)).exists():
            saved = torch.load(checkpoint / state_file(args), map_location="cpu", weights_only=True)
        model = trainer.model_wrapped
        if isinstance(model, torch.nn.DataParallel):
            model = model.module
        self._membership.join(model, kwargs["optimizer"], saved, str(checkpoint or ""))
        self._tokens_seen = state.num_input_tokens_seen

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        outer = self._membership.active
        if outer is None or not self._report_tokens or args.process_index != 0:
            return  # what the Trainer counts is of all of a worker's processes
        if args.include_num_input_tokens_seen in (False, "no"):
            tokens = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        else:
            tokens = state.num_input_tokens_seen - self._tokens_seen
            self._tokens_seen = state.num_input_tokens_seen
        if tokens > 0:
            outer.report(tokens=tokens)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._membership.stopped():
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        outer = self._membership.active
        if outer is None or args.save_only_model:
            return
        folder = Path(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        write(folder / state_file(args), lambda file: torch.save(outer.state_dict(), file))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._membership.finish(args.output_dir or "")

    @property
    def _attached(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError("DilocoCallback was given to a Trainer, but not attached: call diloco.attach(trainer)")
        return self._trainer
