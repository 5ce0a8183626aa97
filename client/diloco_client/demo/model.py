"""A byte-level GPT of about a million parameters, small enough to learn something in a minute on one core.

Pre-norm transformer with rotary positions, RMSNorm without weights, relu² and an output head tied to the
embedding. Four layers, so that four fragments of one layer each make sense.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB = 256
"""Tokens are bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of the demo's model."""

    layers: int = 4
    width: int = 144
    heads: int = 3
    context: int = 128
    """Longest sequence, in bytes."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C); cos and sin are (T, C / heads / 2)."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3 * self.heads, width // self.heads).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)  # each (B, heads, T, C / heads)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a feed-forward layer four times as wide, each on the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attention(norm(x), cos, sin)
        return x + self.down(functional.relu(self.up(norm(x))).square())  # type: ignore[no-any-return]


class ByteGPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        cos, sin = rotary_tables(config.context, config.width // config.heads)
        # Recomputed by every worker from the sizes alone: not state, so it neither travels nor is saved.
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """Residual branches start at zero: the fresh model is an embedding and its head."""
        # Small, since it is the head too: the first predictions are then nearly uniform over the bytes.
        nn.init.normal_(self.embedding.weight, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.down.weight)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets: (B, T) int64, T at most the context. The mean cross-entropy in nats a byte."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]  # type: ignore[index]
        x = norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension."""
    return functional.rms_norm(x, (x.shape[-1],))


def rotary_tables(length: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, each (length, head_width / 2)."""
    frequencies = 10000.0 ** -(torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs of channels of each head by their position's angles. x: (B, heads, T, head_width)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(p.numel() for p in model.parameters())
