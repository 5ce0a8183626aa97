"""The demo as a whole, short: real processes, its report, and that it leaves none of them behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

DEMO = [sys.executable, "-m", "diloco_cli.client", "demo", "--workers", "2"]


def processes_of(out: Path) -> list[int]:
    """Processes on this machine that were started for the demo with this output directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"DEMO_TEST={out}".encode() in environment:
                found.append(int(entry.name))
    return found


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DEMO, "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DEMO_TEST": str(out)},
    )


def test_a_short_demo_reports_and_ends_bit_identical(tmp_path: Path) -> None:
    demo = start(tmp_path, "--steps", "24", "--sync-every", "8", "--json")
    stdout, stderr = demo.communicate(timeout=110)
    assert demo.returncode == 0, stderr
    report = json.loads(stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["identical"] is True
    assert report["global_loss"] < report["initial_loss"] - 1
    assert report["alone_loss"] < report["initial_loss"] - 1
    assert 2 < report["bits_up"] <= 4.3
    assert 2 < report["bits_down"] <= 4.3
    assert report["reduction"] > 20  # so few steps hardly pay for the first download
    assert 0 <= report["stall"] < 1
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert processes_of(tmp_path) == []


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    demo = start(tmp_path, "--steps", "100000")
    assert demo.stdout is not None
    for line in demo.stdout:
        if "have joined" in line:
            break
    assert len(processes_of(tmp_path)) >= 5  # the demo, its server, two workers and the lone one
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert processes_of(tmp_path) == []


def test_a_setting_that_cannot_work_is_one_line(tmp_path: Path) -> None:
    demo = start(tmp_path, "--steps", "10", "--sync-every", "20")
    _, stderr = demo.communicate(timeout=30)
    assert demo.returncode == 2
    assert len(stderr.splitlines()) == 1
    assert "sync_every" in stderr
