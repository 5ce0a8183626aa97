"""The journal: records in the order in which they were appended, on disk before anybody is told so.

Appending only queues. One thread writes what is queued, and syncs when somebody waits for it, or when much was
written: one sync serves all who wait. A write that fails, since the disk is full or read-only, is made again at the
same place until it works, and until then nothing is acknowledged. A sync that fails is the end: nobody knows what is on
disk then.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import heapq
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import segment
from . import state_pb2 as pb
from .errors import StorageFailed, explain
from .faults import NO_FAULTS, FaultPoints
from .files import Files
from .replay import Last, Replay, Replayed
from .writer import SyncFailed, Writer

log = logging.getLogger("diloco.server")

Blob = bytes | bytearray | memoryview | NDArray[Any]

QUEUE_BYTES = 16 << 20
"""As much may wait to be written before `wait_room` waits."""

BATCH_BYTES = 8 << 20
"""About so much is written at a time, so that room is made again soon."""

SYNC_BYTES = 32 << 20
"""So much is synced before anybody asks: who asks then does not wait for all of a long push, and the pages serve for
what comes next."""

RETRY_SECONDS = 1.0
REMIND = 30
"""Tries after which a lasting trouble is logged again."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_RETRIED = (*_FULL, errno.EROFS, errno.EIO)
"""Errors of a write that may pass."""

_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class _Item:
    """Queued: a record, or an action to be taken when its turn comes."""

    position: int
    message: bytes = b""
    blob: memoryview = _NOTHING
    action: Callable[[], None] | None = None

    @property
    def nbytes(self) -> int:
        return segment.HEAD_BYTES + len(self.message) + len(self.blob)


@dataclass(frozen=True, slots=True)
class _Task:
    """What is written next; it stays the same until it worked."""

    run: Callable[[], None]
    position: int
    queued: int
    records: int


