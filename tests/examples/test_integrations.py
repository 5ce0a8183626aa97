"""examples/huggingface.py and examples/lightning_module.py, each by two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pair import SETTINGS, outputs_of_two
from safetensors.torch import load_file

import diloco_client
from diloco_server import RunConfig, serve

CONFIG: dict[str, Any] = {"sync_every": 4, "num_fragments": 2, "overlap_steps": 1, "min_workers": 2}


def check_end(address: str, folder: Path, result: str) -> None:
    """Both workers have made 6 steps and left, and have saved what the server has."""
    workers = diloco_client.status(address)["workers"]
    assert [(worker["steps"], worker["state"]) for worker in workers] == [(6, "gone")] * 2
    diloco_client.export(address, folder / "exported")
    theta = load_file(folder / "exported")
    for name in "ab":
        saved = load_file(folder / name / result)
        assert all(torch.equal(saved[key], value) for key, value in theta.items())


def test_transformers(tmp_path: Path) -> None:
    with serve(RunConfig(**CONFIG, grace_seconds="inf")) as server:
        arguments = ("--server", server.address, "--steps", "6", "--every", "3", "--out", str(tmp_path))
        outputs = outputs_of_two("huggingface.py", tmp_path, *arguments)
        check_end(server.address, tmp_path, "theta/model.safetensors")
    for name, output in zip("ab", outputs, strict=True):
        assert "'diloco/global_loss'" in output
        assert f"{tmp_path / name / 'theta'} holds the global parameters" in output
        assert (tmp_path / name / "checkpoint-6" / "diloco_state.pt").exists()


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(RunConfig(**CONFIG, grace_seconds="inf")) as server:
        monkeypatch.setitem(SETTINGS, "DILOCO_URL", server.address)
        arguments = ("--steps", "6", "--every", "3", "--out", str(tmp_path))
        outputs = outputs_of_two("lightning_module.py", tmp_path, *arguments)
        check_end(server.address, tmp_path, "theta.safetensors")
    for name, output in zip("ab", outputs, strict=True):
        assert f"{tmp_path / name / 'theta.safetensors'} holds the global parameters" in output
        assert "diloco" in torch.load(tmp_path / name / "last.ckpt", weights_only=True)
