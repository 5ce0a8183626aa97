"""Kills what the crash test leaves when it is killed itself: `python guard.py`.

On stdin it is told `+PID` of every process that was started and `-PID` of every one that has ended. When stdin closes
it kills those that are left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    alive: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        if line.startswith("+"):
            alive.add(pid)
        else:
            alive.discard(pid)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
