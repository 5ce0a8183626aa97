"""Many workers, slow readers, many rounds: the server's memory is the model's, and nothing piles up."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import grpc
from crowd import Crowd, settings
from memory import MIB, forget_peak, memory_bound, open_files, rss, threads, tree_bytes
from server_process import ServerProcess

from diloco_proto import outer_pb2 as pb

MANY = 64
READERS = 6

FRAMES = 4
"""Of the larger fragment's snapshot."""


class SlowReader:
    """Pulls θ, one message for each `step`; ends when it has all, or when the server has had enough."""

    def __init__(self, crowd: Crowd) -> None:
        self._call = crowd.workers[0].stub.Pull(pb.PullRequest(snapshot=True), timeout=100)
        self._may = threading.Semaphore(0)
        self.messages = 0
        self.error: grpc.RpcError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def step(self, messages: int = 1) -> None:
        self._may.release(messages)

    def finish(self) -> None:
        self.step(1000)
        self._thread.join()

    def _read(self) -> None:
        try:
            while self._may.acquire():
                next(self._call)
                self.messages += 1
        except StopIteration:
            pass
        except grpc.RpcError as error:
            self.error = error


def test_many_workers_at_once_and_readers_that_hold_nobody_up(tmp_path: Path) -> None:
    sizes, rounds = (1_000_000, 20_000), 2
    with (
        ServerProcess(tmp_path / "state", *settings(sizes, MANY)) as server,
        Crowd(server.address, sizes, MANY) as crowd,
    ):
        crowd.round()
        forget_peak(server.process.pid)
        readers = [SlowReader(crowd) for _ in range(READERS)]
        for reader in readers:
            reader.step()
        for _ in range(rounds):
            crowd.round()
            for reader in readers:
                reader.step()
        assert crowd.counted == (1 + rounds) * MANY * len(sizes)
        assert all(reader.messages <= 1 + rounds for reader in readers), "they are in the middle of it"
        old_theta, on_their_way = 4 * sizes[0], MANY * MIB  # one for all who read; a frame of each worker
        assert rss(server.process.pid, "VmHWM") < memory_bound(sizes, MANY) + old_theta + on_their_way
        for reader in readers:
            reader.finish()
            assert reader.error is None
            assert reader.messages == 1 + FRAMES
        crowd.round()


def test_memory_is_that_of_the_model(tmp_path: Path) -> None:
    sizes, workers = (2_500_000,) * 4, 4
    with (
        ServerProcess(tmp_path / "state", *settings(sizes, workers, snapshot_every=2)) as server,
        Crowd(server.address, sizes, workers) as crowd,
    ):
        for _ in range(5):
            crowd.round()
        assert rss(server.process.pid, "VmHWM") < memory_bound(sizes, workers)


def test_nothing_piles_up_over_many_rounds(tmp_path: Path) -> None:
    sizes, state = (1000,), tmp_path / "state"
    with ServerProcess(state, *settings(sizes, 2)) as server, Crowd(server.address, sizes, 2) as crowd:
        pid = server.process.pid

        def taken() -> tuple[int, int, int]:
            return open_files(pid), threads(pid), tree_bytes(state)

        def rounds(count: int) -> None:
            for _ in range(count):
                crowd.round()

        rounds(100)
        idle, (files, running, disk) = rss(pid), taken()
        rounds(300)
        grown, after = rss(pid) - idle, taken()
        assert grown < 8 * MIB
        deadline = time.monotonic() + 20
        while open_files(pid) > files + 2:  # a snapshot under way has some open
            assert time.monotonic() < deadline, "files pile up"
            time.sleep(0.02)
        assert after[1] <= running + 4, "gRPC has some more or fewer"
        assert after[2] < disk + 2 * MIB, "old segments and snapshots go"
