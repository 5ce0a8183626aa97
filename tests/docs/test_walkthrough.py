"""The README's way from a clone to two workers on a server with TLS, as it stands there, and what follows it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from documents import ROOT, Block, Command, blocks, commands_of
from proxy import Proxy
from safetensors.torch import load_file
from torch import nn

import diloco_client
from diloco_client.transport import Retry
from diloco_server import RunConfig, serve

QUICK = {
    "DILOCO_PORT": "0",
    "DILOCO_SYNC_EVERY": "5",
    "DILOCO_STOP_AFTER_ROUNDS": "1",
    "OMP_NUM_THREADS": "1",
}
"""A free port, and a run that ends soon: what else the commands say is theirs."""

NAME, URL = "vm.example.org", "diloco://TOKEN@vm.example.org:50051?pin=sha256:…"
"""What readers put their own in place of."""


def block_after(document: Path, heading: str, number: int = 0) -> Block:
    """The fenced block of that number under the heading."""
    line = document.read_text().splitlines().index(heading) + 1
    return [b for b in blocks(document) if b.line > line and b.language == ""][number]


def clone(folder: Path) -> Path:
    """What `git clone` and the installation come to: the working tree, with this environment as its .venv."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


class Reader:
    """Somebody who types commands in one folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack

    def start(self, command: Command) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")} | QUICK
        environment |= dict(e.split("=", 1) for e in map(self._mine, command.environment))
        words = [self._mine(word) for word in command.words]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=self.folder, env=environment)
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        return process

    def run(self, command: Command) -> str:
        process = self.start(command)
        output, errors = process.communicate(timeout=280)
        assert process.returncode == 0, (str(command), errors)
        return output

    def _mine(self, word: str) -> str:
        if URL in word:
            return word.replace(URL, (self.folder / "diloco-state" / "join-url").read_text().strip())
        return word.replace(NAME, "127.0.0.1")

    @contextmanager
    def server(self, command: Command) -> Iterator[str]:
        """Runs within the block, until Ctrl-C; its banner."""
        process = self.start(command)
        assert process.stdout is not None
        assert process.stderr is not None
        banner = process.stdout.readline()
        yield banner or process.stderr.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 0


@pytest.mark.timeout(300)
def test_from_a_clone_to_two_workers_in_five_commands(tmp_path: Path) -> None:
    block = block_after(ROOT / "README.md", "## On real machines")
    lines = block.text.splitlines()
    assert len(lines) == 5
    clone_it, _, install, server, *workers = commands_of(block.text, block.where)[:1] + [
        c for c in commands_of(block.text, block.where)[1:] if c.program != "cd"
    ]
    assert (clone_it.words[:2], install.program) == (("git", "clone"), "pip")
    longer = ROOT / "docs" / "getting-started.md"
    there = {c.words for b in blocks(longer) if b.language == "" for c in commands_of(b.text, b.where)}
    assert {clone_it.words, install.words, server.words, workers[0].words} <= there
    [look, _] = commands_of(block_after(longer, "## 3 Watching").text, "")
    [export] = commands_of(block_after(longer, "## 4 The parameters").text, "")
    with ExitStack() as stack:
        reader = Reader(clone(tmp_path / "diloco"), stack)
        with reader.server(server) as banner:
            assert "listening on 0.0.0.0" in banner
            assert "?pin=sha256:" in (reader.folder / "diloco-state" / "join-url").read_text()
            processes = [reader.start(worker) for worker in workers]
            said = [process.communicate(timeout=280) for process in processes]
            assert [p.returncode for p in processes] == [0, 0], said
            status = reader.run(look)
            assert "box-1" in status
            assert "box-2" in status
            reader.run(export)
        theta = load_file(reader.folder / export.words[-1])
        for shard in range(2):
            saved = torch.load(reader.folder / f"theta-{shard}.pt", weights_only=True)
            assert all(torch.equal(saved[name], theta[name]) for name in theta)


def test_a_backup_is_restored_as_the_document_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker has gone on since the copy was made."""
    monkeypatch.setattr("diloco_client.transport.Retry", lambda: Retry(first=0.02, cap=0.2))
    text = (ROOT / "docs" / "operating.md").read_text()
    number = text.partition("**Restoring a backup**")[2].partition("such as ")[2].split(":")[0]
    assert int(number) >= 10**9
    config = RunConfig(sync_every=4, num_fragments=2, overlap_steps=1)
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train() -> None:
        for _ in range(20):
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        outer.flush()

    def version(address: str) -> int:
        return int(diloco_client.status(address)["fragments"][0]["version"])

    with Proxy(upstream_port=0) as link:
        with serve(config, state_dir=tmp_path / "state") as server:
            link.upstream_port = server.port
            outer = diloco_client.join(link.address, model, optimizer, worker_id="w")
            train()
            copied = version(server.address)
        shutil.copytree(tmp_path / "state", tmp_path / "copy")
        with serve(config, state_dir=tmp_path / "state") as server:
            link.upstream_port = server.port
            train()
            assert version(server.address) > copied
        with serve(config, state_dir=tmp_path / "copy", rollback=int(number)) as server:
            link.upstream_port = server.port
            assert version(server.address) == copied
            while version(server.address) == copied:
                train()
            status = diloco_client.status(server.address)
            theirs = {f["index"]: int(f["digest"], 16) for f in status["fragments"]}
            assert outer.base_digests() == theirs
            outer.close()


def test_these_documents_have_such_blocks() -> None:
    with pytest.raises(ValueError, match="is not in list"):
        block_after(ROOT / "README.md", "## Nothing of this name")
