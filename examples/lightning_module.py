"""A LightningModule: a byte-level GPT on the source of Python's standard library.

On each machine: `python examples/lightning_module.py`, with the server's join URL in DILOCO_URL. Started again with the
same --name it goes on from its last checkpoint.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import diloco_client
from diloco_client.integrations.lightning import DilocoCallback

CONTEXT = 128


class GPT(LightningModule):
    def __init__(self, diloco: DilocoCallback, layers: int = 4, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.diloco = diloco
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
        self.windows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)

    def training_step(self, batch: Tensor) -> Tensor:
        """`batch` is (batch, CONTEXT + 1) uint8."""
        x, y = batch[:, :-1].long(), batch[:, 1:].long()
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=x.device)
        h = self.blocks(self.bytes(x) + self.places.weight, mask, is_causal=True)
        return functional.cross_entropy(self.head(h).flatten(0, 1), y.flatten())

    def validation_step(self, batch: Tensor) -> None:
        self.log("val_loss", self.training_step(batch), prog_bar=True)  # of the global parameters

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        data = self.windows[64:]
        return DataLoader(data, 16, sampler=diloco_client.ShardedSampler(self.diloco.outer, data))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.windows[:64], 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", help="join URL, file:PATH or HOST:PORT; else DILOCO_URL or DILOCO_URL_FILE")
    parser.add_argument("--name", default="gpt", help="of this worker, another on each machine")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="steps between two evaluations and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of checkpoints, logs and model")
    args = parser.parse_args()
    folder, save = args.out / args.name, {"save_global": "theta.safetensors", "report_tokens": Tensor.numel}
    diloco = DilocoCallback(args.server, worker_id=args.name, sigterm_seconds=30, **save)
    trainer = Trainer(
        max_steps=args.steps,
        callbacks=[diloco, ModelCheckpoint(folder, every_n_train_steps=args.every, save_last=True)],
        log_every_n_steps=10,
        val_check_interval=args.every,
        default_root_dir=folder,
    )
    trainer.fit(GPT(diloco), ckpt_path="last")
    print(f"{args.name}: {folder / 'theta.safetensors'} holds the global parameters")


if __name__ == "__main__":
    main()
