"""Every benchmark runs at its smallest size, and its last line has the keys that its docstring names; no figure is
looked at."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

SMALLEST = {
    "kernels": "--params 1 --repeats 1",
    "transport": "--mib 2 --repeats 1 --line tls",
    "scale": "--workers 1,2 --millions 0.05 --rounds 1",
    "wan": "--cells int4_100_2_2_0 --workers 1 --millions 0.16 --step-seconds 0.02",
    "overhead": "--layers 1 --width 64 --sync-every 4 --fragments 2 --periods 1",
    "round": "--sizes 1 --workers 1 --rounds 2",
}

ELSEWHERE = {
    "wan": {"blocking_M_H", "blocking_seconds_M", "stalls_M_N"},
    "overhead": {"capture_DTYPE", "stream_DTYPE", "call_DTYPE", "apply_DTYPE"},
    "round": {"large_N", "large_rss_N", "line_100", "line_400"},
}
"""Keys of what is not run here: other cells, a GPU, large models."""

PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9]*")


def documented(script: Path) -> set[str]:
    """The keys of the indented list in the docstring, with placeholders in capitals; none where they stand in prose."""
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    _, _, listed = text.replace("\n--json", " --json").partition("ith --json")
    rows = re.findall(r"^    ((?:\w+, )*\w+)  ", listed, flags=re.MULTILINE)
    return {key for row in rows for key in row.split(", ")}


def pattern(key: str) -> str:
    """For the keys that the documented one stands for."""
    return "".join("[a-z0-9.]+" if PLACEHOLDER.fullmatch(word) else word for word in re.split(r"(_)", key))


def last_line(command: list[str], folder: Path) -> str:
    """What the command prints last; no process of its is left behind."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, **streams)
    try:
        said, complaints = process.communicate(timeout=110)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, complaints[-3000:]
    return said.splitlines()[-1]


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_prints_what_its_docstring_names(name: str, tmp_path: Path) -> None:
    script = BENCHMARKS / f"{name}.py"
    found = json.loads(last_line([sys.executable, str(script), *SMALLEST[name].split(), "--json"], tmp_path))
    assert all(isinstance(value, int | float | str) for value in found.values())
    keys = documented(script)
    for key in keys:
        matched = any(re.fullmatch(pattern(key), its) for its in found)
        assert matched or key in ELSEWHERE.get(name, ()), f"{key} is documented and not printed"
    for its in found:
        known = any(re.fullmatch(pattern(key), its) for key in keys)
        assert known or not keys, f"{its} is printed and not documented"
