"""Islands and plain workers as processes, forked from one that has imported all they need."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import trainee

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "diloco_client.islands",
        "diloco_client.joining",
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.tensor.parallel",
    ]
)


def run_rank(rank: int, size: int, port: int, arguments: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    trainee.main(arguments)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _call(module: str, function: str, arguments: tuple[Any, ...]) -> None:
    getattr(importlib.import_module(module), function)(*arguments)


def ranks_of(module: str, function: str, arguments: list[tuple[Any, ...]]) -> list[BaseProcess]:
    """One process for each of `arguments`, which calls that function; started."""
    processes: list[BaseProcess] = [
        _CONTEXT.Process(target=_call, args=(module, function, a), daemon=True) for a in arguments
    ]
    for process in processes:
        process.start()
    return processes


class Started:
    """The ranks of one worker."""

    def __init__(self, kind: str, size: int, address: str, out: Path, **options: object) -> None:
        port = free_port()
        named = [[f"--{k}"] if v is True else [f"--{k}", str(v)] for k, v in options.items()]
        arguments = [kind, address, str(out), *(word for pair in named for word in pair)]
        self.out = out
        self.processes = ranks_of("ranks", "run_rank", [(rank, size, port, arguments) for rank in range(size)])

    def ends(self, timeout: float = 60.0) -> list[int | None]:
        """Exit codes, by rank."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]

    def results(self, timeout: float = 60.0) -> list[dict[str, Any]]:
        """What each rank has written, by rank."""
        ended = self.ends(timeout)
        assert None not in ended, f"{self.out.name}: ranks hang: {ended}"
        return results(self.out, len(self.processes))

    def kill(self, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def terminate(self) -> None:
        for process in self.processes:
            process.terminate()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def results(out: Path, ranks: int) -> list[dict[str, Any]]:
    found = [json.loads(out.with_name(f"{out.name}.{rank}.json").read_text()) for rank in range(ranks)]
    for result in found:
        if "digests" in result:
            result["digests"] = {int(p): d for p, d in result["digests"].items()}
    return found


class Site:
    """Starts workers; none survives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Started] = []

    def start(self, kind: str, size: int, address: str, name: str, **options: object) -> Started:
        started = Started(kind, size, address, self.folder / name, name=name, **options)
        self._started.append(started)
        return started

    def close(self) -> None:
        for started in self._started:
            started.stop()


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    here = Site(folder)
    try:
        yield here
    finally:
        here.close()
