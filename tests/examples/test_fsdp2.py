"""examples/fsdp2.py, by two ranks under torchrun, beside one that is alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
from pair import EXAMPLES, SETTINGS
from safetensors.torch import load_file

import diloco_client
from diloco_server import RunConfig, serve


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 is in torch 2.6 and later")
def test_two_ranks_are_one_worker_and_end_on_the_same_parameters_as_another(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    commands = {
        "island": [*torchrun, str(EXAMPLES / "fsdp2.py")],
        "alone": [*torchrun[:-1], "1", str(EXAMPLES / "fsdp2.py")],
    }
    with serve(RunConfig(sync_every=8, num_fragments=4, min_workers=2, outer_lr=0.6)) as server:
        processes = [
            subprocess.Popen(
                [*command, "--name", name, "--server", server.address, "--steps", "21"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env=os.environ | SETTINGS,
            )
            for name, command in commands.items()
        ]
        try:
            said = [process.communicate(timeout=100) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], said
        workers = {w["worker_id"]: w for w in diloco_client.status(server.address)["workers"]}
        diloco_client.export(server.address, tmp_path / "theta.safetensors")
    for rank in (0, 1):
        losses = [float(loss) for loss in re.findall(rf"rank {rank}: step \d+, loss ([\d.]+)", said[0][0])]
        assert len(losses) == 3
        assert losses[-1] < losses[0] - 1.5
    assert workers["alone"]["tokens"] == 21 * 16 * 64
    assert workers["island"]["tokens"] == 2 * 21 * 16 * 64, "those of both ranks"
    exported = load_file(tmp_path / "theta.safetensors")
    for shard in (0, 1):
        saved = torch.load(tmp_path / f"theta-{shard}.pt", weights_only=True)
        assert saved.keys() == exported.keys()
        assert all(torch.equal(saved[name], exported[name]) for name in saved)
