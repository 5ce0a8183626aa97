"""Strangers at the port of a guarded server: it stays small and quiet, and those who belong to the run train on."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from garbage import TRICKS, UNAUTHENTICATED, Trick
from memory import MIB, forget_peak, open_files, rss
from server_process import ServerProcess

import diloco_client

CONNECTIONS = 200
MOST_GROWN = 100 * MIB
MOST_LOGGED = 64 << 10

SETTINGS = ("--secure", "--sync-every", "3", "--num-fragments", "1", "--overlap-steps", "1", "--snapshot-every", "9999")


class Trainer:
    """A worker that trains all the while, on a thread."""

    def __init__(self, url: str) -> None:
        self._ended = threading.Event()
        self._moved = threading.Condition()
        self._counted = 0
        self._error: BaseException | None = None
        self._url = url
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Trainer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def goes_on(self, rounds: int = 3) -> None:
        """So many more of its contributions are counted."""
        with self._moved:
            wanted = self._counted + rounds
            assert self._moved.wait_for(lambda: self._counted >= wanted or self._error, 60), "training stands still"
        assert self._error is None

    def _run(self) -> None:
        try:
            model = torch.nn.Linear(4, 4)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            with diloco_client.join(self._url, model, optimizer, connect_timeout=30) as outer:
                while not self._ended.is_set():
                    optimizer.zero_grad()
                    model(torch.randn(8, 4)).square().mean().backward()
                    optimizer.step()
                    with self._moved:
                        self._counted = outer.stats.counted
                        self._moved.notify_all()
        except BaseException as error:
            with self._moved:
                self._error = error
                self._moved.notify_all()


@contextmanager
def strangers(port: int, tricks: tuple[Trick, ...]) -> Iterator[None]:
    """So many connections, all open within the block unless the server has ended them."""
    with ExitStack() as stack:
        for number in range(CONNECTIONS):
            opened, says = tricks[number % len(tricks)]
            with suppress(OSError):  # the server need not listen to all of it
                connection = stack.enter_context(opened(port))
                connection.settimeout(0.3)  # some it just does not read
                for data in says(random.Random(number)):
                    connection.sendall(data)
        yield


def test_a_flood_costs_little_and_stops_nobody(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with ServerProcess(state, *SETTINGS) as server, Trainer((state / "join-url").read_text().strip()) as trainer:
        trainer.goes_on()
        pid = server.process.pid
        idle, files = rss(pid), open_files(pid)
        forget_peak(pid)
        for tricks in (TRICKS, (UNAUTHENTICATED,)):
            with strangers(server.port, tricks):
                trainer.goes_on()
        trainer.goes_on()
        peak = rss(pid, "VmHWM")
        assert open_files(pid) < files + 10, "of those who have gone, nothing is left"
    log = server.said()
    assert peak - idle < MOST_GROWN
    assert len(log) < MOST_LOGGED, log[:3000]
    assert "Traceback" not in log
    assert "refused /diloco.v1.Outer/Push from ipv4:127.0.0.1:" in log
