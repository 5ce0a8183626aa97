"""A state directory: who may work in it, which run it holds, and how it goes over to another.

    lock              held by the one server that works here
    run.json          which run this is (`runfile`)
    journal/          what has happened since the oldest kept snapshot (`segment`, `journal`)
    snapshots/        what the run had come to (`snapshots`)
    old/RUN-1/        what --new or --rollback put aside; never removed
    pending.json      while that is under way, so that it is finished after a crash
    tls/ tokens/ …    other modules' files; they stay through --new

Order of a start: a fresh directory gets `begin`, snapshot 0 and `start_journal`; one that holds a run its newest
snapshot, `journal.replay` to the end and `start_journal`.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from . import runfile, segment
from . import state_pb2 as pb
from .draft import Draft
from .errors import CorruptSnapshot, StateMismatch, StorageFailed, explain
from .faults import NO_FAULTS, FaultPoints
from .files import Files, Lock, OsFiles, read_all, write_atomically
from .journal import Journal
from .replay import NO_JOURNAL, Replay, Replayed
from .runfile import RunInfo
from .snapshots import Snapshots
from .writer import SyncFailed, Writer

log = logging.getLogger("diloco.server")

RUN = "run.json"
PENDING = "pending.json"
OLD = "old"
PARTS = ("journal", "snapshots", RUN)
"""Of a run."""


class Store:
    """Open until `close`. For one thread at a time; its journal and snapshots are for several."""

    def __init__(
        self, root: Path, *, faults: FaultPoints = NO_FAULTS, files: Files | None = None, new: bool = False
    ) -> None:
        """`new`: put aside whatever run is there, readable or not.

        Raises StateInUse, StateMismatch (a newer format, or parts of the state are missing), CorruptSnapshot (the
        snapshots are gone) or StorageFailed.
        """
        self._files = files if files is not None else OsFiles(root)
        self.root = self._files.root
        self.info: RunInfo | None = None
        """The run that is held here; None in a fresh directory."""
        self.faults = faults
        self.journal = Journal(self._files, faults)
        self.snapshots = Snapshots(self._files, faults)
        with self._storing("open"):
            self._files.mkdir("")
            lock = self._files.lock("lock")
        self._lock: Lock | None = lock
        try:
            with self._storing("open"):
                self._finish_pending()
                if new and any(self._files.exists(path) for path in PARTS):
                    with contextlib.suppress(StateMismatch, CorruptSnapshot):
                        self.info = self._read_info()  # for its name
                    log.warning("the former run was moved to %s", self.archive())
                self._make_parts()
                # What is found here may have been in memory only: the last server died before it came to sync it.
                self._files.sync_dir("")
                self._files.sync_dir("snapshots")
                self.snapshots.remove_temporaries()
                self.info = self._read_info()
        except BaseException:
            lock.release()
            raise

    def _make_parts(self) -> None:
        for part in ("journal", "snapshots"):
            self._files.mkdir(part)

    def _read_info(self) -> RunInfo | None:
        begun = bool(self.snapshots.list() or segment.numbers(self._files))
        if not self._files.exists(RUN):
            if begun:
                raise StateMismatch(
                    f"{self.root} holds a journal or snapshots, but no {RUN}: put back a copy of it, or begin a new "
                    "run with --new, which keeps what is there in old/"
                )
            return None
        info = runfile.unpack(read_all(self._files, RUN), self.root / RUN)
        if not begun:
            return None  # it ended before it had parameters to keep
        if not self.snapshots.list():
            raise CorruptSnapshot(
                f"all snapshots are gone from {self.root}: put back a copy of them, or begin a new run with --new"
            )
        return info

    def begin(self, info: RunInfo) -> None:
        """A fresh directory becomes this run's. Raises StorageFailed."""
        assert self.info is None
        with self._storing("write to"), contextlib.suppress(PermissionError):
            self._files.sync_dir("..")
        self._write_info(info)
        for _ in self.journal.replay(NO_JOURNAL):
            pass

    def check_same(self, config: dict[str, str], fingerprint: int | None = None) -> None:
        """Raises StateMismatch, with all differences, unless the run here has this configuration and layout."""
        assert self.info is not None
        found = runfile.differences(self.info, config, fingerprint)
        if found:
            raise StateMismatch(
                f"{self.root} holds run {self.info.run_id} with other settings ({'; '.join(found)}): start with those, "
                "or begin a new run with --new, which keeps the former in old/"
            )

    def start_journal(self, *, threaded: bool = True) -> None:
        """Everything was read: records are taken from now on. See `Journal.start`. Raises StorageFailed."""
        self.journal.start(at_least=max(1, self.snapshots.newest_segment()), threaded=threaded)

    def disk_bytes(self) -> int:
        """Of journal and snapshots."""
        kept = [f"snapshots/{name}" for _, _, name in self.snapshots.names()]
        files = [f"{directory}/{name}" for directory in kept for name in self._files.listdir(directory)]
        return self.journal.disk_bytes() + sum(self._files.size(path) for path in files)

    def close(self) -> None:
        """Flush the journal and let others in. Raises StorageFailed when the journal cannot be flushed."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            try:
                self.journal.close()
            finally:
                lock.release()

    # -- another run, or an earlier state --

    def new_lineage(self) -> int:
        """The run went back to its newest snapshot; returns the number of its new life. Raises StorageFailed."""
        assert self.info is not None
        self._write_info(replace(self.info, lineage=self.info.lineage + 1))
        return self.info.lineage

    def archive(self) -> Path:
        """Put the run aside, for a new one; returns where it is. Raises StorageFailed."""
        return self._begin_pending({"what": "archive"})

    def rolled_back_before(self, version: int | None) -> bool:
        """Whether the run was rolled back to `version` at the last start already: it must not be at every restart.

        A start without a roll-back (None) ends that. Raises StorageFailed.
        """
        assert self.info is not None
        if version is None and self.info.rolled_back_to is not None:
            self._write_info(replace(self.info, rolled_back_to=None))
        return version is not None and self.info.rolled_back_to == version

    def replay_back(self, from_segment: int) -> Iterator[Replayed]:
        """`Journal.replay` for a roll-back: what an earlier one has put aside is read from there."""
        if from_segment != NO_JOURNAL and from_segment not in segment.numbers(self._files):
            for journal in self._put_aside_journals():
                if from_segment in segment.numbers(self._files, journal):
                    return iter(Replay(self._files, from_segment, journal))
        return self.journal.replay(from_segment)

    def _put_aside_journals(self) -> list[str]:
        assert self.info is not None
        runs = self._files.listdir(OLD) if self._files.exists(OLD) else []
        journals = (f"{OLD}/{name}/{segment.JOURNAL}" for name in runs if name.startswith(f"{self.info.run_id}-"))
        return [journal for journal in journals if self._files.exists(journal)]

    def roll_back(self, draft: Draft, snapshot: pb.Snapshot, version: int) -> Path:
        """In place of `draft.finish`: this is what the run has come to, with a new lineage and an empty journal.

        The former journal, and the snapshots of as many rounds or more, are put aside; returns where they are.
        Before `start_journal`. Raises StorageFailed.
        """
        assert self.info is not None
        number = max([*segment.numbers(self._files), self.snapshots.newest_segment()]) + 1
        snapshot.first_segment = number
        draft.prepare(snapshot)
        with self._storing("write to"):
            self._files.sync_dir("snapshots")
        draft.keep()
        return self._begin_pending(
            {
                "what": "roll back",
                "segment": number,
                "lineage": self.info.lineage + 1,
                "version": version,
                "draft": draft.path,
                "name": draft.name,
                "number": draft.number,
            }
        )

    def _begin_pending(self, task: dict[str, Any]) -> Path:
        stem = f"{OLD}/{self.info.run_id}" if self.info else f"{OLD}/unknown"
        to = next(path for n in count(1) if not self._files.exists(path := f"{stem}-{n}"))
        with self._storing("write to"):
            write_atomically(self._files, PENDING, json.dumps({**task, "to": to}).encode())
            self._finish_pending()
        return self.root / to

    def _finish_pending(self) -> None:
        """May have been cut off at any point before: every step can be taken twice."""
        if not self._files.exists(PENDING):
            return
        try:
            task = json.loads(read_all(self._files, PENDING))
        except ValueError as error:
            raise StateMismatch(
                f"{self.root / PENDING} cannot be read ({error}): put back a copy of the state directory"
            ) from error
        self._make_old(task["to"])
        if task["what"] == "archive":
            self._put_aside(task["to"])
        else:
            self._go_back(task)
        self._files.remove(PENDING)
        self._files.sync_dir("")  # else it could be done once more, to the next run

    def _make_old(self, to: str) -> None:
        self._files.mkdir(OLD)
        self._files.mkdir(to)
        self._files.mkdir(f"{to}/snapshots.newer")
        # Inner ones first: what was moved into them before a crash is not to leave its old place before.
        for directory in (to, OLD, ""):
            self._files.sync_dir(directory)

    def _put_aside(self, to: str) -> None:
        for part in PARTS:
            self._move(part, f"{to}/{part}")
        self._files.sync_dir(to)
        self._make_parts()
        self.info = None

    def _go_back(self, task: dict[str, Any]) -> None:
        to, name = task["to"], f"snapshots/{task['name']}"
        if not (self._files.exists(task["draft"]) or self._files.exists(name)):
            raise CorruptSnapshot(
                f"{self.root / task['draft']}, to which the run was being rolled back, is gone: put it back, or remove "
                f"{PENDING} to stay where the run was"
            )
        self._move("journal", f"{to}/journal")
        for number, _, other in self.snapshots.names():
            if number >= task["number"] and other != task["name"]:
                self._move(f"snapshots/{other}", f"{to}/snapshots.newer/{other}")
        for directory in (to, f"{to}/snapshots.newer", "snapshots"):
            self._files.sync_dir(directory)
        self._move(task["draft"], name)
        self._files.sync_dir("snapshots")
        self._begin_empty_journal(task["segment"])
        info = runfile.unpack(read_all(self._files, RUN), self.root / RUN)
        self._write_info(replace(info, lineage=task["lineage"], rolled_back_to=task.get("version")))

    def _begin_empty_journal(self, number: int) -> None:
        """Its first segment says that there is nothing before it: no later one may be taken for the first."""
        self._make_parts()
        writer = Writer(self._files, NO_FAULTS)
        try:
            writer.begin(number, 0)
        except SyncFailed as error:
            raise error.cause from error
        finally:
            writer.close()
        for _ in self.journal.replay(number):
            pass

    def _move(self, old: str, new: str) -> None:
        if self._files.exists(old) and not self._files.exists(new):
            self._files.rename(old, new)

    def _write_info(self, info: RunInfo) -> None:
        with self._storing("write to"):
            write_atomically(self._files, RUN, runfile.pack(info))
            self._files.sync_dir("")
        self.info = info

    @contextlib.contextmanager
    def _storing(self, action: str) -> Iterator[None]:
        try:
            yield
        except StorageFailed:
            raise
        except OSError as error:
            raise StorageFailed(explain(f"{action} {self.root}", error)) from error
