"""A plain training loop: a byte-level GPT on the source of Python's standard library.

On each machine: `python examples/plain.py`, with the server's join URL in DILOCO_URL.
"""

import argparse
import itertools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import diloco_client

CONTEXT = 64


class GPT(nn.Module):
    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time) int64 -> logits, (batch, time, 256)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        h = self.bytes(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h, mask, is_causal=True)
        return self.head(self.norm(h))


def windows() -> Tensor:
    """(windows, CONTEXT + 1) uint8: the same on every machine with the same Python."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    return text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", help="join URL, file:PATH or HOST:PORT; else DILOCO_URL or DILOCO_URL_FILE")
    parser.add_argument("--name", help="of this worker, the same when it is started again")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = windows()
    with diloco_client.join(args.server, model, optimizer, worker_id=args.name, sigterm_seconds=30) as outer:
        loader = DataLoader(data, 16, sampler=diloco_client.ShardedSampler(outer, data))
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))  # one after another
        for step, batch in enumerate(itertools.islice(epochs, args.steps)):
            x = batch.to(device, torch.int64)
            loss = cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            outer.report(tokens=x[:, 1:].numel())  # contributions are weighed by tokens
            if step % 10 == 0:
                outer.report(loss=loss)
                print(f"{outer.worker_id}: step {step}, loss {loss.item():.3f}", flush=True)
            optimizer.step()
            optimizer.zero_grad()
            if outer.should_stop:
                break
        outer.flush(together=True)  # all workers end on the same parameters
        torch.save(outer.global_state_dict(), path := f"theta-{outer.shard.index}.pt")
        print(f"{outer.worker_id}: {path} holds the global parameters")


if __name__ == "__main__":
    main()
