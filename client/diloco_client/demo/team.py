"""The demo's processes: started together, heard together, and none of them left behind."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from diloco_client.demo.options import DemoError

GRACE_SECONDS = 5.0
"""From closing the stdin of a process, which asks it to end, to killing it."""
LOG_LINES = 15
"""Lines of a failed process' log that the error shows."""


class Team:
    """Child processes by name, each in a process group of its own, stderr in `logs`/NAME.log.

    A process group of its own: Ctrl-C in a terminal reaches only the demo, which ends the others.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._readers: list[threading.Thread] = []
        self._events: queue.SimpleQueue[tuple[str, dict[str, Any] | None]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str], cwd: Path | None = None) -> None:
        """Starts a process whose stdout lines are events; it must end when its stdin closes."""
        with (self._logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=cwd,
                start_new_session=True,
                env=_environment(),
            )
        self._processes[name] = process
        reader = threading.Thread(target=self._read, args=(name, process), daemon=True, name=f"read-{name}")
        self._readers.append(reader)
        reader.start()

    def _read(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"{"):  # a server's banner is not for us
                self._events.put((name, json.loads(line)))
        self._events.put((name, None))

    def send(self, name: str, line: str) -> None:
        """One line to the stdin of `name`."""
        stdin = self._processes[name].stdin
        assert stdin is not None
        try:
            stdin.write(line.encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            self.fail(name)

    def receive(self, timeout: float) -> tuple[str, dict[str, Any] | None] | None:
        """The next event of any process, as (name, event), or None after `timeout` seconds.

        The event is None when the process has closed its stdout.
        """
        try:
            return self._events.get(timeout=timeout)
        except queue.Empty:
            return None

    def fail(self, name: str) -> None:
        """Raises DemoError for `name`, with the end of its log."""
        try:
            status = _in_words(self._processes[name].wait(GRACE_SECONDS))
        except subprocess.TimeoutExpired:
            status = "closed its output"
        path = self._logs / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
        text = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
        raise DemoError(f"{name} {status} before the demo was over. The end of {path}:\n{text}")

    def stop(self) -> None:
        """Ends every process: closes its stdin, after the grace kills its group. Returns when all are gone."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill_group(process)
                process.wait()
        for reader in self._readers:
            reader.join(GRACE_SECONDS)
        for process in self._processes.values():
            assert process.stdout is not None
            process.stdout.close()
        self._processes.clear()


def _environment() -> dict[str, str]:
    """Ours, without the settings of a server or worker of the user's: the demo has its own."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("DILOCO_")}
    # One thread a process: there are more processes than cores already.
    return ours | {"OMP_NUM_THREADS": "1"}


def _in_words(status: int) -> str:
    """What became of a process whose exit status, as `subprocess` has it, is `status`."""
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was ended by {signal.Signals(-status).name}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that has not been waited for (its id is therefore still its own), and its children."""
    # It may end in this very moment: Linux knows no such group then, macOS does not permit the signal.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
