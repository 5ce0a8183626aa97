"""The journal on real files, and on files that fail."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from random import Random

import numpy as np
import pytest
from faulty_files import FaultyFiles

from diloco_server.store import CorruptJournal, Journal, StorageFailed
from diloco_server.store import state_pb2 as pb
from diloco_server.store.files import OsFiles
from diloco_server.store.journal import QUEUE_BYTES, SYNC_BYTES
from diloco_server.store.segment import HEADER_BYTES, path_of


def record(serial: int) -> pb.Record:
    return pb.Record(frame=pb.Frame(serial=serial))


def opened(files: OsFiles | FaultyFiles, start: bool = True, **options: float) -> Journal:
    files.mkdir("")
    files.mkdir("journal")
    files.sync_dir("..")
    files.sync_dir("")
    journal = Journal(files, **options)
    for _ in journal.replay(1):
        pass
    if start:
        journal.start(threaded=isinstance(files, OsFiles))
    return journal


def held(files: OsFiles | FaultyFiles, first: int = 1) -> list[tuple[int, int, bytes]]:
    return [(segment, r.frame.serial, bytes(blob)) for segment, r, blob in Journal(files).replay(first)]


def serials(files: OsFiles | FaultyFiles) -> list[int]:
    return [serial for _, serial, _ in held(files)]


@pytest.fixture
def files(tmp_path: Path) -> OsFiles:
    return OsFiles(tmp_path / "state")


def test_what_was_appended_comes_back_in_order_with_its_blobs(files: OsFiles) -> None:
    blobs = [b"", b"x" * 1_000_000, bytearray(b"abc"), memoryview(b"0123")[1:3], np.arange(3, dtype=np.uint16)]
    journal = opened(files)
    for serial, blob in enumerate(blobs):
        position = journal.append(record(serial), blob)
    assert position == journal.position == len(blobs)
    journal.durable(position).result(10)
    journal.close()
    assert held(files) == [(1, serial, bytes(blob)) for serial, blob in enumerate(blobs)]
    assert journal.records == len(blobs)
    assert journal.disk_bytes() >= journal.written_bytes + HEADER_BYTES


def test_a_batch_of_more_buffers_than_one_system_call_takes(files: OsFiles) -> None:
    journal = opened(files)
    for serial in range(1500):
        journal.append(record(serial), b"%d" % serial)
    journal.close()
    assert [blob for _, _, blob in held(files)] == [b"%d" % serial for serial in range(1500)]


def test_one_sync_serves_all_who_wait() -> None:
    journal = opened(FaultyFiles())
    before = journal.fsyncs
    futures = [journal.durable(journal.append(record(serial))) for serial in range(100)]
    assert not any(future.done() for future in futures)
    journal.pump()
    assert all(future.done() for future in futures)
    assert journal.fsyncs == before + 1
    assert journal.durable(50).done()


def test_little_is_synced_while_nobody_waits() -> None:
    journal = opened(FaultyFiles())
    before = journal.fsyncs
    for serial in range(10):
        journal.append(record(serial))
        journal.pump()
    assert journal.fsyncs == before
    future = journal.durable(5)
    journal.pump()
    assert future.done()
    assert journal.fsyncs == before + 1


def test_much_is_synced_before_anybody_waits() -> None:
    journal = opened(FaultyFiles())
    before, frame = journal.fsyncs, bytes(1 << 20)
    for serial in range((SYNC_BYTES >> 20) - 1):
        last = journal.append(record(serial), frame)
        journal.pump()
    assert journal.fsyncs == before
    for serial in range(2):
        journal.append(record(serial), frame)
        journal.pump()
    assert journal.fsyncs == before + 1
    assert journal.durable(last).done(), "it is on disk already"


def test_appends_from_many_threads_all_arrive(files: OsFiles) -> None:
    journal = opened(files)

    def work(worker: int) -> None:
        for n in range(50):
            journal.durable(journal.append(record(100 * worker + n))).result(30)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    journal.close()
    found = serials(files)
    assert sorted(found) == [100 * worker + n for worker in range(4) for n in range(50)]
    for worker in range(4):
        own = [serial for serial in found if serial // 100 == worker]
        assert own == sorted(own)


def test_rotation_divides_what_comes_before_from_what_comes_after(files: OsFiles) -> None:
    journal = opened(files)
    assert journal.next_segment == 2
    journal.append(record(0))
    assert journal.rotate() == 2
    journal.append(record(1))
    assert journal.rotate() == 3
    journal.durable(journal.append(record(2))).result(10)
    assert [(segment, serial) for segment, serial, _ in held(files)] == [(1, 0), (2, 1), (3, 2)]
    journal.drop_before(3)
    journal.close()
    assert files.listdir("journal") == ["00000003.log"]
    assert [serial for _, serial, _ in held(files, 3)] == [2]


def test_a_restart_goes_on_in_a_new_segment(files: OsFiles) -> None:
    for serial in range(3):
        journal = opened(files)
        journal.append(record(serial))
        journal.close()
    assert [(segment, serial) for segment, serial, _ in held(files)] == [(1, 0), (2, 1), (3, 2)]


# -- damage --


def small_journal(count: int = 4) -> FaultyFiles:
    """Records of which each but the last has a barrier behind it."""
    files = FaultyFiles()
    journal = opened(files)
    for serial in range(count):
        future = journal.durable(journal.append(record(serial), b"blob %d" % serial))
        journal.pump()
        assert future.done()
    return files


def test_a_tail_that_is_cut_off_anywhere_is_dropped_and_the_journal_goes_on() -> None:
    whole = small_journal()
    size = whole.size(path_of(1))
    ends = set()
    for cut in range(size + 1):
        files = whole.kill()
        files.open(path_of(1)).truncate(cut)
        found = serials(files)
        assert found == list(range(len(found)))
        ends.add(len(found))
        journal = opened(files)
        future = journal.durable(journal.append(record(99)))
        journal.pump()
        assert future.done()
        assert serials(files) == [*found, 99]
    assert ends == set(range(5))


def test_a_tail_is_dropped_with_a_message_that_says_how_much(caplog: pytest.LogCaptureFixture) -> None:
    files = small_journal()
    files.open(path_of(1)).write(files.size(path_of(1)), [b"garbage"])
    assert serials(files) == [0, 1, 2, 3]
    assert "00000001.log: cut off the last 7 bytes, which were never acknowledged" in caplog.text


def test_damage_anywhere_before_a_barrier_is_refused() -> None:
    whole = small_journal()
    size, content = whole.size(path_of(1)), whole.open(path_of(1)).read(0, 10_000)
    last_barrier = content.rindex(b"BARRIER") + 8 + 16
    for offset in range(size):
        files = whole.kill()
        files.open(path_of(1)).write(offset, [bytes([content[offset] ^ 0x40])])
        if offset < last_barrier - 50:
            with pytest.raises(CorruptJournal, match=r"00000001\.log is damaged at byte \d+.*--rollback"):
                serials(files)
        elif offset >= last_barrier:  # the last record, which no barrier covers
            assert serials(files) == [0, 1, 2]


def test_damage_in_a_segment_that_others_follow_is_refused() -> None:
    for serial_bytes in (1, 30):
        files = small_journal()
        opened(files)
        segment = files.open(path_of(1))
        segment.write(segment.size() - serial_bytes, [b"\xff"])
        with pytest.raises(CorruptJournal, match="later segments follow"):
            serials(files)


def test_a_missing_or_truncated_segment_is_refused(files: OsFiles) -> None:
    journal = opened(files)
    for serial in range(3):
        journal.append(record(serial))
        journal.rotate()
    journal.close()
    second = files.open(path_of(2))
    second.truncate(second.size() - 1)
    with pytest.raises(CorruptJournal, match=r"00000002\.log is damaged"):
        serials(files)
    files.remove(path_of(2))
    with pytest.raises(CorruptJournal, match=r"00000002\.log is damaged at byte 0: the file is missing"):
        serials(files)
    with pytest.raises(CorruptJournal, match=r"00000009\.log is damaged at byte 0: the file is missing"):
        held(files, 9)


def test_a_record_in_another_place_does_not_verify() -> None:
    files = small_journal(2)
    data = files.open(path_of(1)).read(0, 10_000)
    other = small_journal(2)
    other.open(path_of(1)).write(HEADER_BYTES, [data[HEADER_BYTES:]])  # the same place in another segment
    assert serials(other) == []
    start = HEADER_BYTES
    files.open(path_of(1)).write(len(data), [data[start:]])  # another place in the same segment
    assert serials(files) == [0, 1]


# -- trouble --


class Trouble:
    """Makes operations on the journal's files fail."""

    def __init__(self, operation: str, code: int) -> None:
        self.operation, self.code, self.on = operation, code, True

    def __call__(self, name: str, path: str) -> None:
        if self.on and name == self.operation and path.startswith("journal/"):
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_while_nothing_can_be_written_nothing_is_acknowledged_and_then_all_is(
    code: int, caplog: pytest.LogCaptureFixture
) -> None:
    files = FaultyFiles()
    journal = opened(files)
    futures = [journal.durable(journal.append(record(0), b"first"))]
    journal.pump()
    files.on_operation = trouble = Trouble("write", code)
    futures += [journal.durable(journal.append(record(serial), b"x" * 1000)) for serial in (1, 2)]
    for _ in range(31):
        assert not journal.pump()
    assert "free some space" in journal.trouble or "log" in journal.trouble
    assert [future.done() for future in futures] == [True, False, False]
    assert caplog.text.count("Nothing is acknowledged") == 2, "at once, and again after 30 tries"
    futures.append(journal.durable(journal.append(record(3))))
    trouble.on = False
    while not all(future.done() for future in futures):
        assert journal.pump()
    assert journal.trouble == ""
    assert "is written again" in caplog.text
    assert serials(files) == [0, 1, 2, 3]


