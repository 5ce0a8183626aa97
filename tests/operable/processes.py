"""A diloco-server as a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ServerProcess:
    """Listens at `address`. Its stderr goes to a file, so that it is never held up by who does not read."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._log = folder / "server.log"
        command = [sys.executable, "-m", "diloco_cli.server", "--port", "0", "--state-dir", str(folder / "state")]
        with self._log.open("w") as log:
            self.process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        banner = self.process.stdout.readline()
        found = re.search(r"listening on (\S+:\d+)", banner)
        if found is None:
            self.kill()
            raise AssertionError((banner, self._log.read_text()))
        self.address = found[1]

    def terminate(self, timeout: float = 60.0) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def errors(self) -> list[str]:
        """Lines of its stderr."""
        return self._log.read_text().splitlines()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def running_server(folder: Path, *arguments: str) -> Iterator[ServerProcess]:
    server = ServerProcess(folder, *arguments)
    try:
        yield server
    finally:
        server.kill()
