"""A diloco-server as a process of its own, over a state directory that outlives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

COMMAND = (sys.executable, "-m", "diloco_cli.server", "--port", "0")


def command(state: Path, *arguments: str) -> list[str]:
    return [*COMMAND, "--state-dir", str(state), *arguments]


class ServerProcess:
    """Listens on a port of its own choice once this is made, unless it has died at `fault` before: then `port` is 0."""

    def __init__(self, state: Path, *arguments: str, fault: str = "") -> None:
        self._log = state.with_name(f"{state.name}.log")
        environment = os.environ | ({"DILOCO_FAULT": fault} if fault else {})
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                command(state, *arguments), stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        assert self.process.stdout is not None
        banner = self.process.stdout.readline()
        found = re.search(r"listening on \S+:(\d+)", banner)
        self.port = int(found[1]) if found else 0
        if found is None and not fault:
            self.kill()
            raise AssertionError((banner, self.said()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        """SIGKILL; nothing happens if it has ended."""
        self.process.kill()
        self._end()

    def terminate(self, timeout: float = 60.0) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout)
        return self._end()

    def _end(self) -> int:
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait()

    def said(self) -> str:
        """Stderr of all servers of this state directory."""
        return self._log.read_text()
