"""`diloco-client run` before any training: what it refuses, and what it leaves alone."""

from __future__ import annotations

import json
import os
import sys

import pytest
from server_process import ServerProcess

from diloco_server import RunConfig, serve

PYTHON = sys.executable


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument 'COMMAND [ARGS]...'"),
        (["--upload-limit", "5", "--", "true"], 2, "upload_limit is 5 bytes a second"),
        (["--export", "nowhere/theta.safetensors", "--", "true"], 2, "nowhere is not a directory"),
        (["--", "python3", "-I", "train.py"], 2, "python3 -I ignores the environment"),
        (["--server", "nonsense", "--", "true"], 1, "'nonsense' is not a server address"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], code: int, message: str, run) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_a_command_that_there_is_not(run, tmp_path) -> None:
    with serve(RunConfig()) as server:
        done = run("--server", server.address, "--", "no-such-command", TMPDIR=str(tmp_path))
    assert done.returncode == 127
    assert done.stderr == "Error: cannot start no-such-command: No such file or directory\n"
    assert not list(tmp_path.iterdir())


def test_a_wrong_token_stops_it_before_the_script(run, tmp_path) -> None:
    with ServerProcess(tmp_path / "state", "--secure"):
        _, at, place = (tmp_path / "state" / "join-url").read_text().strip().partition("@")
        done = run("--server", f"diloco://wrong{at}{place}", "--", "echo", "started")
    assert (done.returncode, done.stdout) == (1, "")
    assert "token" in done.stderr


def test_a_process_without_torch_is_left_as_it_was(script, run, tmp_path) -> None:
    """Its arguments, exit code, standard streams, modules and path; no secret is among its arguments."""
    path = script(
        """
        import json, os, sys
        print(json.dumps({
            "argv": sys.argv,
            "input": sys.stdin.read(),
            "heavy": [name for name in ("torch", "grpc", "numpy", "diloco_client", "typing") if name in sys.modules],
            "path": sys.path,
            "process": os.getpid(),
            "command": open("/proc/self/cmdline").read().split("\\0"),
        }))
        sys.exit(9)
        """
    )
    with serve(RunConfig()) as server:
        done = run("--server", server.address, "--token", "sesame", "--", PYTHON, path, "--server", "mine", "--", "x")
    assert done.returncode == 9
    assert "nothing has joined the run" in done.stderr
    seen = json.loads(done.stdout)
    assert seen["argv"] == [str(path), "--server", "mine", "--", "x"]
    assert seen["input"] == ""
    assert seen["heavy"] == []
    assert not any("bootstrap" in place for place in seen["path"])
    assert "sesame" not in " ".join(seen["command"])


def test_a_shell_with_a_pipe_ends_as_it_would_alone(run) -> None:
    """SIGPIPE, which Python ignores, ends what writes into a pipe that nobody reads."""
    with serve(RunConfig()) as server:
        done = run("--server", server.address, "--", "bash", "-c", "yes | head -1; echo ${PIPESTATUS[0]}")
    assert done.stdout.split() == ["y", "141"]


def test_what_it_hands_over_survives_a_change_of_directory(script, run, tmp_path) -> None:
    (tmp_path / "url").write_text("127.0.0.1:1\n")
    path = script("import os; print(os.environ['DILOCO_LAUNCH'])")
    done = run("--server", "file:url", "--export", "theta.safetensors", "--", PYTHON, path, TMPDIR=str(tmp_path))
    assert done.returncode == 0
    assert "does not answer yet" in done.stderr
    given = json.loads(done.stdout)
    assert given["address"] == f"file:{tmp_path / 'url'}"
    assert given["options"]["export"] == os.fspath(tmp_path / "theta.safetensors")
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith("diloco-launch")]
