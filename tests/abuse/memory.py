"""What a process and a folder take up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

MIB = 1 << 20


def rss(pid: int, name: str = "VmRSS") -> int:
    """Bytes in memory; VmHWM is the most there ever were."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no {name}")


def tree_bytes(folder: Path) -> int:
    """Of all files below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def forget_peak(pid: int) -> None:
    """VmHWM counts from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def memory_bound(sizes: Sequence[int], workers: int) -> int:
    """Bytes that a server may have at most: 12 a parameter (θ, momentum, the downlink's residual), what all workers
    together have staged in int4, 33 bytes for 64 values, and 200 MB."""
    parameters = sum(sizes)
    return 12 * parameters + workers * parameters * 33 // 64 + 200_000_000
