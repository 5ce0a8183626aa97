"""Runs a command for as long as stdin stays open: `python -m diloco_client.demo.guard COMMAND…`.

The demo's server runs behind it, so that it ends even when the demo itself is killed outright.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

GRACE_SECONDS = 3.0
"""From asking the command to end to making it."""


def guard(command: Sequence[str]) -> int:
    """Runs `command`; its exit status, or 128 + the signal that ended it, as a shell has it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    threading.Thread(target=_end_with_stdin, args=(child,), daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


def _end_with_stdin(child: subprocess.Popen[bytes]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    child.terminate()
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
