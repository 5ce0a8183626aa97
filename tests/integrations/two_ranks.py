"""One rank of a worker of two, under torchrun: `two_ranks.py lightning|transformers ADDRESS FOLDER`. It writes the
records that it has trained on, by batches, to FOLDER/RANK.json."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import diloco_client

RECORDS, BATCH = 32, 4


def lightning(address: str, folder: Path) -> list[list[int]]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from diloco_client.integrations.lightning import DilocoCallback

    seen: list[list[int]] = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            seen.append(batch.flatten().int().tolist())
            return self.layer(batch / RECORDS).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            data = [torch.tensor([float(record)]) for record in range(RECORDS)]
            return DataLoader(data, BATCH, sampler=diloco_client.ShardedSampler(diloco.outer, data))

    diloco = DilocoCallback(address, worker_id="w")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[diloco, ModelCheckpoint(folder, "last")],
        **quiet,
    )
    trainer.fit(Module())
    trainer.save_checkpoint(folder / "after.ckpt")
    return seen


def transformers(address: str, folder: Path) -> list[list[int]]:
    from transformers import Trainer, TrainingArguments

    from diloco_client.integrations.transformers import DilocoCallback

    seen: list[list[int]] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            seen.append(x.flatten().int().tolist())
            return {"loss": self.layer(x / RECORDS).square().mean()}

    diloco = DilocoCallback(address, worker_id="w")
    data = [{"x": torch.tensor([float(record)])} for record in range(RECORDS)]
    options = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(
        str(folder), max_steps=RECORDS // (2 * BATCH), per_device_train_batch_size=BATCH, **options
    )
    trainer = Trainer(Model(), args, train_dataset=diloco_client.shard_stream(diloco, data))
    diloco.attach(trainer)
    trainer.train()
    return seen


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _, kind, address, folder = sys.argv
    seen = globals()[kind](address, Path(folder))
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(seen))
