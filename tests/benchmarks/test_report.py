"""Where the benchmarks' findings are written down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    return report


def test_each_benchmark_has_a_place_in_the_document(report) -> None:
    document = report.DOCUMENT.read_text()
    for name in report.PARTS:
        assert (BENCHMARKS / f"{name}.py").exists()
        written = report.put(document, name, "a table\\1", "2026-01-01")
        assert written.count("a table\\1") == 1
        assert report.put(written, name, "another", "2026-01-01").count("another") == 1
        assert "a table\\1" not in report.put(written, name, "another", "2026-01-01")
    with pytest.raises(ValueError, match="no place for wire"):
        report.put("", "wire", "", "")


def test_the_command_lists_what_it_would_run() -> None:
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python benchmarks/round.py --large\n" in done.stdout
    wrong = subprocess.run([*command, "quickness"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "no benchmark is called 'quickness'" in wrong.stderr
