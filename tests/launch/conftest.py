"""Scripts that know nothing of diloco, started by `diloco-client run` against a server in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diloco_client.launch.settings import Launch, LaunchOptions
from diloco_client.launch.start import BOOTSTRAP

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


@pytest.fixture(scope="session")
def warm() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported torch, and runs scripts in forks of itself."""
    paths = os.pathsep.join(filter(None, [str(BOOTSTRAP), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DILOCO_LAUNCH": "{}"}
    command = [sys.executable, Path(__file__).with_name("warm_scripts.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


@pytest.fixture
def launched(warm: subprocess.Popen[str], script: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    """What a script does that is launched, without the time that it takes to get there."""

    def launched(address: str, text: str, **options: Any) -> subprocess.CompletedProcess[str]:
        launch = Launch(
            address=address, ca_cert=None, client_cert=None, client_key=None, options=LaunchOptions(**options)
        )
        out, err = tmp_path / "out", tmp_path / "err"
        job = {"script": script(text), "folder": tmp_path, "out": out, "err": err, "launch": launch.text()}
        print(json.dumps(job, default=str), file=warm.stdin, flush=True)
        return subprocess.CompletedProcess(text, int(warm.stdout.readline()), out.read_text(), err.read_text())

    return launched
