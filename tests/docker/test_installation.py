"""The install steps of the server's image, in an environment with nothing in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from containers import REPOSITORY, Image, shell


def index_answers(folder: Path) -> bool:
    """Whether there is a package index to install from."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=0", "--timeout=10", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), "hatchling"], capture_output=True)
    return done.returncode == 0


@pytest.mark.timeout(300)
def test_the_server_installs_without_torch(tmp_path: Path) -> None:
    if not index_answers(tmp_path / "probe"):
        pytest.skip("no package index answers")
    image = Image.of("server")
    source, installed = tmp_path / "src", tmp_path / "diloco"
    source.mkdir()
    for name in image.copies:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("DILOCO_", "PYTHON"))}
    # The image has the bytecode of all packages; here only what is imported is worth the time.
    env = {**ours, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PIP_NO_COMPILE": "1"}
    (install,) = (step for step in image.runs if "pip" in step)
    shell(install, env=env, cwd=source, diloco=installed)

    def within(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(installed / "bin" / program), *arguments]
        return subprocess.run(command, env=ours, cwd=tmp_path, capture_output=True, text=True)

    assert within("diloco-server", "--version").stdout.startswith("diloco-server, version ")
    refused = within("diloco-client", "health", "127.0.0.1:1", "--timeout", "0.1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "no diloco-server answered" in refused.stderr
    assert "No module named 'torch'" in within("python", "-c", "import torch").stderr
    assert "No module named 'pip'" in within("python", "-c", "import pip").stderr
