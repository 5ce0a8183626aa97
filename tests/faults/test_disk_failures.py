"""A server whose disk is slow, full or broken: what it has not written it does not acknowledge, and it says so."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from raw_worker import RawWorker, frames_of, manifest_of

from diloco_client.health import health
from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import StorageTrouble
from diloco_proto.health import Health
from diloco_proto.wire import error_from_rpc
from diloco_server import RunConfig, serve
from diloco_server.daemon import Daemon
from diloco_server.store import StorageFailed
from diloco_server.store.files import OsFile

SIZE = 100
CONFIG = RunConfig(num_fragments=1, uplink_codec="fp32", grace_seconds="inf")
KEPT = (pb.OUTCOME_STAGED, pb.OUTCOME_ALREADY_HAVE, pb.OUTCOME_COUNTED)


class Disk:
    """Stands between the server and its files, once `spoil` was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.slow = threading.Event()
        """A sync returns once it is set."""
        self.error = 0
        self._patch = monkeypatch

    def hold_syncs(self) -> None:
        sync = OsFile.sync

        def held(file: OsFile) -> None:
            self.reached.set()
            assert self.slow.wait(60)
            sync(file)

        self._patch.setattr(OsFile, "sync", held)

    def fail(self, name: str, number: int) -> None:
        """Calls of that name raise this error as long as it is not mended."""
        self.error, method = number, getattr(OsFile, name)

        def failing(file: OsFile, *arguments: object) -> None:
            if self.error:
                self.reached.set()
                raise OSError(self.error, os.strerror(self.error))
            method(file, *arguments)

        self._patch.setattr(OsFile, name, failing)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def push(worker: RawWorker) -> pb.Outcome:
    return worker.push(0, frames_of(np.ones(SIZE)))


def entered(server: Daemon) -> RawWorker:
    return RawWorker(server.address).enter(manifest_of(SIZE), [np.zeros(SIZE)])


def look(worker: RawWorker) -> tuple[int, str]:
    """Version and trouble, as the server's status has them."""
    status = worker.stub.Status(pb.StatusRequest(), timeout=60)
    return status.fragments[0].version, status.storage.trouble


def until(condition: Callable[[], bool], what: str) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError(f"waited in vain for {what}")


def test_nothing_is_acknowledged_or_published_before_it_is_on_disk(
    tmp_path: Path, disk: Disk, thread: ThreadPoolExecutor
) -> None:
    with serve(CONFIG, state_dir=tmp_path) as server, entered(server) as worker:
        disk.hold_syncs()
        outcome: Future[pb.Outcome] = thread.submit(push, worker)
        try:
            assert disk.reached.wait(30)
            for _ in range(20):  # while the server answers everything else
                assert look(worker) == (0, "")
            assert not outcome.done()
        finally:
            disk.slow.set()
        assert outcome.result(30).kind in KEPT
        assert worker.expect("committed").fate == pb.FATE_COUNTED


def test_a_full_disk_stops_all_acknowledgements_until_there_is_room(
    tmp_path: Path, disk: Disk, thread: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(CONFIG, state_dir=tmp_path) as server, entered(server) as worker:
        assert server.engine.keeper._store is not None
        journal = server.engine.keeper._store.journal
        journal._retry_seconds = 0.02
        until(lambda: journal.queued_bytes == 0, "what came before the push to be written")
        disk.fail("write", errno.ENOSPC)
        outcome = thread.submit(push, worker)
        until(lambda: "No space left on device" in look(worker)[1], "the trouble to be shown")
        assert health(server.address) is Health.NOT_SERVING
        with pytest.raises(grpc.RpcError, match="No space left on device.*training may go on") as refused:
            push(worker)
        assert type(error_from_rpc(refused.value)) is StorageTrouble
        assert look(worker)[0] == 0
        assert not outcome.done()
        disk.error = 0
        assert outcome.result(30).kind in KEPT
        assert worker.expect("committed").fate == pb.FATE_COUNTED
        assert look(worker) == (1, "")
        assert health(server.address) is Health.SERVING
    told = [r.getMessage() for r in caplog.records if "Nothing is acknowledged until it works again" in r.getMessage()]
    assert 1 <= len(told) <= 2
    with serve(CONFIG, state_dir=tmp_path) as server, RawWorker(server.address) as worker:
        assert look(worker)[0] == 1, "and it is kept"


def test_a_sync_that_fails_is_the_end_and_the_next_server_goes_on(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pytest.raises(StorageFailed, match="sync the journal"),
        serve(CONFIG, state_dir=tmp_path) as server,
        entered(server) as worker,
    ):
        disk.fail("sync", errno.EIO)
        with pytest.raises(grpc.RpcError) as refused:
            push(worker)
        assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)
        assert disk.reached.is_set()
    assert any(r.levelname == "CRITICAL" for r in caplog.records)
    disk.error = 0
    with serve(CONFIG, state_dir=tmp_path) as server, entered(server) as worker:
        outcome = push(worker)
        assert outcome.kind in KEPT
        until(lambda: look(worker)[0] == 1, "the round")
