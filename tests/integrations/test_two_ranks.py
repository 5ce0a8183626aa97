"""Two ranks that are one worker: between them they train on all of its data, and a checkpoint has what both need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_ranks import BATCH, RECORDS

import diloco_client
from diloco_server import RunConfig, serve

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CONFIG = {"sync_every": 4, "num_fragments": 1, "overlap_steps": 1}


@pytest.mark.parametrize("kind", ["lightning", "transformers"])
def test_the_ranks_of_a_worker_leave_out_none_of_its_data(kind: str, tmp_path: Path) -> None:
    with serve(RunConfig(**CONFIG)) as server:
        command = [*TORCHRUN, Path(__file__).with_name("two_ranks.py"), kind, server.address, tmp_path]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        (worker,) = diloco_client.status(server.address)["workers"]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(batches) for batches in seen] == [RECORDS // (2 * BATCH)] * 2
    assert sorted(record for batches in seen for batch in batches for record in batch) == list(range(RECORDS))
    assert (worker["worker_id"], worker["steps"]) == ("w", RECORDS // (2 * BATCH))
    if kind == "lightning":
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert sorted(checkpoint["diloco"]) == ["rank0", "rank1"]
        assert "diloco" not in torch.load(tmp_path / "after.ckpt", weights_only=True), "it takes ranks in a run"
