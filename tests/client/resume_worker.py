"""A training script that survives: `resume_worker.py ADDRESS NAME DIRECTORY STEPS` trains STEPS inner steps in all,
with a checkpoint every three. Started again it goes on from the last. It writes each step's number to DIRECTORY/step,
and at its end prints what it holds."""

import json
import sys
import time
from pathlib import Path

import torch

import diloco_client


def main(address: str, name: str, directory: Path, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    path, state, done = directory / "checkpoint", None, 0
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state, done = checkpoint["outer"], checkpoint["step"]
    with diloco_client.join(address, model, optimizer, worker_id=name, state=state) as outer:
        for number in range(done + 1, steps + 1):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
            optimizer.step()
            if number % 3 == 0:
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "outer": outer.state_dict(),
                        "step": number,
                    },
                    directory / "checkpoint.tmp",
                )
                (directory / "checkpoint.tmp").replace(path)
            (directory / "step.tmp").write_text(str(number))
            (directory / "step.tmp").replace(directory / "step")
            time.sleep(0.02)  # what a larger model would compute
        outer.flush()
        report = {"from": done, "digests": outer.base_digests(), "steps": outer.stats.steps}
    sys.stdout.write(json.dumps(report))


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
