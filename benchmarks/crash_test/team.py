"""The processes of the crash test: one server, its workers, and a guard. None of them outlives the `with` block."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

HERE = Path(__file__).parent
MARK = "DILOCO_CRASH_TEST"
"""In the environment of each process, with a value of this test's own."""

LAST_LINES = 15


class Guard:
    """Knows which processes there are, and kills them when this process is no more."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(8)
        command = [sys.executable, str(HERE / "guard.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)

    def tell(self, sign: str, pid: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{sign}{pid}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def left_behind(self) -> list[int]:
        """Processes that still carry the mark, whoever started them; none where /proc is missing."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"{MARK}={self.mark}".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found


@dataclass(eq=False)
class Player:
    """A server or worker, through all of its processes."""

    name: str
    folder: Path
    guard: Guard
    lives: int = 0
    process: subprocess.Popen[bytes] | None = None
    frozen: bool = False

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> Path:
        """Stderr of its present process."""
        return self.folder / f"{self.name}.{self.lives - 1}.log"

    def start(self, command: Sequence[str], **environment: str) -> None:
        assert self.process is None
        self.lives += 1
        ours = {name: value for name, value in os.environ.items() if not name.startswith("DILOCO_")}
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
        ours |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", MARK: self.guard.mark, **environment}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ours,
                start_new_session=True,
            )
        self.guard.tell("+", self.process.pid)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def freeze(self, frozen: bool) -> None:
        """As a laptop that sleeps."""
        self.signal(signal.SIGSTOP if frozen else signal.SIGCONT)
        self.frozen = frozen

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def reap(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended. Raises subprocess.TimeoutExpired."""
        assert self.process is not None
        status = self.process.wait(timeout)
        self.guard.tell("-", self.process.pid)
        self.process, self.frozen = None, False
        return status

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(f"    {line}" for line in self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])


class Team:
    """All players."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.guard = Guard()
        self.server = Player("server", folder, self.guard)
        self.workers = [Player(f"worker-{index}", folder, self.guard) for index in range(workers)]

    @property
    def players(self) -> list[Player]:
        return [self.server, *self.workers]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for player in self.players:
            if player.process is not None:
                player.kill()
                player.reap()
        self.guard.close()
