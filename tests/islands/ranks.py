"""Islands and plain workers as processes, forked from one that has imported all they need."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import trainee
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Else the ranks that torchrun starts anew find the gloo addresses of the former ones in its store (torch 2.13)."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["warm"])


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


def _start_forkserver() -> None:
    """It has to find `warm`, and what that imports; of its own it does not look where pytest does."""
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if former is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = former


def ranks_of(module: str, function: str, arguments: list[tuple[Any, ...]], *, daemon: bool = True) -> list[BaseProcess]:
    """One process for each of `arguments`, which calls that function; started."""
    processes: list[BaseProcess] = [
        _CONTEXT.Process(target=_call, args=(module, function, a), daemon=daemon) for a in arguments
    ]
    _start_forkserver()
    for process in processes:
        process.start()
    return processes


def words_of(kind: str, address: str, out: Path, options: dict[str, object]) -> list[str]:
    named = [[f"--{k}"] if v is True else [f"--{k}", str(v)] for k, v in options.items()]
    return [kind, address, str(out), *(word for pair in named for word in pair)]


def run_agent(size: int, arguments: list[str]) -> None:
    """What torchrun does with --standalone --max-restarts 1; its ranks are forked, as all others here."""
    os.environ |= FRESH_STORE
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id="standalone",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, trainee.main)(arguments)


@contextmanager
def torchrun(kind: str, size: int, address: str, out: Path, **options: object) -> Iterator[BaseProcess]:
    """The agent's process. None of its ranks survives the block."""
    (agent,) = ranks_of("ranks", "run_agent", [(size, words_of(kind, address, out, options))], daemon=False)
    try:
        yield agent
    finally:
        agent.terminate()  # then it ends its ranks
        agent.join()


class Started:
    """The ranks of one worker."""

    def __init__(self, kind: str, size: int, address: str, out: Path, **options: object) -> None:
        port = free_port()
        arguments = words_of(kind, address, out, options)
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
