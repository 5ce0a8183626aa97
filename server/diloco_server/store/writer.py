"""Writes the segments of the journal. One thread; knows nothing of who waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from . import segment
from .faults import FaultPoints
from .files import File, Files
from .segment import HEADER_BYTES, RECORD, Header


class SyncFailed(Exception):
    """A sync failed: what is on disk is not known any more."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Batch:
    """Records at their place: the same bytes at the same place, however often they have to be written."""

    offset: int
    buffers: Sequence[bytes | memoryview]
    end: int


class Writer:
    """Owns the segment that is written. Methods raise OSError, after which they may be called again, or SyncFailed."""

    def __init__(self, files: Files, faults: FaultPoints) -> None:
        self.on_fsync: Callable[[float], None] = lambda seconds: None
        self._files = files
        self._faults = faults
        self._file: File | None = None
        self._header = Header(0, 0, b"")
        self._offset = self._synced = 0
        self._barrier_due = False

    @property
    def unsynced(self) -> int:
        """Bytes that were written and not synced."""
        return self._offset - self._synced

    def begin(self, number: int, previous_end: int) -> None:
        """Go over to a new segment. Its head is on disk before it gets records: see `segment`."""
        header, path = Header.fresh(number, previous_end), segment.path_of(number)
        if self._files.exists(path) and self._files.size(path) <= HEADER_BYTES:
            self._files.remove(path)  # of an attempt that failed
        file = self._files.open(path, create=True)
        try:
            file.write(0, [header.pack()])
            self._sync(file.sync)
            self._sync(lambda: self._files.sync_dir("journal"))
        except BaseException:
            file.close()
            raise
        self.close()
        self._file, self._header = file, header
        self._offset = self._synced = HEADER_BYTES
        self._barrier_due = False

    def rotate(self, number: int) -> None:
        """Go over to the next segment; all of this one is on disk before there is another."""
        if self.unsynced:
            self.sync()
        self.begin(number, self._offset)

    def batch(self, records: Iterable[tuple[bytes, memoryview]]) -> Batch:
        """Place messages with their blobs at the end of the segment."""
        buffers: list[bytes | memoryview] = []
        offset = self._offset
        if self._barrier_due:
            buffers.append(segment.pack_barrier(self._header, offset))
            offset += len(buffers[0])
        for message, blob in records:
            head = segment.pack_head(self._header, offset, RECORD, message, blob)
            buffers += (head, message, blob) if len(blob) else (head, message)
            offset += len(head) + len(message) + len(blob)
        return Batch(self._offset, buffers, offset)

    def write(self, batch: Batch) -> None:
        assert self._file is not None
        assert batch.offset == self._offset
        self._faults.reach("before_append")
        self._file.write(batch.offset, batch.buffers)
        self._offset, self._barrier_due = batch.end, False
        self._faults.reach("after_append")

    def sync(self) -> None:
        """All that was written is on disk."""
        assert self._file is not None
        self._faults.reach("before_fsync")
        self._sync(self._file.sync)
        self._synced, self._barrier_due = self._offset, True
        self._faults.reach("after_fsync")

    def mark_end(self) -> None:
        """Leave a barrier for the next reader."""
        if self._barrier_due and self._file is not None:
            batch = self.batch(())
            self._file.write(batch.offset, batch.buffers)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _sync(self, sync: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            sync()
        except OSError as error:
            raise SyncFailed(error) from error
        self.on_fsync(time.perf_counter() - began)
