"""A training script of its own process: `process_worker.py ADDRESS NAME FLAG` trains until the file FLAG exists, then
ends together with the others and prints the digests of its bases."""

import json
import sys
import time
from pathlib import Path

import torch

import diloco_client


def main(address: str, name: str, flag: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.Generator().manual_seed(sum(name.encode()))
    with diloco_client.join(address, model, optimizer, worker_id=name) as outer:
        while not flag.exists():
            x = torch.randn(16, 8, generator=data)
            loss = (model(x) - x.sum(1, keepdim=True).sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            time.sleep(0.02)  # what a larger model would compute
        outer.flush(together=True)
        same = all(torch.equal(v, model.state_dict()[k]) for k, v in outer.global_state_dict().items())
        sys.stdout.write(json.dumps({"digests": outer.base_digests(), "holds_theta": same}))


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
