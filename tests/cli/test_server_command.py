"""diloco-server as a process: its banner, its signals, its one-line errors, and where settings come from."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import pytest
from raw_worker import RawWorker, frames_of, manifest_of

from diloco_cli.server import main
from diloco_proto import outer_pb2 as pb

COMMAND = [sys.executable, "-m", "diloco_cli.server"]
PROMPT = 4.0
"""Seconds; open calls would be cut after five."""


@contextmanager
def server(*arguments: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A running server: its process, its address, and the lines of its banner."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", *arguments],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        banner = [process.stdout.readline(), process.stdout.readline()]
        found = re.search(r"listening on (\S+:\d+)", banner[0])
        if found is None:
            process.kill()
            raise AssertionError((banner, *process.communicate()))
        yield process, found[1], banner
    finally:
        process.kill()
        process.communicate()


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[float, str]:
    """Seconds until the process has ended, and its stderr."""
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    return time.monotonic() - began, errors


def test_the_banner_says_where_it_listens_and_what_to_run(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    with server("--port-file", str(port_file), "--sync-every", "7") as (process, address, banner):
        assert f"127.0.0.1:{port_file.read_text().strip()}" == address
        assert "H=7" in banner[0]
        assert f'diloco_client.join("{address}", model, optimizer)' in banner[1]
        _, errors = stop(process, signal.SIGINT)
        assert process.returncode == 0
        assert "Traceback" not in errors
        assert not port_file.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_promptly_while_a_worker_is_in_session(number: signal.Signals) -> None:
    with server() as (process, address, _), RawWorker(address) as worker:
        worker.enter(manifest_of(100, 50, 30, 20), [np.zeros(n) for n in (100, 50, 30, 20)])
        seconds, errors = stop(process, number)
        assert process.returncode == 0
        assert seconds < PROMPT
        assert "Traceback" not in errors
        assert worker.expect("draining").reason == f"received {number.name}"


def test_a_second_signal_ends_it_at_once() -> None:
    with server("--uplink-codec", "fp32") as (process, address, _), RawWorker(address) as worker:
        worker.enter(manifest_of(100), [np.zeros(100)])
        header = pb.PushRequest(header=worker.header(0, frames_of(np.ones(100))))
        frames: queue.SimpleQueue[pb.PushRequest | None] = queue.SimpleQueue()
        frames.put(header)
        push = worker.push_stream(iter(frames.get, None))  # a transfer that has come to a stop
        assert next(push).HasField("have")
        process.send_signal(signal.SIGTERM)
        worker.expect("draining")
        seconds, _ = stop(process, signal.SIGTERM)
        assert process.returncode == 1
        assert seconds < PROMPT
        frames.put(None)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with server() as (_, address, _):
        port = address.rpartition(":")[2]
        other = ["--state-dir", str(tmp_path / "another")]
        second = subprocess.run([*COMMAND, "--port", port, *other], capture_output=True, text=True, timeout=60)
    assert second.returncode == 3
    assert second.stdout == ""
    (line,) = second.stderr.splitlines()
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line
    assert "Choose another --port" in line


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'sync_every = 10\nnum_fragments = 3\nmixing_alpha = 0.25\ngrace_seconds = inf\nweighting = "uniform"\n'
    )
    env = {"DILOCO_SYNC_EVERY": "20", "DILOCO_NUM_FRAGMENTS": "2"}
    with server("--config", str(path), "--sync-every", "30", **env) as (_, address, _), RawWorker(address) as worker:
        config = worker.stub.Describe(pb.DescribeRequest(), timeout=30).config
    assert config["sync_every"] == "30"
    assert config["num_fragments"] == "2"
    assert config["mixing_alpha"] == "0.25"
    assert config["grace_seconds"] == "inf"
    assert config["weighting"] == "uniform"
    assert config["overlap_steps"] == "2"


MISTAKES: dict[str, tuple[Sequence[str], dict[str, str], str]] = {
    "a setting that can never work": (["--sync-every", "0"], {}, "sync_every is 0; it must be at least 1"),
    "settings that cannot go together": (
        ["--sync-every", "5", "--overlap-steps", "5"],
        {},
        "must be greater than overlap",
    ),
    "an unknown codec": (["--uplink-codec", "nonsense"], {}, "'nonsense' is not one of 'fp32', 'bf16'"),
    "no number": (["--outer-lr", "fast"], {}, "'fast' is not a valid float"),
    "an unknown flag": (["--sync-evry", "5"], {}, click.NoSuchOption("--sync-evry").format_message().rstrip(".")),
    "secure and insecure": (["--host", "0.0.0.0", "--insecure", "--secure"], {}, "insecure turns TLS and tokens off"),
    "a variable": ([], {"DILOCO_MIN_WORKERS": "0"}, "min_workers is 0; it must be at least 1"),
    "no config file": (["--config", "missing.toml"], {}, "missing.toml: No such file"),
    "an unknown key": (["--config", "unknown.toml"], {}, "unknown.toml: unknown key 'sync_evry'"),
    "a key that is no setting": (["--config", "version.toml"], {}, "unknown key 'version'"),
    "no TOML": (["--config", "broken.toml"], {}, "broken.toml: "),
    "no text": (["--config", "binary.toml"], {}, "binary.toml: "),
    "a fraction for a number": (["--config", "fraction.toml"], {}, "'2.5' is not a valid integer"),
    "a list for a number": (["--config", "list.toml"], {}, "'[1, 2]' is not a valid integer"),
    "no initial parameters": (["--init", "missing.safetensors"], {}, "init is missing.safetensors"),
    "initial parameters that are none": (["--init", "broken.toml"], {}, "broken.toml: not a readable safetensors file"),
    "no place for the port file": (["--port-file", "nowhere/port"], {}, "port_file is nowhere/port"),
}
FILES = {
    "unknown.toml": b"sync_evry = 5\n",
    "version.toml": b"version = true\n",
    "broken.toml": b"sync_every = = 5\n",
    "binary.toml": b"\xff\xfe\x00",
    "fraction.toml": b"sync_every = 2.5\n",
    "list.toml": b"sync_every = [1, 2]\n",
}


REAL = ("a setting that can never work", "an unknown codec", "secure and insecure", "an unknown key")
"""Those that are made by a real process; the others, to save time, by a call."""


def judge(name: str, status: int | str | None, out: str, err: str) -> None:
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("Error: ")
    assert MISTAKES[name][2] in line
    assert status == (3 if name == "initial parameters that are none" else 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("folder")
def test_a_mistake_is_answered_by_one_line_and_no_traceback() -> None:
    def make(name: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "--port", "0", *MISTAKES[name][0]]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    with ThreadPoolExecutor(2) as threads:
        for name, answer in zip(REAL, threads.map(make, REAL), strict=True):
            judge(name, answer.returncode, answer.stdout, answer.stderr)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", [n for n in MISTAKES if n not in REAL])
def test_other_mistakes(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, env, _ = MISTAKES[name]
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as caught:
        main.main(["--port", "0", *arguments], prog_name="diloco-server")
    judge(name, caught.value.code, *capsys.readouterr())


def test_the_server_needs_neither_torch_nor_the_client() -> None:
    code = "import sys, diloco_server, diloco_cli.server; print({'torch', 'diloco_client'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "set()"