class Journal:
    """Appends may come from any thread. See the module for what they can rely on.

    Read it first (`replay`), then `start` it; a journal that was not started takes no records.
    """

    def __init__(self, files: Files, faults: FaultPoints = NO_FAULTS, retry_seconds: float = RETRY_SECONDS) -> None:
        self.on_failure: Callable[[StorageFailed], None] | None = None
        """Called once, from the thread that writes."""
        self.on_fsync: Callable[[float], None] | None = None
        """Called with the seconds that each sync took, from the thread that writes."""
        self.trouble = ""
        """Why nothing is written at the moment, in words for a human; empty while all is well."""
        self.failed: StorageFailed | None = None
        """Why nothing will ever be written again."""
        self.written_bytes = self.records = self.fsyncs = 0
        self.fsync_seconds = 0.0
        self._files = files
        self._writer = Writer(files, faults)
        self._writer.on_fsync = self._synced
        self._retry_seconds = retry_seconds
        self._replay: Replay | None = None
        self._changed = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._queued_bytes = 0
        self._position = 0
        self._number = 0
        """Of the segment into which what is appended now goes; 0 before the start."""
        self._waiting: list[tuple[int, int, Future[None]]] = []
        """A heap: position, order of arrival."""
        self._arrivals = 0
        self._wanting_room: list[Future[None]] = []
        self._written = self._durable = 0
        """Positions."""
        self._task: _Task | None = None
        self._tries = 0
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    # -- reading --

    def replay(self, from_segment: int) -> Iterator[Replayed]:
        """Segment, record and blob of each record since that segment; NO_JOURNAL: of none.

        To be read to its end before `start`: the end cuts off what a crash left half written. Raises CorruptJournal,
        StateMismatch (a newer format) or StorageFailed.
        """
        self._replay = Replay(self._files, from_segment)
        return iter(self._replay)

    def _last(self) -> Last:
        assert self._replay is not None, "replay comes before start"
        assert self._replay.last is not None, "the replay was not read to its end"
        return self._replay.last

    @property
    def next_segment(self) -> int:
        """The number of the segment that `start` or `rotate` begins."""
        return (self._number or self._last().number) + 1

    def disk_bytes(self) -> int:
        return sum(self._files.size(segment.path_of(n)) for n in segment.numbers(self._files))

    # -- appending --

    def start(self, at_least: int = 1, threaded: bool = True) -> None:
        """Begin a segment, of this number or a higher one. Not `threaded`: the caller calls `pump`.

        Raises StorageFailed.
        """
        last = self._last()
        number = max(last.number + 1, at_least)
        try:
            self._writer.begin(number, last.end if number == last.number + 1 else 0)
        except SyncFailed as error:
            raise self._explained("begin the journal", error.cause) from error
        except OSError as error:
            raise self._explained("begin the journal", error) from error
        self._number = number
        if threaded:
            self._thread = threading.Thread(target=self._work, name="diloco-journal", daemon=True)
            self._thread.start()

    @property
    def position(self) -> int:
        """Of what was appended last."""
        return self._position

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def append(self, record: pb.Record, blob: Blob = b"") -> int:
        """Queue a record; returns its position. The blob must stay as it is until it is written."""
        message = record.SerializeToString()
        view = blob.data if isinstance(blob, np.ndarray) else memoryview(blob)
        view = view.cast("B") if view.nbytes else _NOTHING
        assert max(len(message), len(view)) <= segment.MAX_BYTES
        with self._changed:
            return self._put(message, view)

    def rotate(self) -> int:
        """What is appended from now on goes into a new segment; returns its number."""
        with self._changed:
            number = self._number + 1
            self._put(action=lambda: self._writer.rotate(number))
            self._number = number
            return number

    def drop_before(self, number: int) -> None:
        """Remove the segments before this one, once what was appended so far is written."""
        with self._changed:
            if self._number:
                self._put(action=lambda: self._remove_before(number))
                return
        self._remove_before(number)

    def _put(self, message: bytes = b"", blob: memoryview = _NOTHING, action: Callable[[], None] | None = None) -> int:
        assert self._number, "the journal was not started"
        self._position += 1
        if self.failed is None:
            item = _Item(self._position, message, blob, action)
            self._queue.append(item)
            self._queued_bytes += item.nbytes
            self._changed.notify()
        return self._position

    def durable(self, position: int) -> Future[None]:
        """Done once all up to the position is on disk; fails with StorageFailed if it will never be."""
        future: Future[None] = Future()
        with self._changed:
            missing = position > self._durable
            if missing and self.failed is None:
                self._arrivals += 1
                heapq.heappush(self._waiting, (position, self._arrivals, future))
                self._changed.notify()
                return future
        _settle([future], self.failed if missing else None)
        return future

    @property
    def has_room(self) -> bool:
        """`wait_room` would not wait, nor raise."""
        return self.failed is None and self._queued_bytes < QUEUE_BYTES

    async def wait_room(self) -> None:
        """Until less than QUEUE_BYTES are queued. Raises StorageFailed."""
        with self._changed:
            if self.failed is not None:
                raise self.failed
            if self.has_room:
                return
            future: Future[None] = Future()
            self._wanting_room.append(future)
        await asyncio.wrap_future(future)

    def close(self) -> None:
        """Write all that is queued, and sync it. Nothing is appended after that.

        Raises StorageFailed if that does not work; not if the journal had failed before.
        """
        if not self._number or self._closing.is_set():
            return
        failed_before = self.failed is not None
        with self._changed:
            self._closing.set()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        while self._has_work() and self.pump():
            pass
        if self.failed is None and self.trouble:
            self._fail(StorageFailed(f"closed before all was written: {self.trouble}"))
        if self.failed is None:
            self._attempt(self._end)
        self._writer.close()
        if self.failed is not None and not failed_before:
            raise self.failed
        self._fail(StorageFailed("the journal is closed"), expected=True)

    # -- the thread that writes --

    def _work(self) -> None:
        try:
            while self.failed is None:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing.is_set() or self._has_work())
                if self._closing.is_set():
                    return
                if not self.pump():
                    self._closing.wait(self._retry_seconds)
        except Exception as error:
            log.exception("the thread that writes the journal died")
            self._fail(StorageFailed(f"the thread that writes the journal died: {error!r}"))

    def _has_work(self) -> bool:
        return bool(self._task or self._queue or self._sync_wanted())

    def _sync_wanted(self) -> bool:
        return bool(self._waiting) and self._waiting[0][0] <= self._written

    def pump(self) -> bool:
        """Write what is due, and sync it if somebody waits or it is much. False: in trouble, to be tried again."""
        if self._task is None:
            self._task = self._next_task()
        task = self._task
        if task is not None:
            if not self._attempt(task.run):
                return False
            self._task = None
            with self._changed:
                self._written = task.position
                self._queued_bytes -= task.queued
                self.records += task.records
                room, self._wanting_room = self._wanting_room, []
                if self._queued_bytes >= QUEUE_BYTES:
                    room, self._wanting_room = [], room
            _settle(room)
        unsynced = self._writer.unsynced
        if (self._sync_wanted() or unsynced >= SYNC_BYTES) and (not unsynced or self._attempt(self._writer.sync)):
            self._acknowledge()
        return self.failed is None

    def _next_task(self) -> _Task | None:
        with self._changed:
            if not self._queue:
                return None
            items = [self._queue.popleft()]
            size = items[0].nbytes
            if items[0].action is None:
                while self._queue and self._queue[0].action is None and size < BATCH_BYTES:
                    items.append(self._queue.popleft())
                    size += items[-1].nbytes
        position = items[-1].position
        action = items[0].action
        if action is not None:
            return _Task(action, position, size, 0)
        batch = self._writer.batch((item.message, item.blob) for item in items)
        self.written_bytes += batch.end - batch.offset
        return _Task(lambda: self._writer.write(batch), position, size, len(items))

    def _acknowledge(self) -> None:
        with self._changed:
            self._durable = self._written
            done = []
            while self._sync_wanted():
                done.append(heapq.heappop(self._waiting)[2])
        _settle(done)

    def _remove_before(self, number: int) -> None:
        for old in [n for n in segment.numbers(self._files) if n < number]:
            try:
                self._files.remove(segment.path_of(old))
            except OSError as error:
                log.warning("%s", explain(f"remove {self._files.root / segment.path_of(old)}", error))

    def _end(self) -> None:
        if self._writer.unsynced:
            self._writer.sync()
        self._acknowledge()
        with contextlib.suppress(OSError):
            self._writer.mark_end()

    def _synced(self, seconds: float) -> None:
        self.fsyncs += 1
        self.fsync_seconds += seconds
        if self.on_fsync is not None:
            self.on_fsync(seconds)

    # -- trouble --

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Whether it worked. If not, `trouble` says why, or `failed` if it never will."""
        try:
            action()
        except SyncFailed as error:
            self._fail(self._explained("sync the journal", error.cause))
            return False
        except OSError as error:
            problem = self._explained("write the journal", error)
            if error.errno not in _RETRIED:
                self._fail(problem)
                return False
            self.trouble = str(problem)
            if self._tries % REMIND == 0:
                log.error("%s. Nothing is acknowledged until it works again; trying on", self.trouble)
            self._tries += 1
            return False
        if self.trouble:
            log.warning("the journal is written again")
            self.trouble, self._tries = "", 0
        return True

    def _explained(self, action: str, error: OSError) -> StorageFailed:
        free = self._files.free_bytes() if error.errno in _FULL else None
        return StorageFailed(explain(f"{action} in {self._files.root}", error, free))

    def _fail(self, error: StorageFailed, expected: bool = False) -> None:
        with self._changed:
            if self.failed is not None:
                return
            self.failed, self.trouble = error, ""
            self._task = None
            self._queue.clear()
            self._queued_bytes = 0
            waiting = [entry[2] for entry in self._waiting] + self._wanting_room
            self._waiting.clear()
            self._wanting_room = []
        _settle(waiting, error)
        if not expected:
            log.critical("%s. The journal takes nothing more", error)
            if self.on_failure is not None:
                self.on_failure(error)


def _settle(futures: Iterable[Future[None]], error: Exception | None = None) -> None:
    """Outside of all locks, since whoever waits may be called back from here."""
    for future in futures:
        if future.set_running_or_notify_cancel():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(None)
