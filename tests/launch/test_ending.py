"""The end of a main program is seen while threads can still be started, and told apart from a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, os, sys, threading
from diloco_client.launch.ending import call_at_end

def told(error):
    thread = threading.Thread(target=print, args=(f"ended {error!r}",), kwargs={"flush": True})
    thread.start()
    thread.join()
    if "refuse" in sys.argv:
        raise SystemExit("refused")
    if "fail" in sys.argv:
        raise OSError("no space left")

def train():
    call_at_end(told)
    exec(os.environ["ENDING"])

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("fork", "spawn"):
        child = multiprocessing.get_context(sys.argv[1]).Process(target=train)
        child.start()
        child.join()
        sys.exit(child.exitcode)
    train()
"""


def end(folder: Path, ending: str, *arguments: str, module: bool = False) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, *(["-m", "program"] if module else ["program.py"]), *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"ENDING": ending}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("ending", "told", "code"),
    [
        ("pass", "None", 0),
        ("sys.exit()", "None", 0),
        ("sys.exit(0)", "None", 0),
        ("sys.exit(3)", "SystemExit(3)", 3),
        ("exit(3)", "SystemExit(3)", 3),
        ("exec('try: sys.exit(2)\\nexcept SystemExit: pass')", "None", 0),
        ("sys.exit('no data')", "SystemExit('no data')", 1),
        ("1 / 0", "ZeroDivisionError('division by zero')", 1),
        ("raise KeyboardInterrupt", "KeyboardInterrupt()", -2),
    ],
)
def test_how_it_ended(ending: str, told: str, code: int, tmp_path: Path) -> None:
    done = end(tmp_path, ending)
    assert (done.stdout, done.returncode) == (f"ended {told}\n", code)


@pytest.mark.parametrize(("ending", "told", "code"), [("pass", "None", 0), ("sys.exit(3)", "SystemExit(3)", 3)])
def test_how_a_module_ended(ending: str, told: str, code: int, tmp_path: Path) -> None:
    done = end(tmp_path, ending, module=True)
    assert (done.stdout, done.returncode) == (f"ended {told}\n", code)


@pytest.mark.parametrize("kind", ["fork", "spawn"])
@pytest.mark.parametrize(("ending", "told", "code"), [("pass", "None", 0), ("sys.exit(3)", "SystemExit(3)", 3)])
def test_in_a_child_process(kind: str, ending: str, told: str, code: int, tmp_path: Path) -> None:
    done = end(tmp_path, ending, kind)
    assert (done.stdout, done.returncode) == (f"ended {told}\n", code)


@pytest.mark.parametrize("kind", ["fork", "spawn", "here"])
def test_what_fails_at_the_end_is_the_exit_code(kind: str, tmp_path: Path) -> None:
    """And what the script itself has for its end still runs."""
    done = end(tmp_path, "import atexit; atexit.register(print, 'its own')", kind, "refuse")
    assert done.returncode == 1
    assert done.stderr == "refused\n"
    assert done.stdout.splitlines() == [
        "ended None",
        *(["its own"] if kind != "fork" or sys.version_info >= (3, 13) else []),
    ]


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)"])
def test_what_breaks_at_the_end_is_shown(ending: str, tmp_path: Path) -> None:
    done = end(tmp_path, ending, "here", "fail")
    assert done.returncode == 1
    assert "OSError: no space left" in done.stderr
