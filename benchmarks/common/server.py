"""A diloco-server as a process of its own, and what the system says of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memory import rss
from server_process import ServerProcess


@contextmanager
def serving(*settings: str) -> Iterator[tuple[ServerProcess, Path]]:
    """The server and its state directory, which goes when it ends."""
    with tempfile.TemporaryDirectory(prefix="diloco-bench-") as folder:
        state = Path(folder) / "state"
        with ServerProcess(state, *settings) as server:
            yield server, state


def cpu_seconds(pid: int) -> float:
    """That the process has used so far, in user and kernel mode, all threads; exact to 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss(pid: int) -> int:
    """The most memory that the process had, in bytes."""
    return int(rss(pid, "VmHWM"))


__all__ = ["ServerProcess", "cpu_seconds", "peak_rss", "serving"]
