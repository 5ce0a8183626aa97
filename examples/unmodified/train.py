"""Train a byte-level GPT on one GPU or on the CPU.

python train.py --out out
python train.py --out out --resume out/checkpoint.pt
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, time_, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time_, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time_, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.apply(self._init)
        self.head.weight = self.tokens.weight

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss in nats of the bytes y (batch, context), each after those in x up to its place."""
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), y.flatten())


def load(data: Path | None, limit: int = 4_000_000) -> tuple[Tensor, Tensor]:
    """Training and validation bytes of a file, or of Python's standard library."""
    files = [data] if data else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)[:limit]
    values = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = int(0.9 * len(values))
    return values[:cut], values[cut:]


def batch(values: Tensor, size: int, context: int, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(values) - context, (size,), generator=generator)
    windows = torch.stack([values[s : s + context + 1] for s in starts]).long().to(device)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model: nn.Module, values: Tensor, args: argparse.Namespace) -> float:
    model.eval()
    fixed = torch.Generator().manual_seed(0)
    losses = [model(*batch(values, 32, args.context, args.device, fixed)).item() for _ in range(args.eval_batches)]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a text file; else the source of Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for checkpoint.pt")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--eval-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for one step")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and of the order of the data")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    order = torch.Generator().manual_seed(args.seed)
    train, valid = load(args.data)
    model = GPT(args.context, args.layers, args.heads, args.width).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    autocast = torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != "float32")
    first = 0
    if args.resume:
        saved = torch.load(args.resume, map_location=args.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    compiled = torch.compile(model) if args.compile else model
    if args.eval_only:
        print(f"step {first}: validation loss {evaluate(compiled, valid, args):.4f}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for _ in range(args.accumulate):
            with autocast:
                loss = compiled(*batch(train, args.batch_size, args.context, args.device, order)) / args.accumulate
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            print(f"step {step + 1}: validation loss {evaluate(compiled, valid, args):.4f}", flush=True)
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(saved, args.out / "checkpoint.pt")


if __name__ == "__main__":
    main()