def test_a_full_disk_delays_a_rotation_too() -> None:
    files = FaultyFiles()
    journal = opened(files)
    journal.append(record(0))
    journal.rotate()
    future = journal.durable(journal.append(record(1)))
    journal.pump()
    files.on_operation = trouble = Trouble("create", errno.ENOSPC)
    assert not journal.pump()
    trouble.on = False
    while not future.done():
        assert journal.pump()
    assert [(segment, serial) for segment, serial, _ in held(files)] == [(1, 0), (2, 1)]


def test_the_thread_tries_again_until_the_disk_has_room(files: OsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(files, retry_seconds=0.001)
    real, tried = os.pwritev, threading.Semaphore(0)

    def full(fd: int, buffers: list[memoryview], offset: int) -> int:
        tried.release()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    future = journal.durable(journal.append(record(7)))
    for _ in range(3):
        assert tried.acquire(timeout=10)
    assert not future.done()
    assert "No space left on device" in journal.trouble
    assert "MB free" in journal.trouble
    monkeypatch.setattr(os, "pwritev", real)
    future.result(10)
    journal.close()
    assert serials(files) == [7]


def test_a_disk_that_stays_full_fails_the_close() -> None:
    files = FaultyFiles()
    journal = opened(files)
    files.on_operation = Trouble("write", errno.ENOSPC)
    future = journal.durable(journal.append(record(0)))
    with pytest.raises(StorageFailed, match="closed before all was written.*disk is full"):
        journal.close()
    assert isinstance(future.exception(), StorageFailed)


@pytest.mark.parametrize(("operation", "code"), [("sync", errno.EIO), ("sync", errno.ENOSPC), ("write", errno.EBADF)])
def test_a_failed_sync_is_the_end(operation: str, code: int) -> None:
    files = FaultyFiles()
    journal = opened(files)
    failures: list[StorageFailed] = []
    journal.on_failure = failures.append
    waiting = journal.durable(journal.append(record(0)))
    files.on_operation = trouble = Trouble(operation, code)
    journal.pump()
    assert isinstance(waiting.exception(), StorageFailed)
    trouble.on = False
    later = journal.durable(journal.append(record(1)))
    journal.pump()
    assert isinstance(later.exception(), StorageFailed)
    assert failures == [journal.failed], "told once"
    with pytest.raises(StorageFailed, match="cannot (sync|write) the journal"):
        asyncio.run(journal.wait_room())
    journal.close()


def test_what_a_failed_sync_left_in_memory_is_on_disk_once_it_was_read() -> None:
    files = small_journal(2)
    journal = opened(files)
    files.on_operation = Trouble("sync", errno.EIO)
    journal.durable(journal.append(record(9)))
    journal.pump()
    assert journal.failed is not None
    again = files.kill()
    assert serials(again) == [0, 1, 9]
    opened(again)
    survivor = again.power_loss(Random(0))
    assert serials(survivor) == [0, 1, 9]


def test_who_appends_much_waits_for_room() -> None:
    async def scenario() -> None:
        journal = opened(FaultyFiles())
        await journal.wait_room()
        frame = bytes(1 << 20)
        for serial in range(QUEUE_BYTES >> 20):
            journal.append(record(serial), frame)
        waiting = asyncio.ensure_future(journal.wait_room())
        await asyncio.sleep(0)
        assert not waiting.done()
        assert journal.queued_bytes >= QUEUE_BYTES
        assert not journal.has_room
        journal.pump()
        assert journal.queued_bytes < QUEUE_BYTES
        assert journal.has_room
        await asyncio.wait_for(waiting, 10)

    asyncio.run(scenario())


def test_after_close_nothing_is_taken(files: OsFiles) -> None:
    journal = opened(files)
    journal.append(record(0))
    journal.close()
    journal.close()
    future: Future[None] = journal.durable(journal.append(record(1)))
    assert isinstance(future.exception(), StorageFailed)
    assert serials(files) == [0]


def test_a_cancelled_wait_harms_nobody() -> None:
    journal = opened(FaultyFiles())
    first, second = (journal.durable(journal.append(record(serial))) for serial in range(2))
    first.cancel()
    journal.pump()
    assert second.done()


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "diloco-journal":
            pytest.fail("a journal was not closed")
