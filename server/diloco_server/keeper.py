"""Keeps a run on disk while it goes on: its journal and its snapshots. Belongs to the engine's event loop."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import TypeVar

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import NotKept, StorageTrouble

from . import keeping
from .opening import Opened
from .parameters import Snapshot
from .pushes import Ticket
from .recovery import capture, small_snapshot
from .store import RunInfo, StorageFailed
from .store import state_pb2 as disk

T = TypeVar("T")

log = logging.getLogger("diloco.server")

SNAPSHOT_SHARE = 4.0
"""A snapshot is due, however few rounds there were, once the journal since the last has so many times the bytes of a
snapshot: that bounds both the disk that it takes and the time to replay it."""

LEAST_BYTES = 256 << 20
"""But not before so many bytes of journal."""

Lock = Callable[[int], AbstractAsyncContextManager[object]]
"""Of a fragment: nothing is committed to it meanwhile."""


class Keeper:
    """Keeps one run. Without a store it keeps nothing and everything counts as durable at once."""

    def __init__(self, opened: Opened, threads: ThreadPoolExecutor, *, journal: bool, every: int, kept: int) -> None:
        """`every`: rounds of all fragments from one snapshot to the next; `kept`: snapshots that stay on disk."""
        self._run = opened.run
        self._store = opened.store
        self._threads = threads
        self._journals = journal and opened.store is not None
        self._every = every
        self._kept = kept
        self._started = False
        self._segment = 0
        """Of the journal, that records go to now."""
        self._oldest = 0
        """Segment from which on contributions may lie that were waiting at the start."""
        self._segments: dict[int, int] = {}
        """Segment of the first frame of each contribution that may still be needed."""
        self._newest = opened.saved
        self._bytes = 0
        """Of journal, written before the last snapshot."""
        self._running: asyncio.Task[None] | None = None
        self.snapshot_seconds = 0.0
        """What the last snapshot took."""
        self.on_snapshot: Callable[[float], None] = lambda seconds: None
        """Called with it when one is complete."""
        opened.run.hold_seed = opened.store is not None and opened.saved is None

    @property
    def keeps(self) -> bool:
        """The run outlives this process."""
        return self._store is not None

    @property
    def trouble(self) -> str:
        """Why nothing can be acknowledged at the moment; empty when all is well."""
        return self._store.journal.trouble if self._store is not None and self._started else ""

    def check(self) -> None:
        """Raises StorageTrouble while nothing more can be taken."""
        if self.trouble:
            raise StorageTrouble(f"the server cannot keep contributions: {self.trouble}; training may go on meanwhile")

    def reach(self, point: str) -> None:
        """The engine is at a point of this name, at which a test may have the server die."""
        if self._store is not None:
            self._store.faults.reach(point)

    # -- the journal --

    async def resume(self, lock: Lock) -> None:
        """The run goes on from what was read: it is kept again from now on."""
        if self._newest is not None:
            first = self._newest.first_segment
            self._start(first)
            if not first or not self._journals:  # no journal leads on from that snapshot
                await self.snapshot(lock)
            if not self._journals:
                assert self._store is not None
                self._store.journal.drop_before(self._store.journal.next_segment)

    def _start(self, oldest_segment: int = 0) -> None:
        if not self._journals:
            return
        assert self._store is not None
        self._segment = self._store.journal.next_segment
        self._oldest = oldest_segment or self._segment
        self._store.start_journal()
        self._started = True
        # Who joined before the journal began is in it from the start.
        self.keep([disk.Record(member=keeping.member(m)) for m in self._run.members.all()])
        self.keep([disk.Record(progress=self._run.progress())])

    def keep(self, records: Iterable[disk.Record]) -> None:
        """Add them to the journal; `durable` waits until they are on disk."""
        if self._started:
            assert self._store is not None
            for record in records:
                self._store.journal.append(record)

    def keep_frame(self, ticket: Ticket, frame: memoryview) -> None:
        """A frame has come, of a contribution that is on its way in."""
        if self._started and ticket.header.purpose == pb.PURPOSE_CONTRIBUTION:
            assert self._store is not None
            self._segments.setdefault(ticket.assembly.serial, self._segment)
            self._store.journal.append(keeping.frame(ticket), frame)

    @property
    def has_room(self) -> bool:
        """Not too much waits to be written."""
        return not self._started or (self._store is not None and self._store.journal.has_room)

    async def room(self) -> None:
        """Until it has."""
        if self._started:
            assert self._store is not None
            await self._store.journal.wait_room()

    async def durable(self) -> None:
        """All that was kept so far is on disk. Raises StorageFailed if it never will be."""
        if self._started:
            assert self._store is not None
            await asyncio.wrap_future(self._store.journal.durable(self._store.journal.position))

    # -- snapshots --

    async def begin(self, lock: Lock) -> None:
        """The run has all of its first parameters: they are kept before anybody is told."""
        if self._store is not None:
            run, manifest = self._run, self._run.manifest
            assert manifest is not None
            info = RunInfo(
                run_id=run.run_id,
                config=run.config.as_text(),
                manifest=manifest,
                fingerprint=run.layout.fingerprint,
            )
            await self._call(self._store.begin, info)
            await self._save(lock, first_segment=self._store.journal.next_segment if self._journals else 0)
            self._start()

    def snapshot_due(self) -> bool:
        """Enough has happened since the last one, and none is being made."""
        if self._newest is None or self._store is None or self._running is not None:
            return False
        if self._run.rounds_committed - self._newest.rounds_committed >= self._every * self._run.layout.num_scheduled:
            return True
        state_bytes = 12 * sum(f.length for f in self._run.layout.fragments)
        written = self._store.journal.written_bytes - self._bytes
        return written >= max(LEAST_BYTES, SNAPSHOT_SHARE * state_bytes)

    def start_snapshot(self, lock: Lock, failed: Callable[[Exception], None]) -> None:
        """Make one, beside everything else."""

        async def make() -> None:
            try:
                await self.snapshot(lock)
            except (OSError, StorageFailed) as error:
                assert self._store is not None
                if self._store.journal.failed is not None:
                    failed(error)
                else:
                    log.error("no snapshot could be made, and the journal keeps growing: %s", error)
            except Exception as error:
                failed(error)
            finally:
                self._running = None

        self._running = asyncio.get_running_loop().create_task(make())

    async def snapshot(self, lock: Lock, *, clean: bool = False) -> None:
        """Keep the run as it is; what the journal holds of older rounds is dropped.

        `clean`: nothing comes after it, the server ends.
        """
        store = self._store
        if store is None or not self._run.seeded:
            return
        first = 0
        if self._started:
            live = self._run.serials()
            self._segments = {s: n for s, n in self._segments.items() if s in live}
            known = [self._segments.get(serial, self._oldest) for serial in live]
            self._segment = store.journal.rotate()
            self._bytes = store.journal.written_bytes
            first = min([self._segment, *known])
        await self._save(lock, first_segment=first, clean=clean)
        if self._started:
            store.journal.drop_before(store.snapshots.oldest_segment())

    async def _save(self, lock: Lock, *, first_segment: int, clean: bool = False) -> None:
        """Write a snapshot, fragment by fragment."""
        store, run = self._store, self._run
        assert store is not None
        began = time.monotonic()
        saved = small_snapshot(run, first_segment, self._segment, clean=clean)
        draft = await self._call(store.snapshots.begin, run.rounds_committed, run.layout, run.run_id)
        try:
            for fragment in run.layout.fragments:
                async with lock(fragment.index):
                    small = capture(run.model, fragment.index)
                    arrays = {n: a for n, a in run.parameters.state(fragment.index).arrays().items() if a.size}
                    await self._call(lambda small=small, arrays=arrays: draft.add(small, **arrays))
            await self.durable()  # the segments that it leans on
            await self._call(draft.finish, saved)
            self._newest = saved
        except BaseException:
            await self._call(draft.discard)
            raise
        await self._call(store.snapshots.prune, self._kept)
        self.snapshot_seconds = time.monotonic() - began
        self.on_snapshot(self.snapshot_seconds)
        log.info("kept version %d of the run in %.1f s", run.complete_rounds, self.snapshot_seconds)

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def kept(self, number: int, fragment: int) -> Snapshot:
        """theta of a fragment, as a kept snapshot holds it. Raises NotKept or CorruptSnapshot."""
        store, layout = self._store, self._run.layout
        if store is None or number not in store.snapshots.list():
            numbers = ", ".join(map(str, store.snapshots.list())) if store is not None else ""
            raise NotKept(f"no snapshot {number} is kept; there are: {numbers or 'none'}")
        saved = await self._call(store.snapshots.read, number)
        small = next(f for f in saved.fragments if f.fragment == fragment)
        theta = (await self._call(store.snapshots.load_arrays, number, layout.fragments[fragment], ["theta"]))["theta"]
        return Snapshot(fragment, small.version, layout.fragments[fragment].num_blocks, small.digest, theta)

    def all_kept(self) -> list[pb.KeptSnapshot]:
        """The snapshots on disk, oldest first."""
        if self._store is None:
            return []
        snapshots = self._store.snapshots
        return [
            pb.KeptSnapshot(number=n, versions=[f.version for f in s.fragments], saved_at=s.saved_at)
            for n, s in ((n, snapshots.read(n)) for n in snapshots.list())
        ]

    def describe(self) -> pb.Storage | None:
        """How the run stands on disk."""
        store = self._store
        if store is None:
            return None
        journal, newest = store.journal, self._newest
        sizes = {name: _bytes(store.root / name) for name in ("journal", "snapshots")}
        return pb.Storage(
            durability="journal" if self._journals else "snapshots",
            directory=str(store.root),
            journal_bytes=sizes["journal"],
            journal_written=journal.written_bytes,
            journal_segments=len(list((store.root / "journal").glob("*.log"))),
            fsyncs=journal.fsyncs,
            fsync_seconds=journal.fsync_seconds,
            snapshots=len(store.snapshots.list()),
            snapshot_bytes=sizes["snapshots"],
            snapshot_rounds=newest.rounds_committed if newest is not None else 0,
            snapshot_age_seconds=max(0.0, time.time() - newest.saved_at) if newest is not None else 0.0,
            free_bytes=shutil.disk_usage(store.root).free,
            trouble=self.trouble,
        )

    async def close(self, lock: Lock) -> None:
        """The server ends: keep the run as it is now."""
        if self._store is None:
            return
        if self._running is not None:
            await asyncio.wait({self._running})
        failed = self._started and self._store.journal.failed is not None
        if self._run.seeded and not failed:
            await self.snapshot(lock, clean=True)
        self._started = False
        await self._call(self._store.close)


def _bytes(folder: Path) -> int:
    """Of all files below it; those that go meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total
