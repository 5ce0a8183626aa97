"""examples/plain.py, by two processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pair import outputs_of_two
from safetensors.torch import load_file

import diloco_client
from diloco_server import RunConfig, serve


@pytest.mark.timeout(300)
def test_two_workers_learn_and_end_on_the_same_parameters(tmp_path: Path) -> None:
    with serve(RunConfig(sync_every=8, num_fragments=4, min_workers=2, outer_lr=0.6)) as server:
        outputs = outputs_of_two("plain.py", tmp_path, "--server", server.address, "--steps", "21")
        workers = diloco_client.status(server.address)["workers"]
        diloco_client.export(server.address, tmp_path / "theta.safetensors")
    for output in outputs:
        losses = [float(loss) for loss in re.findall(r"step \d+, loss ([\d.]+)", output)]
        assert len(losses) == 3
        assert losses[-1] < losses[0] - 1.5
    assert all(w["counted"] >= 4 and w["tokens"] == 21 * 16 * 64 and w["loss"] < 5 for w in workers)
    exported = load_file(tmp_path / "theta.safetensors")
    for shard in range(2):
        saved = torch.load(tmp_path / f"theta-{shard}.pt", weights_only=True)
        assert saved.keys() == exported.keys()
        assert all(torch.equal(saved[name], exported[name]) for name in saved)
