"""A Lightning `Trainer` as a worker."""

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
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger
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
from torch.utils.data import DataLoader, TensorDataset

import diloco_client
from diloco_client.integrations.lightning import DilocoCallback
from diloco_server import RunConfig, serve

pytestmark = [  # Lightning's own
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]

BATCHES = 3
"""An epoch's."""


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = make_layers()
        self.validated: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.validated.append(values(self))
        self.log("val_loss", nn.functional.mse_loss(self.layers(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*make_data(4 * BATCHES)), 4)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*make_data(16, 1)), 8)


class StopAt(Callback):
    """Ends training after the step `step`, once what was pushed has arrived if that is wanted."""

    def __init__(self, step: int, diloco: DilocoCallback, wait: bool = False) -> None:
        self.step, self.diloco, self.wait = step, diloco, wait

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            if self.wait:
                settle(self.diloco.outer)
            raise Stopped


class Record(Logger):
    """What the Trainer's logger gets."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = "record"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def make_trainer(directory: Path, *callbacks: Callback, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 20,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 2,
    }
    return Trainer(default_root_dir=directory, callbacks=list(callbacks), **(arguments | options))


def checkpoints(directory: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(directory, "{step}", save_top_k=-1, **options)


@pytest.mark.parametrize(
    ("run", "stop", "steps", "options"),
    [
        (QUICK, 9, 21, {}),  # nothing under way
        # One contribution under way; the third batch of an epoch is a step of its own.
        (QUICK | {"uplink_codec": "int2"}, 8, 14, {"accumulate_grad_batches": 2}),
    ],
)
def test_a_worker_that_stopped_at_a_checkpoint_goes_on_to_the_same_theta(
    run: dict[str, Any], stop: int, steps: int, options: dict[str, Any], tmp_path: Path
) -> None:
    ends = []
    for interrupted in (False, True):
        options = options | {"enable_checkpointing": True, "max_steps": -1, "max_epochs": 7}
        with serve(RunConfig(**run)) as server:
            module, path = Module(), None
            diloco = DilocoCallback(server.address, worker_id="w")
            saving = checkpoints(tmp_path / str(interrupted), every_n_epochs=1, save_on_train_epoch_end=True)
            if interrupted:
                trainer = make_trainer(tmp_path, diloco, StopAt(stop, diloco), saving, **options)
                with pytest.raises(Stopped):
                    trainer.fit(module)
                eventually(lambda: worker_states(server.address) == {"w": "gone"})
                module, path = Module(), Path(saving.dirpath, f"step={stop}.ckpt")
                diloco = DilocoCallback(server.address)
            make_trainer(tmp_path, diloco, saving, **options).fit(module, ckpt_path=path)
            assert diloco.outer.worker_id == "w"
            assert diloco.outer.stats.steps == diloco.outer.global_step == steps
            assert diloco.outer.base_digests() == server_digests(server.address)
            model = {name: value.tolist() for name, value in module.state_dict().items()}
            ends.append((model, counted(server.address), counted(server.address, "tokens")))
    assert ends[0] == ends[1]
    assert ends[0][1] == [steps, steps]


def test_work_that_was_counted_later_than_the_checkpoint_counts_once(tmp_path: Path, caplog: Any) -> None:
    with serve(RunConfig(**PLAIN)) as server:
        diloco = DilocoCallback(server.address, worker_id="w")
        saving = checkpoints(tmp_path, every_n_train_steps=3)
        trainer = make_trainer(tmp_path, diloco, StopAt(5, diloco, wait=True), saving, enable_checkpointing=True)
        with pytest.raises(Stopped):
            trainer.fit(Module())
        assert counted(server.address) == [1, 4]
        again, module = DilocoCallback(server.address), Module()
        begin: dict[str, torch.Tensor] = {}

        class Look(Callback):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                begin.update(values(pl_module))

        path = tmp_path / "step=3.ckpt"
        trainer = make_trainer(tmp_path, again, Look(), saving, max_steps=4, enable_checkpointing=True)
        trainer.fit(module, ckpt_path=path)
        assert "of fragments 1 it takes the global parameters" in caplog.text
        adopted = {slot.tensor.name for slot in again.outer._link.layout.fragments[1].slots}
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert {name for name, value in begin.items() if not torch.equal(value, saved[name])} == adopted
        # Of fragment 0 step 1 was counted before, and 2 to 4 now; of fragment 1 it was 1 to 4, and one on top of them.
        assert counted(server.address) == [1 + 3, 4 + 1]


def test_a_checkpoint_without_a_state_joins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(Module())
    trainer.save_checkpoint(tmp_path / "alone.ckpt")
    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address)
        make_trainer(tmp_path, diloco, max_steps=6).fit(Module(), ckpt_path=tmp_path / "alone.ckpt")
        assert "alone.ckpt has no state of a worker in it" in caplog.text
        assert diloco.outer.stats.steps == 3


def test_a_checkpoint_after_training_can_be_resumed(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK)) as server:
        trainer = make_trainer(tmp_path, DilocoCallback(server.address, worker_id="w"), max_steps=9)
        trainer.fit(Module())
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        diloco, module = DilocoCallback(server.address), Module()
        make_trainer(tmp_path, diloco, max_steps=15).fit(module, ckpt_path=tmp_path / "end.ckpt")
        assert diloco.outer.stats.steps == 15
        assert counted(server.address) == [15, 15]
        assert same(values(module), diloco.outer.global_state_dict())


def test_validation_is_of_theta_and_training_goes_on_with_the_local_parameters(tmp_path: Path) -> None:
    before: list[dict[str, torch.Tensor]] = []

    class Remember(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            before.append(values(pl_module))

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if before:
                assert same(values(pl_module), before[-1])

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            assert same(values(pl_module), diloco.outer.global_state_dict())
            assert not same(values(pl_module), before[-1]), "there is local work that θ does not have"

    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address)
        record, saving = Record(), checkpoints(tmp_path, monitor="val_loss")
        options = {"max_steps": 8, "val_check_interval": 2, "limit_val_batches": 2, "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, diloco, Remember(), saving, logger=record, **options)
        trainer.fit(Module())
        rows = [row for _, row in record.rows]
        losses = [row["val_loss"] for row in rows if "val_loss" in row]
        assert len(losses) == 3
        assert [row["diloco/global_loss"] for row in rows if "diloco/global_loss" in row] == losses
        saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
        assert same(saved, before[4]), "a checkpoint that validation leads to has the local parameters"


def test_validation_of_the_local_parameters_on_request(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK)) as server:
        diloco, record, module = DilocoCallback(server.address, evaluate="local"), Record(), Module()
        trainer = make_trainer(tmp_path, diloco, logger=record, max_steps=2, val_check_interval=2, limit_val_batches=1)
        trainer.fit(module)
        assert not same(module.validated[0], values(module))
        assert not any("diloco/global_loss" in row for _, row in record.rows)


def test_a_checkpoint_in_the_midst_of_validation_has_the_local_parameters(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "midst.ckpt")
            raise Stopped

    with serve(RunConfig(**QUICK)) as server:
        diloco, module = DilocoCallback(server.address, worker_id="w"), Module()
        with pytest.raises(Stopped):
            make_trainer(tmp_path, diloco, Fail(), limit_val_batches=1).fit(module)
        assert not same(module.validated[0], values(module))
        again, module = DilocoCallback(server.address), Module()
        make_trainer(tmp_path, again, max_steps=-1, max_epochs=2).fit(module, ckpt_path=tmp_path / "midst.ckpt")
        assert counted(server.address) == [again.outer.stats.steps] * 2


def test_the_logger_gets_what_the_worker_counts(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK)) as server:
        diloco, record = DilocoCallback(server.address), Record()
        data = DataLoader(TensorDataset(*make_data(80)), 4)
        make_trainer(tmp_path, diloco, logger=record, log_every_n_steps=5).fit(Module(), data)
        rows = [(step, row) for step, row in record.rows if "diloco/rounds" in row]
        assert [(step, row["diloco/counted"]) for step, row in rows] == [(4, 1), (9, 3), (14, 5), (19, 6)]
        names = {"stall_share", "bytes_up", "bytes_down", "rounds", "counted", "not_counted"}
        assert rows[0][1].keys() >= {f"diloco/{name}" for name in names}
        eventually(lambda: (last_loss(server.address) or 0) > 0)


@pytest.mark.parametrize(("report", "tokens"), [(True, 20 * 2 * 4), (lambda batch: batch[0].numel(), 20 * 2 * 4 * 5)])
def test_contributions_are_weighed_by_examples_or_what_a_function_says(
    report: Any, tokens: int, tmp_path: Path
) -> None:
    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address, worker_id="w", report_tokens=report)
        data = DataLoader(TensorDataset(*make_data(32)), 4)
        make_trainer(tmp_path, diloco, accumulate_grad_batches=2).fit(Module(), data)
        assert counted(server.address) == [20, 20]
        assert counted(server.address, "tokens") == [tokens, tokens]


def test_manual_optimization_with_several_optimizers_counts_one_step_each_time(tmp_path: Path) -> None:
    class Manual(Module):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.layers[i].parameters(), lr=0.01) for i in (0, 2)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(self.layers(batch[0]), batch[1]))
                optimizer.step()

    with serve(RunConfig(**QUICK)) as server:
        diloco = DilocoCallback(server.address, worker_id="w")
        make_trainer(tmp_path, diloco, max_steps=2 * 8).fit(Manual())  # Lightning counts each optimizer's steps
        assert diloco.outer.stats.steps == 8
        assert counted(server.address) == [8, 8]
        assert counted(server.address, "tokens") == [8 * 4, 8 * 4]


def test_two_workers_end_on_the_same_theta_which_is_saved(tmp_path: Path, together: Any) -> None:
    with serve(RunConfig(**QUICK, min_workers=2, grace_seconds="inf")) as server:

        def train(index: int) -> dict[str, torch.Tensor]:
            module = Module()
            if index == 0:
                diloco = DilocoCallback(server.address, save_global="theta.safetensors")
                make_trainer(tmp_path, diloco, max_steps=14).fit(module)
                return values(module)
            optimizer, (x, y) = module.configure_optimizers(), make_data(4, 7)
            with diloco_client.join(server.address, module, optimizer) as outer:
                for _ in range(11):
                    outer.report(tokens=4)
                    module.training_step((x, y), 0).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                outer.flush(together=True)
            return values(module)

        first, second = together(2, train)
    assert same(first, second)
    assert same(safetensors.torch.load_file(tmp_path / "theta.safetensors"), first)


def test_the_training_data_may_ask_for_the_shard(tmp_path: Path) -> None:
    class Sharded(Module):
        def train_dataloader(self) -> Any:
            data = TensorDataset(*make_data(12))
            return DataLoader(data, 4, sampler=diloco_client.ShardedSampler(diloco.outer, data))

    with serve(RunConfig(**QUICK, min_workers=1)) as server:
        diloco = DilocoCallback(server.address)
        make_trainer(tmp_path, diloco, max_steps=3).fit(Sharded())
        assert (diloco.shard.index, diloco.shard.count) == (0, 1)


def test_training_ends_when_the_run_does(tmp_path: Path) -> None:
    with serve(RunConfig(**QUICK, stop_after_rounds=2)) as server:
        diloco = DilocoCallback(server.address)
        trainer = make_trainer(tmp_path, diloco, max_steps=1000)
        trainer.fit(Module())
        assert 6 < trainer.global_step < 1000
        assert diloco.outer.base_digests() == server_digests(server.address)


class TestSigterm:
    """With `sigterm_seconds`; what SIGTERM did before is the test's own handler."""

    @pytest.fixture
    def received(self) -> Any:
        received: list[int] = []
        former = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        yield received
        signal.signal(signal.SIGTERM, former)

    @pytest.mark.parametrize(("hook", "steps"), [("on_before_optimizer_step", 4), ("on_train_batch_end", 3)])
    def test_what_is_left_is_pushed(self, hook: str, steps: int, received: list[int], tmp_path: Path) -> None:
        class Signal(Callback):
            def send(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

        setattr(Signal, hook, Signal.send)
        with serve(RunConfig(**QUICK)) as server:
            diloco = DilocoCallback(server.address, worker_id="w", sigterm_seconds=20)
            with pytest.raises(SystemExit):
                make_trainer(tmp_path, diloco, Signal()).fit(Module())
            assert received
            assert diloco.outer.closed
            eventually(lambda: worker_states(server.address) == {"w": "gone"})
            eventually(lambda: counted(server.address) == [steps, steps])


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "diloco_client.integrations.lightning")
    with pytest.raises(ImportError, match=r"pip install '\.\[lightning\]'"):
        importlib.import_module("diloco_client.integrations.lightning")


def test_join_takes_lightnings_optimizers() -> None:
    module = Module()
    optimizer = module.configure_optimizers()
    x, y = make_data(4)
    with (
        serve(RunConfig(**QUICK)) as server,
        diloco_client.join(server.address, module, LightningOptimizer(optimizer)) as outer,
    ):
        module.training_step((x, y), 0).backward()
        optimizer.step()
        assert outer.stats.steps == 1
