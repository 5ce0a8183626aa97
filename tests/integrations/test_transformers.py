"""A `transformers.Trainer` as a worker."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from runs import (
    PLAIN,
    QUICK,
    Stopped,
    counted,
    eventually,
    last_loss,
    make_data,
    make_layers,
    same,
    server_digests,
    settle,
    values,
    worker_states,
)
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import diloco_client
from diloco_client.integrations.transformers import DilocoCallback
from diloco_server import RunConfig, serve


class Model(nn.Module):
    """As the Trainer wants it: named inputs, and the loss among the outputs."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_layers()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        predicted = self.layers(x)
        return {"loss": nn.functional.mse_loss(predicted, labels), "logits": predicted}


def make_dataset(count: int = 64, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    x, y = make_data(count, seed)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


class StopAt(TrainerCallback):
    """Ends training before the step after `step`, once what was pushed has arrived if that is wanted."""

    def __init__(self, step: int, diloco: DilocoCallback, wait: bool = False) -> None:
        self.step, self.diloco, self.wait = step, diloco, wait

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.wait:
                settle(self.diloco.outer)
            raise Stopped


class Record(TrainerCallback):
    """What a logger that was there before the callback gets, and what it sees of the parameters."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def make_trainer(
    directory: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **options: Any
) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "save_steps": 100,
        "logging_steps": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=model or Model(),
        args=TrainingArguments(output_dir=str(directory), **(arguments | options)),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(16, 1),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(
    ("run", "stop", "options"),
    [
        (QUICK, 9, {}),  # nothing under way
        (QUICK | {"uplink_codec": "int2"}, 11, {"gradient_accumulation_steps": 2}),  # one contribution under way
    ],
)
def test_a_worker_that_stopped_at_a_checkpoint_goes_on_to_the_same_theta(
    run: dict[str, Any], stop: int, options: dict[str, Any], tmp_path: Path
) -> None:
    ends = []
    for interrupted in (False, True):
        directory = tmp_path / str(interrupted)
        with serve(RunConfig(**run)) as server:
            diloco = DilocoCallback(server.address, worker_id="w")
            trainer = make_trainer(directory, save_steps=stop, **options)
            diloco.attach(trainer)
            if interrupted:
                trainer.add_callback(StopAt(stop, diloco))
                with pytest.raises(Stopped):
                    trainer.train()
                eventually(lambda: worker_states(server.address) == {"w": "gone"})
                diloco = DilocoCallback(server.address)
                trainer = make_trainer(directory, save_steps=stop, **options)
                diloco.attach(trainer)
            trainer.train(resume_from_checkpoint=interrupted)
            assert diloco.outer.worker_id == "w"
            assert diloco.outer.stats.steps == diloco.outer.global_step == 20
            assert diloco.outer.base_digests() == server_digests(server.address)
            model = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
            ends.append((model, counted(server.address), counted(server.address, "tokens")))
    assert ends[0] == ends[1]
    assert ends[0][1] == [20, 20]


def test_work_that_was_counted_later_than_the_checkpoint_counts_once(tmp_path: Path, caplog: Any) -> None:
    with serve(RunConfig(**PLAIN)) as server:
        diloco = DilocoCallback(server.address, worker_id="w")
        trainer = make_trainer(tmp_path, save_steps=3)
        diloco.attach(trainer)
        trainer.add_callback(StopAt(5, diloco, wait=True))
        with pytest.raises(Stopped):
            trainer.train()
        assert counted(server.address) == [1, 4]
        again = DilocoCallback(server.address)
        trainer = make_trainer(tmp_path, max_steps=4)
        again.attach(trainer)
        theta: list[dict[str, torch.Tensor]] = []

        class Look(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                theta.append(again.outer.global_state_dict())
                theta.append(values(model))

        trainer.add_callback(Look)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert "of fragments 1 it takes the global parameters" in caplog.text
        adopted = {slot.tensor.name for slot in again.outer._link.layout.fragments[1].slots}
        saved = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "model.safetensors")
        for name, value in theta[1].items():
            assert torch.equal(value, theta[0][name] if name in adopted else saved[name])
        # Of fragment 0 step 1 was counted before, and 2 to 4 now; of fragment 1 it was 1 to 4, and one on top of them.
        assert counted(server.address) == [1 + 3, 4 + 1]


def test_a_checkpoint_without_a_state_joins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, max_steps=3).train()
    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address, worker_id="w")
        trainer = make_trainer(tmp_path, max_steps=6)
        diloco.attach(trainer)
        trainer.train(resume_from_checkpoint=True)
        assert "checkpoint-3 has no state of a worker in it" in caplog.text
        assert diloco.outer.stats.steps == 3


def test_the_state_lies_in_the_checkpoint_and_goes_with_it(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address)
        trainer = make_trainer(tmp_path, max_steps=9, save_steps=3, save_total_limit=1)
        diloco.attach(trainer)
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]
    assert sorted(path.name for path in tmp_path.glob("**/diloco*")) == ["diloco_state.pt"]


def test_evaluation_is_of_theta_and_training_goes_on_with_the_local_parameters(tmp_path: Path) -> None:
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    class Watch(Model):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            if not self.training:
                seen.append((values(self), diloco.outer.global_state_dict()))
            return super().forward(x, labels)

    class Remember(TrainerCallback):
        before: dict[str, torch.Tensor]

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.before = values(model)

        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            assert same(values(model), self.before)
            assert not same(values(model), seen[-1][1]), "there is local work that θ does not have"

    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address)
        record, remember = Record(), Remember()
        options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
        trainer = make_trainer(tmp_path, record, remember, model=Watch(), **options)
        diloco.attach(trainer)
        trainer.train()
        assert len(seen) == 2 * 2  # of 16 examples, 8 a batch
        assert all(same(local, theta) for local, theta in seen)
        evaluations = [logs for logs in record.logs if "eval_loss" in logs]
        assert [logs["diloco/global_loss"] for logs in evaluations] == [logs["eval_loss"] for logs in evaluations]
        assert "diloco/rounds" not in evaluations[0]
        trainer.remove_callback(remember)
        trainer.evaluate()  # after training, of what the model holds, which is θ
        assert same(*seen[-1])


def test_evaluation_of_the_local_parameters_on_request(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address, evaluate="local")
        record = Record()
        trainer = make_trainer(tmp_path, record, max_steps=4, eval_strategy="steps", eval_steps=4)
        diloco.attach(trainer)
        local: list[float] = []

        class Evaluate(TrainerCallback):
            def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                x, y = make_data(16, 1)
                with torch.no_grad():
                    local.append(model(x, y)["loss"].item())

        trainer.add_callback(Evaluate)
        trainer.train()
        (logs,) = [logs for logs in record.logs if "eval_loss" in logs]
        assert logs["eval_loss"] == pytest.approx(local[0])
        assert "diloco/global_loss" not in logs


def test_all_loggers_get_what_the_worker_counts(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address, worker_id="w")
        record = Record()
        trainer = make_trainer(tmp_path, record)
        diloco.attach(trainer)
        trainer.train()
        training = [logs for logs in record.logs if "loss" in logs]
        names = {"stall_share", "bytes_up", "bytes_down", "rounds", "counted", "not_counted"}
        assert len(training) == 4
        assert all(logs.keys() >= {f"diloco/{name}" for name in names} for logs in training)
        assert [logs["diloco/counted"] for logs in training] == [1, 3, 5, 6]
        assert trainer.state.log_history[0]["diloco/counted"] == 1
        assert 0 <= training[-1]["diloco/stall_share"] <= 1
        eventually(lambda: last_loss(server.address) == pytest.approx(training[-1]["loss"]))


@pytest.mark.parametrize(("count", "tokens"), [("all", 20 * 2 * 4 * 5), ("no", 20 * 2 * 4)])
def test_contributions_are_weighed_by_tokens_if_the_trainer_counts_them(
    count: str, tokens: int, tmp_path: Path
) -> None:
    options = {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": count}
    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address, worker_id="w")
        trainer = make_trainer(tmp_path, **options)
        diloco.attach(trainer)
        trainer.train()
        assert counted(server.address) == [20, 20]
        assert counted(server.address, "tokens") == [tokens, tokens]


def test_two_workers_end_on_the_same_theta_which_is_saved(tmp_path: Path, together: Any) -> None:
    with serve(RunConfig(**QUICK, min_workers=2, grace_seconds="inf")) as server:

        def train(index: int) -> dict[str, torch.Tensor]:
            if index == 0:
                diloco = DilocoCallback(server.address, save_global="out/theta.safetensors")
                trainer = make_trainer(tmp_path, max_steps=14)
                diloco.attach(trainer)
                trainer.train()
                return values(trainer.model)
            model, (x, y) = Model(), make_data(4, 7)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            with diloco_client.join(server.address, model, optimizer) as outer:
                for _ in range(11):
                    outer.report(tokens=4)
                    model(x, y)["loss"].backward()
                    optimizer.step()
                    optimizer.zero_grad()
                outer.flush(together=True)
            return values(model)

        first, second = together(2, train)
    assert same(first, second)
    assert same(safetensors.torch.load_file(tmp_path / "out" / "theta.safetensors"), first)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theta.safetensors"]


def test_training_ends_when_the_run_does(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK, stop_after_rounds=2)) as server:
        diloco = DilocoCallback(server.address)
        trainer = make_trainer(tmp_path, max_steps=1000)
        diloco.attach(trainer)
        trainer.train()
        assert 6 < trainer.state.global_step < 1000
        assert diloco.outer.base_digests() == server_digests(server.address)


def test_a_failed_training_leaves_and_can_begin_again(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address, worker_id="w")
        stop = StopAt(5, diloco)
        trainer = make_trainer(tmp_path, stop, max_steps=8)
        diloco.attach(trainer)
        with pytest.raises(Stopped):
            trainer.train()
        failed = diloco.outer
        assert failed.closed
        eventually(lambda: worker_states(server.address) == {"w": "gone"})
        stop.step = -1
        trainer.train()
        assert diloco.outer is not failed
        assert diloco.outer.stats.steps == 8
        assert same(values(trainer.model), diloco.outer.global_state_dict())


def test_on_sigterm_what_is_left_is_pushed_and_training_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Signal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    received: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with serve(RunConfig(**QUICK)) as server:
            diloco = DilocoCallback(server.address, worker_id="w", sigterm_seconds=20)
            trainer = make_trainer(tmp_path, Signal(), save_steps=4)
            diloco.attach(trainer)
            trainer.train()
            assert received
            assert trainer.state.global_step == 4
            assert "the model holds its local parameters" in caplog.text
            eventually(lambda: counted(server.address) == [4, 4])
            again = DilocoCallback(server.address)
            trainer = make_trainer(tmp_path, max_steps=6)
            again.attach(trainer)
            trainer.train(resume_from_checkpoint=True)
            assert again.outer.stats.steps == 6
            assert counted(server.address) == [6, 6]
    finally:
        signal.signal(signal.SIGTERM, former)


class TestRefused:
    def test_options_that_join_does_not_know(self) -> None:
        with pytest.raises(TypeError, match="workerid"):
            DilocoCallback("127.0.0.1:1", workerid="w")
        with pytest.raises(TypeError, match="trainer's own checkpoint"):
            DilocoCallback("127.0.0.1:1", state={})
        with pytest.raises(ValueError, match="'global'"):
            DilocoCallback("127.0.0.1:1", evaluate="mine")

    def test_a_callback_that_is_not_attached(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"diloco\.attach\(trainer\)"):
            make_trainer(tmp_path, DilocoCallback("127.0.0.1:1")).train()

    def test_a_second_trainer(self, tmp_path: Path) -> None:
        diloco = DilocoCallback("127.0.0.1:1")
        trainer = make_trainer(tmp_path, diloco)
        diloco.attach(trainer)
        assert trainer.callback_handler.callbacks.count(diloco) == 1
        with pytest.raises(RuntimeError, match="one callback, one Trainer"):
            diloco.attach(make_trainer(tmp_path))

    def test_the_best_of_former_parameters(self, tmp_path: Path) -> None:
        diloco = DilocoCallback("127.0.0.1:1")
        options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
        trainer = make_trainer(tmp_path, **options)
        diloco.attach(trainer)
        with pytest.raises(ValueError, match="load_best_model_at_end"):
            trainer.train()

    def test_to_ask_before_training(self) -> None:
        diloco = DilocoCallback("127.0.0.1:1")
        assert diloco.global_step == 0
        with pytest.raises(RuntimeError, match="when training begins"):
            _ = diloco.shard


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "diloco_client.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install '\.\[hf\]'"):
        importlib.import_module("diloco_client.integrations.transformers")
