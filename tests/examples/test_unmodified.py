"""examples/unmodified/train.py, which knows nothing of diloco, with two workers in one run, against one alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diloco_client
from diloco_server import RunConfig, serve

SCRIPT = Path(__file__).parents[2] / "examples" / "unmodified" / "train.py"
STEPS = 250
SETTINGS = [
    *("--steps", str(STEPS), "--batch-size", "2", "--lr", "6e-3", "--warmup", "20"),
    *("--context", "32", "--layers", "2", "--width", "48", "--eval-every", str(STEPS), "--device", "cpu"),
]
"""Little data in each step and a learning rate that stays high: there is noise, of which two workers see more."""


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the script in a folder; what is still running at the end is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*launcher, sys.executable, str(SCRIPT), *SETTINGS, *arguments],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def loss_of(process: subprocess.Popen[str]) -> float:
    """The validation loss that the script prints last."""
    out, err = process.communicate()  # the test's own limit ends it
    assert process.returncode == 0, err
    return float(re.findall(r"validation loss ([\d.]+)", out)[-1])


def test_it_knows_nothing_of_diloco() -> None:
    assert "diloco" not in SCRIPT.read_text().lower()
    assert len(SCRIPT.read_text().splitlines()) < 80


@pytest.mark.timeout(300)
def test_two_unmodified_workers_do_better_than_one_alone(start: Start, tmp_path: Path) -> None:
    rounds = {"sync_every": 10, "num_fragments": 2, "overlap_steps": 2, "min_workers": 2, "grace_seconds": "inf"}
    with serve(RunConfig(**rounds, outer_lr=1.0, outer_momentum=0.0)) as server:  # plain means: the run is short
        run = (sys.executable, "-m", "diloco_cli.client", "run", "--server", server.address, "--together")
        launcher = (*run, "--log-level", "warning", "--export", "theta.safetensors", "--")
        folders = [tmp_path / "first", tmp_path / "second"]
        for folder in folders:
            folder.mkdir()
        workers = [
            start(folder, "--seed", str(seed), launcher=launcher) for seed, folder in enumerate(folders, start=1)
        ]
        local = [loss_of(worker) for worker in workers]
        status = diloco_client.status(server.address)
    assert [w["steps"] for w in status["workers"]] == [STEPS - 1] * 2

    first, second = (load_file(folder / "theta.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    checkpoint = torch.load(folders[0] / "checkpoint.pt")
    assert checkpoint["step"] == STEPS
    checkpoint["model"].update(first)
    torch.save(checkpoint, tmp_path / "theta.pt")
    evaluated, lone = start(tmp_path, "--resume", "theta.pt", "--eval-only"), start(tmp_path, "--save", "alone.pt")
    together, alone = loss_of(evaluated), loss_of(lone)
    assert together < alone - 0.05, (together, alone, local)


def test_its_switches_work_under_the_launcher(start: Start, tmp_path: Path) -> None:
    """float16 with a scaler, accumulation and its own checkpoint, from which a second process goes on."""
    small = ("--layers", "1", "--width", "16", "--context", "8", "--eval-every", "8")
    short = (*small, "--steps", "8", "--dtype", "float16", "--accumulate", "2")
    with serve(RunConfig(sync_every=4, num_fragments=2, overlap_steps=1)) as server:
        launcher = (sys.executable, "-m", "diloco_cli.client", "run", "--server", server.address, "--")
        assert loss_of(start(tmp_path, *short, launcher=launcher)) < 7
        longer = (*short, "--steps", "12", "--resume", "checkpoint.pt")
        assert loss_of(start(tmp_path, *longer, launcher=launcher)) < 7
        first, second = diloco_client.status(server.address)["workers"]
    assert 0 < second["steps"] <= 3
    assert 0 < first["steps"] <= 7
