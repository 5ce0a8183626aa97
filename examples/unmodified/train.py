"""Train a byte-level GPT on one GPU or on the CPU; go on by `--resume checkpoint.pt`."""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn


class GPT(nn.Module):
    def __init__(self, context: int, layers: int, width: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, windows: Tensor) -> Tensor:
        """The mean loss in nats of the bytes of (batch, context + 1), each after those before it."""
        h = self.blocks(self.tokens(windows[:, :-1]) + self.places.weight, self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), windows[:, 1:].flatten())


def batch(values: Tensor, size: int, args: argparse.Namespace, order: torch.Generator) -> Tensor:
    starts = torch.randint(len(values) - args.context, (size,), generator=order)
    return torch.stack([values[s : s + args.context + 1] for s in starts]).long().to(args.device)


@torch.no_grad()
def evaluate(model: nn.Module, values: Tensor, args: argparse.Namespace) -> float:
    fixed = torch.Generator().manual_seed(0)
    return sum(model(batch(values, 64, args, fixed)).item() for _ in range(8)) / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = {"steps": 1000, "warmup": 50, "lr": 2e-3, "batch-size": 16, "accumulate": 1, "eval-every": 100, "seed": 1}
    files = {"data": sysconfig.get_paths()["stdlib"], "save": "checkpoint.pt", "resume": "", "dtype": "float32"}
    for name, default in {**numbers, **files, "context": 128, "layers": 4, "width": 128}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for switch in ("--compile", "--eval-only"):
        parser.add_argument(switch, action="store_true")
    args = parser.parse_args()
    text = b"\n".join(path.read_bytes() for path in sorted(Path(args.data).glob("*.py")))[:4_000_000]
    train, valid = torch.frombuffer(bytearray(text), dtype=torch.uint8).tensor_split([len(text) * 9 // 10])
    order = torch.manual_seed(args.seed)
    model = GPT(args.context, args.layers, args.width).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / args.warmup, total_iters=args.warmup - 1)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    parts, first = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}, 0
    if args.resume:
        saved = torch.load(args.resume, map_location=args.device)
        first = saved.pop("step")
        for name, part in saved.items():
            parts[name].load_state_dict(part)
    compiled = torch.compile(model) if args.compile else model
    for step in range(first + 1, 1 if args.eval_only else args.steps + 1):
        for _ in range(args.accumulate):
            with torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                loss = compiled(batch(train, args.batch_size, args, order)) / args.accumulate
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        if step % args.eval_every == 0:
            print(f"step {step}: validation loss {evaluate(compiled, valid, args):.4f}", flush=True)
            torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, args.save)
    print(f"validation loss {evaluate(compiled, valid, args):.4f} at the end")


if __name__ == "__main__":
    main()
