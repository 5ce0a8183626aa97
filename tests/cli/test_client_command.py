"""diloco-client as a process: status and export of a run, with and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import diloco_client

CLIENT = [sys.executable, "-m", "diloco_cli.client"]
SERVER = [sys.executable, "-m", "diloco_cli.server"]


class Tied(nn.Module):
    """A tied head, a frozen table and bfloat16."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(30, 8)
            self.body = nn.Linear(8, 8)
            self.low = nn.Linear(8, 8).to(torch.bfloat16)
            self.head = nn.Linear(8, 30, bias=False)
            self.table = nn.Parameter(torch.randn(11), requires_grad=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(self.embed(x))
        return self.head(self.low(x.to(torch.bfloat16)).float())


def client(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLIENT, *arguments], env=os.environ | env, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, torch.Tensor], Path]]:
    """A server seeded from a file, after one worker has trained: its address, theta, and the file."""
    folder = tmp_path_factory.mktemp("run")
    first = {k: v.contiguous().clone() for k, v in Tied(1).state_dict().items() if k != "head.weight"}
    save_file(first, folder / "init.safetensors")
    arguments = ["--port", "0", "--init", str(folder / "init.safetensors"), "--sync-every", "3", "--num-fragments", "2"]
    arguments += ["--state-dir", str(folder / "state")]
    with (folder / "server.log").open("w") as log:  # pytest keeps the folder: it says why when this fixture fails
        process = subprocess.Popen(
            [*SERVER, *arguments, "--overlap-steps", "1"], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split("listening on ")[1].split()[0]
        process.stdout.readline()
        model = Tied(2)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        with diloco_client.join(address, model, optimizer, worker_id="alice") as outer:
            for name, value in model.state_dict().items():
                assert torch.equal(value, first["embed.weight" if name == "head.weight" else name])
            for step in range(7):
                x = torch.arange(30).roll(step)
                nn.functional.cross_entropy(model(x), x).backward()
                optimizer.step()
                optimizer.zero_grad()
            outer.flush()
            theta = {name: value.clone() for name, value in outer.global_state_dict().items()}
        yield address, theta, folder / "init.safetensors"
    finally:
        process.kill()
        process.communicate()


def test_export_is_a_state_dict_of_the_model(run, tmp_path: Path) -> None:
    address, theta, init = run
    path = tmp_path / "out.safetensors"
    done = client("export", address, str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert str(path) in done.stdout
    assert "6 tensors" in done.stdout
    exported, before = load_file(path), load_file(init)
    assert exported.keys() == before.keys()
    for name, value in exported.items():
        assert value.dtype == before[name].dtype
        assert value.shape == before[name].shape
        if name in theta:
            assert torch.equal(value, theta[name].to(value.dtype))
    assert not torch.equal(exported["body.weight"], before["body.weight"])
    assert torch.equal(exported["table"], before["table"])
    with safe_open(path, "pt") as file:
        assert file.metadata()["tied.embed.weight"] == "head.weight"
    model = Tied(3)
    missing, unexpected = model.load_state_dict(exported, strict=False)
    assert (missing, unexpected) == (["head.weight"], []), "it is tied"
    assert torch.equal(model.head.weight, exported["embed.weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_status_as_a_table(run) -> None:
    done = client("status", run[0], COLUMNS="160")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("finished", "alice", "gone", "H=3 P=2", "int4 up, int4 down", "waiting for", "(frozen)"):
        assert word in done.stdout


def test_status_with_past_rounds(run) -> None:
    done = client("status", run[0], "--rounds", "2", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "missed" in done.stdout
    assert " 1.00" in done.stdout


def test_status_as_json(run) -> None:
    done = client("status", run[0], "--json")
    assert (done.returncode, done.stderr) == (0, "")
    values = json.loads(done.stdout)
    assert values["workers"][0]["worker_id"] == "alice"
    assert values["workers"][0]["step"] == 7
    assert values["config"]["sync_every"] == "3"
    assert [f["kind"] for f in values["fragments"]] == ["trained", "trained", "frozen"]
    assert values["rounds"] == sum(f["version"] for f in values["fragments"]) >= 4
    moving = ("uptime_seconds", "workers", "fragments", "rates", "storage")
    assert values == diloco_client.status(run[0]) | {k: values[k] for k in moving}


def test_kept_snapshots_are_listed_and_exported(run, tmp_path: Path) -> None:
    address, _, init = run
    done = client("snapshots", address, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (first,) = json.loads(done.stdout)
    assert (first["number"], first["version"]) == (0, 0)
    assert " 0 " in client("snapshots", address).stdout
    path = tmp_path / "first.safetensors"
    assert client("export", address, str(path), "--snapshot", "0").returncode == 0
    exported, given = load_file(path), load_file(init)
    assert exported.keys() == given.keys()
    assert all(torch.equal(exported[name], given[name]) for name in given)
    nothing = client("export", address, str(path), "--snapshot", "7")
    assert nothing.returncode == 1
    assert "no snapshot 7 is kept; there are: 0" in one_line(nothing)


def test_status_and_export_need_no_torch(run, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from diloco_cli.client import main\n"
        "main(sys.argv[1:], prog_name='diloco-client')"
    )
    for arguments in (["status", run[0], "--json"], ["export", run[0], str(path)]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert load_file(path)["body.weight"].shape == (8, 8)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize("command", [["status"], ["export", "out.safetensors"]])
def test_an_address_that_is_none_or_where_nobody_answers(command: list[str], tmp_path: Path) -> None:
    command, rest = command[:1], [str(tmp_path / a) for a in command[1:]]
    wrong = client(*command, "nonsense", *rest)
    assert wrong.returncode == 1
    assert "'nonsense' is not a server address: write HOST:PORT" in one_line(wrong)
    nobody = client(*command, "127.0.0.1:1", *rest, "--timeout", "1")
    assert nobody.returncode == 1
    assert "no diloco-server answered at 127.0.0.1:1 within 1 s" in one_line(nobody)


def test_places_that_cannot_be_written(run, tmp_path: Path) -> None:
    nowhere = client("export", run[0], str(tmp_path / "nowhere" / "out.safetensors"))
    assert nowhere.returncode == 2
    assert "nowhere is not a directory" in one_line(nowhere)
    (tmp_path / "out.safetensors.tmp").mkdir()
    blocked = client("export", run[0], str(tmp_path / "out.safetensors"))
    assert blocked.returncode == 1
    assert f"cannot write {tmp_path / 'out.safetensors'}" in one_line(blocked)


def test_without_a_command_it_shows_its_help() -> None:
    done = client()
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    for command in ("demo", "status", "export"):
        assert command in done.stderr
