"""Several GPUs as one worker: a byte-level GPT, sharded with FSDP2, on the source of Python's standard library.

On each machine, with the server's join URL in DILOCO_URL: `torchrun --nproc-per-node gpu examples/fsdp2.py`. Without a
GPU, `--nproc-per-node 2` trains on the CPU.
"""

import argparse
import itertools
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import diloco_client

CONTEXT = 64


class GPT(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        kind = {"batch_first": True, "norm_first": True, "dropout": 0.0}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 4 * width, **kind) for _ in range(4))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=x.device)
        h = self.bytes(x) + self.places.weight
        for block in self.blocks:
            h = block(h, mask, is_causal=True)
        return self.head(h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", help="join URL, file:PATH or HOST:PORT; else DILOCO_URL or DILOCO_URL_FILE")
    parser.add_argument("--name", help="of this worker; else one that torchrun's restarts keep")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    model = GPT().to(device)
    for part in (*model.blocks, model):
        fully_shard(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = b"".join(f.read_bytes() for f in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data = torch.frombuffer(bytearray(text[len(text) % (CONTEXT + 1) :]), dtype=torch.uint8).view(-1, CONTEXT + 1)
    with diloco_client.join(args.server, model, optimizer, worker_id=args.name, sigterm_seconds=30) as outer:
        loader = DataLoader(data, 16, sampler=diloco_client.ShardedSampler(outer, data))  # this rank's share
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))  # one after another
        for step, batch in enumerate(itertools.islice(epochs, args.steps)):
            x = batch.to(device, torch.int64)
            loss = cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            loss.backward()
            outer.report(tokens=x[:, 1:].numel(), loss=loss)  # of this rank
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                print(f"rank {dist.get_rank()}: step {step}, loss {loss.item():.3f}", flush=True)
            if outer.should_stop:  # so for all ranks at once
                break
        outer.flush(together=True)  # all workers end on the same parameters
        theta = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            torch.save(theta, f"theta-{outer.shard.index}.pt")
    dist.destroy_process_group()


main()
