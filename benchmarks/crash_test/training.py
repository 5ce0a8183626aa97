"""What the workers of the crash test train: a small byte-level GPT on the standard library's source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from diloco_client.demo import corpus
from diloco_client.demo.model import ByteGPT, ModelConfig

MODEL = ModelConfig(layers=2, width=64, heads=2, context=32)
BATCH = 8
LEARNING_RATE = 3e-3
VALIDATION_WINDOWS = 512


def build(seed: int) -> tuple[ByteGPT, torch.optim.AdamW]:
    """Model and inner optimizer: equal weights for equal seeds."""
    torch.manual_seed(seed)
    model = ByteGPT(MODEL)
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)


def batches(index: int, workers: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of one worker's share of the text."""
    text = corpus.divide(corpus.standard_library(), workers)
    return corpus.batches(corpus.read_bytes(text.shards[index]), size=BATCH, context=MODEL.context, seed=seed)


def train_step(model: ByteGPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    model(*batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def validation_loss(theta: Path, workers: int) -> float:
    """Nats a byte of the parameters in a safetensors file, on text that no worker trains on."""
    model = ByteGPT(MODEL)
    missing, unexpected = model.load_state_dict(safetensors.torch.load_file(theta), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"head.weight"}, "only what is tied may be missing"
    data = corpus.read_bytes(corpus.divide(corpus.standard_library(), workers).validation)
    return float(model(*corpus.spread(data, size=VALIDATION_WINDOWS, context=MODEL.context)))
