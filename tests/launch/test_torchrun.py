"""Under torchrun: the processes that train are children of the command's own, and several are one worker."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import diloco_client
from diloco_server import RunConfig, serve

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
CONFIG = {"sync_every": 4, "num_fragments": 2, "overlap_steps": 1, "grace_seconds": "inf"}

SCRIPT = """
    import os, sys
    import torch
    from torch import nn
    from torch.distributed import destroy_process_group, get_rank, init_process_group
    from torch.nn.parallel import DistributedDataParallel

    init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    if "ddp" in sys.argv:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(get_rank())
    for step in range(10):
        x = torch.randn(8, 4, generator=data)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    destroy_process_group()
    print("destroyed", flush=True)
"""


def test_two_ranks_of_ddp_are_one_worker(script, run, tmp_path: Path) -> None:
    """It flushes before the script ends its process group, which it needs for that."""
    with serve(RunConfig(**CONFIG)) as server:
        command = ["--export", "theta.safetensors", "--", *TORCHRUN, "--nproc-per-node=2", script(SCRIPT), "ddp"]
        done = run("--server", server.address, "--worker-id", "island", *command)
        assert done.returncode == 0, done.stderr
        (worker,) = diloco_client.status(server.address)["workers"]
        diloco_client.export(server.address, tmp_path / "of-server.safetensors")
    assert (worker["worker_id"], worker["steps"], worker["state"]) == ("island", 9, "gone")
    assert done.stdout.count("destroyed") == 2
    assert "nothing has joined the run" not in done.stderr
    mine, its = load_file(tmp_path / "theta.safetensors"), load_file(tmp_path / "of-server.safetensors")
    assert list(mine) == list(its) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_ranks_that_train_each_for_itself(script, run) -> None:
    with serve(RunConfig(**CONFIG, min_workers=2)) as server:
        command = ["--island", "none", "--worker-id", "box", "--", *TORCHRUN, "--nproc-per-node=2", script(SCRIPT)]
        done = run("--server", server.address, *command)
        assert done.returncode == 0, done.stderr
        workers = diloco_client.status(server.address)["workers"]
    assert sorted((w["worker_id"], w["steps"]) for w in workers) == [("box-0", 9), ("box-1", 9)]
