"""A server's life as its store sees it, in small: driven by a seed, without threads, on files that may fail.

`Life` keeps beside the store what must be true of it; `check` holds what a crash left against that.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from random import Random

import numpy as np
from faulty_files import FaultyFiles

from diloco_proto.errors import DilocoError
from diloco_proto.manifest import Manifest, Pattern, Role, TensorSpec, build_layout
from diloco_server.store import RunInfo, Store
from diloco_server.store import state_pb2 as pb
from diloco_server.store.replay import Replay

MANIFEST = Manifest((TensorSpec("a.weight", (3, 5), "float32", Role.TRAINED, ("tied",)),))
LAYOUT = build_layout(MANIFEST, 1, Pattern.STRIDED)
INFO = RunInfo("run", {"outer_lr": "0.7"}, MANIFEST, LAYOUT.fingerprint, created=0.0)


class Violation(AssertionError):
    """The store broke a promise."""


def demand(good: bool, what: str) -> None:
    if not good:
        raise Violation(what)


@cache
def blob_of(serial: int) -> bytes:
    return Random(serial).randbytes(serial * 7 % 41)


def record_of(serial: int) -> pb.Record:
    return pb.Record(frame=pb.Frame(serial=serial))


@cache
def theta_of(number: int) -> np.ndarray:
    return np.where(np.arange(64) < 15, np.float32(number + 1), np.float32(0)).astype(np.float32)


@cache
def momentum_of(number: int) -> np.ndarray:
    return np.full(64, number + 0.5, np.float32)


@dataclass
class Truth:
    """What a crash must not take away, and what it may have left."""

    appended: int = 0
    """Records so far, numbered from 0."""
    known: int = 0
    """So many records have been acknowledged, or were read by a server that came up."""
    promises: list[tuple[int, Future[None]]] = field(default_factory=list)
    finished: int = -1
    """Number of the newest snapshot that was finished."""
    begun: dict[int, int] = field(default_factory=dict)
    """Snapshot that was at least begun -> records before it."""

    def acknowledged(self) -> int:
        done = [n for n, future in self.promises if future.done() and future.exception() is None]
        return max([self.known, *done])


class Life:
    """`strike(files, truth)` is called before each operation on the files."""

    def __init__(self, random: Random, files: FaultyFiles, strike: Callable[[FaultyFiles, Truth], None]) -> None:
        self.random = random
        self.truth = Truth()
        self.strike = strike
        self.numbers = count()
        self._take(files)

    def _take(self, files: FaultyFiles) -> None:
        self.files = files
        self.failing, self.breaking = 0, False
        files.on_operation = self._operation
        self.store = Store(files.root, files=files)

    def _operation(self, name: str, path: str) -> None:
        self.strike(self.files, self.truth)
        if name == "write" and path.startswith("journal/") and self.failing:
            self.failing -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if name == "sync" and path.startswith("journal/") and self.breaking:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def run(self, steps: int) -> None:
        self.store.begin(INFO)
        self._snapshot()
        self.store.start_journal(threaded=False)
        actions = (
            (self._append, 12),
            (self._wait, 6),
            (self._write, 3),
            (self._snapshot, 2),
            (self._restart, 1),
            (self._die, 1),
            (self._fill_disk, 1),
            (self._break_disk, 0.5),
        )
        functions, weights = zip(*actions, strict=True)
        for _ in range(steps):
            self.random.choices(functions, weights)[0]()
            if self.store.journal.failed is not None:
                self._die()

    def _append(self) -> None:
        for _ in range(self.random.randint(1, 3)):
            serial = self.truth.appended
            self.truth.appended += 1
            self.store.journal.append(record_of(serial), blob_of(serial))

    def _wait(self) -> None:
        journal = self.store.journal
        future = journal.durable(journal.position)
        self.truth.promises.append((self.truth.appended, future))
        while not future.done():
            journal.pump()

    def _write(self) -> None:
        self.store.journal.pump()

    def _fill_disk(self) -> None:
        self.failing = self.random.randint(1, 2)

    def _break_disk(self) -> None:
        """The next sync fails, and what was written since the last never reaches the disk by itself."""
        self.breaking = True

    def _snapshot(self) -> None:
        number, journal = next(self.numbers), self.store.journal
        first = journal.rotate() if number else journal.next_segment
        self.truth.begun[number] = self.truth.appended
        draft = self.store.snapshots.begin(number, LAYOUT, INFO.run_id)
        draft.add(pb.FragmentState(fragment=0, version=number), theta_of(number), momentum_of(number))
        if number:
            self._append()
            self._wait()
            if journal.failed is not None:
                draft.discard()
                return
        draft.finish(pb.Snapshot(rounds_committed=number, first_segment=first))
        self.truth.finished = number
        if number:
            self.store.snapshots.prune(2)
            journal.drop_before(self.store.snapshots.oldest_segment())

    def _restart(self) -> None:
        self.failing, self.breaking = 0, False
        self.store.close()
        self.truth.known = self.truth.appended
        self._reopen(self.files)

    def _die(self) -> None:
        self._reopen(self.files.kill())

    def _reopen(self, files: FaultyFiles) -> None:
        self.truth.promises.clear()
        known = self.truth.known
        self._take(files)
        end = read(self.store, self.truth)
        demand(end >= known, "a restart lost records")
        self.store.start_journal(threaded=False)
        self.truth.appended = self.truth.known = end


def read(store: Store, truth: Truth) -> int:
    """Read all there is; returns how many records there are. Raises Violation."""
    latest = store.snapshots.latest()
    demand(latest is not None and latest >= truth.finished, f"snapshot {truth.finished} is gone")
    assert latest is not None
    demand(latest in truth.begun, f"snapshot {latest} was invented")
    oldest = store.snapshots.list()[0]
    for number in {oldest, latest}:
        saved = store.snapshots.read(number)
        demand(saved.rounds_committed == number, "another snapshot than its name says")
        arrays = store.snapshots.load_arrays(number, LAYOUT.fragments[0])
        demand(arrays["theta"].tobytes() == theta_of(number).tobytes(), f"theta of snapshot {number} differs")
        demand(arrays["momentum"].tobytes() == momentum_of(number).tobytes(), f"momentum of snapshot {number} differs")
    end = _follow(store.journal.replay(saved_first(store, latest)), truth.begun[latest])
    if oldest != latest:
        other = _follow(iter(Replay(store._files, saved_first(store, oldest))), truth.begun[oldest])
        demand(other == end, "an older snapshot does not lead to the same end")
    return end


def saved_first(store: Store, number: int) -> int:
    return store.snapshots.read(number).first_segment


def _follow(replayed, first: int) -> int:
    serial = first
    for _, record, blob in replayed:
        demand(record.frame.serial == serial, f"record {record.frame.serial} in the place of {serial}")
        demand(blob == blob_of(serial), f"the blob of record {serial} differs")
        serial += 1
    return serial


def check(files: FaultyFiles, truth: Truth, random: Random, killed: bool = False, depth: int = 0) -> None:
    """A new server comes up on what a crash left; now and then it crashes too. Raises Violation."""
    known = truth.acknowledged()
    now = Truth(truth.appended, known, [], truth.finished, truth.begun)
    # A kill leaves what is not on disk yet in sight of the next server.
    chance = (0.1 if killed else 0.02) if depth == 0 else 0.0

    def strike(name: str, path: str) -> None:
        if random.random() < chance:
            check(files.power_loss(random), now, random, depth=depth + 1)

    files.on_operation = strike
    try:
        store = Store(files.root, files=files)
        if store.info is None:
            demand(truth.finished < 0, "the run is gone")
            return
        end = read(store, now)
        demand(end >= known, f"{known} records were acknowledged, {end} are left")
        demand(end <= max(truth.appended, known), "records were invented")
        store.start_journal(threaded=False)
    except (DilocoError, OSError) as error:
        raise Violation(f"a crash alone led to {error!r}") from error
    if depth == 0 and random.random() < 0.2:
        check(files.power_loss(random), Truth(end, end, [], truth.finished, truth.begun), random, depth=depth + 1)


def crash_points(
    seed: int, share: float, switched_off: frozenset[str] = frozenset(), steps: int = 30
) -> tuple[int, set[str]]:
    """One life, and a crash at this share of its operations; returns how many, and where the code synced.

    Raises Violation.
    """
    random = Random(seed)
    points = 0

    def strike(files: FaultyFiles, truth: Truth) -> None:
        nonlocal points
        if chosen.random() < share:
            points += 1
            killed = chosen.random() < 0.2
            check(files.kill() if killed else files.power_loss(chosen), truth, chosen, killed)

    chosen = Random(f"crash {seed}")
    life = Life(random, FaultyFiles(switched_off=switched_off), strike)
    life.run(steps)
    return points, life.files.sites
