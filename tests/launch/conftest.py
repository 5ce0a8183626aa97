"""Scripts that know nothing of diloco, started by `diloco-client run` against a server in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = [sys.executable, "-m", "diloco_cli.client", "run"]

Launched = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """Write a script into the test's folder."""

    def write(text: str, name: str = "train.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Start `diloco-client run ARGUMENTS`, in the test's folder; what is still running at the end is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | variables
        process = subprocess.Popen(
            [*RUN, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
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


@pytest.fixture
def run(start: Launched) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same, to its end."""

    def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        process = start(*arguments, **variables)
        out, err = process.communicate(timeout=90)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run
