"""examples/convnet.py, by two processes: its BatchNorm statistics are averaged too."""

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
def test_two_workers_learn_to_read_and_end_on_the_same_parameters(tmp_path: Path) -> None:
    rounds = {"sync_every": 12, "num_fragments": 4, "min_workers": 2}
    with serve(RunConfig(**rounds, outer_lr=0.8, outer_momentum=0.3)) as server:  # in 8 rounds more would overshoot
        outputs = outputs_of_two("convnet.py", tmp_path, "--server", server.address, "--steps", "100")
        diloco_client.export(server.address, tmp_path / "theta.safetensors")
    read = [[float(share) for share in re.findall(r"reads? ([\d.]+)%", output)] for output in outputs]
    assert all(len(shares) == 3 and shares[-1] > 80 for shares in read), outputs
    assert read[0][-1] == read[1][-1]
    exported = load_file(tmp_path / "theta.safetensors")
    assert any("running_mean" in name for name in exported)
    for shard in range(2):
        saved = torch.load(tmp_path / f"convnet-{shard}.pt", weights_only=True)
        own = {name for name in saved if name.endswith("num_batches_tracked")}
        assert saved.keys() - own == exported.keys()
        assert all(torch.equal(saved[name], exported[name]) for name in exported)
