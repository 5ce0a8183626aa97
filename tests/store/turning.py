"""A state directory that goes back to an earlier state, then over to another run, with crashes in between.

At every moment it must hold exactly one of them, whole, and nothing that was put aside may be lost.
"""

from __future__ import annotations

import dataclasses
from random import Random

from faulty_files import FaultyFiles
from workload import INFO, LAYOUT, Violation, blob_of, demand, momentum_of, record_of, theta_of

from diloco_proto.errors import DilocoError
from diloco_server.store import Store
from diloco_server.store import state_pb2 as pb
from diloco_server.store.draft import Draft

OTHER = dataclasses.replace(INFO, run_id="other")
BACK = 77
"""Marks the arrays of the snapshot that is gone back to."""

FIRST, SECOND, THIRD, NONE, NEW = range(5)
"""What the directory can be found to hold, in turn."""

HELD = {
    (FIRST, 2): (2, 100),
    (SECOND, 1): (BACK, 200),
    (SECOND, 3): (BACK + 2, 300),
    (THIRD, 3): (BACK + 2, 300),
    (NEW, 0): (5, 400),
}
"""What it holds and its newest snapshot -> what is in its arrays, and the first record after it."""

Contents = dict[str, bytes]


def contents(files: FaultyFiles, top: str) -> Contents:
    found = {}
    for name in files.listdir(top):
        path = f"{top}/{name}"
        found |= contents(files, path) if files.is_directory(path) else {path: files.open(path).read(0, 1 << 20)}
    return found


def draft_of(store: Store, number: int, values: int) -> Draft:
    draft = store.snapshots.begin(number, LAYOUT, "x")
    draft.add(pb.FragmentState(fragment=0, version=number), theta_of(values), momentum_of(values))
    return draft


def append(store: Store, serials: range) -> None:
    journal = store.journal
    for serial in serials:
        journal.append(record_of(serial), blob_of(serial))
    future = journal.durable(journal.position)
    while not future.done():
        journal.pump()
    future.result()


class Turning:
    """`share` of all operations on the files see a crash. Raises Violation."""

    def __init__(self, seed: int, share: float, switched_off: frozenset[str] = frozenset()) -> None:
        self.random = Random(seed)
        self.share = share
        self.points = 0
        self.earliest = self.latest = FIRST
        self.aside: list[Contents] = []
        """What was put aside by each turn, by its new path."""
        files = FaultyFiles(switched_off=switched_off)
        self._first(files)
        files.settle()
        files.on_operation = lambda name, path: self._strike(files)
        self._go_back(files)
        self._begin_anew(files)
        self.sites = files.sites

    def _first(self, files: FaultyFiles) -> None:
        store = Store(files.root, files=files)
        store.begin(INFO)
        draft_of(store, 0, 0).finish(pb.Snapshot(first_segment=1))
        store.start_journal(threaded=False)
        for number in (1, 2):
            append(store, range(3 * number, 3 * number + 3))
            draft_of(store, number, number).finish(pb.Snapshot(first_segment=store.journal.rotate()))
            append(store, range(100, 101))
        store.close()

    def _go_back(self, files: FaultyFiles) -> None:
        store = Store(files.root, files=files)
        list(store.journal.replay(store.snapshots.read(1).first_segment))
        draft = draft_of(store, 1, BACK)
        put_aside = {f"old/{INFO.run_id}-1/{path}": data for path, data in contents(files, "journal").items()}
        for name in ("0000000001", "0000000002"):
            for path, data in contents(files, f"snapshots/{name}").items():
                put_aside[f"old/{INFO.run_id}-1/{path.replace('snapshots', 'snapshots.newer')}"] = data
        self.latest = SECOND
        self.aside.append(put_aside)
        store.roll_back(draft, pb.Snapshot(), 0)
        self.earliest = SECOND
        store.start_journal(threaded=False)
        append(store, range(200, 202))
        first = store.journal.rotate()
        append(store, range(0))
        draft_of(store, 3, BACK + 2).finish(pb.Snapshot(first_segment=first))
        append(store, range(300, 301))
        store.close()

    def _begin_anew(self, files: FaultyFiles) -> None:
        store = Store(files.root, files=files)
        self.latest = THIRD
        store.new_lineage()
        self.earliest = THIRD
        files.settle()
        put_aside = {f"old/{INFO.run_id}-2/run.json": files.open("run.json").read(0, 1 << 20)}
        for path, data in (contents(files, "journal") | contents(files, "snapshots")).items():
            put_aside[f"old/{INFO.run_id}-2/{path}"] = data
        self.latest = NONE
        self.aside.append(put_aside)
        store.archive()
        self.earliest = NONE
        self.latest = NEW
        store.begin(OTHER)
        draft_of(store, 0, 5).finish(pb.Snapshot(first_segment=1))
        self.earliest = NEW
        store.start_journal(threaded=False)
        append(store, range(400, 403))
        store.close()

    def _strike(self, files: FaultyFiles) -> None:
        if self.random.random() < self.share:
            self.points += 1
            image = files.kill() if self.random.random() < 0.2 else files.power_loss(self.random)
            self._check(image, self.earliest, self.latest)

    def _check(self, files: FaultyFiles, earliest: int, latest: int, depth: int = 0) -> None:
        def strike(name: str, path: str) -> None:
            if depth == 0 and self.random.random() < 0.05:
                self._check(files.power_loss(self.random), earliest, latest, 1)

        files.on_operation = strike
        try:
            store = Store(files.root, files=files)
            held = self._held(store)
            demand(earliest <= held <= latest, f"holds state {held}, not {earliest} to {latest}")
            for turn in self.aside[: (0, 1, 1, 2, 2)[held]]:
                for path, data in turn.items():
                    demand(files.exists(path), f"{path} is gone")
                    demand(files.open(path).read(0, 1 << 20) == data, f"{path} has changed")
            if held != NONE:
                self._read(store, held)
        except (DilocoError, OSError) as error:
            raise Violation(f"a crash alone led to {error!r}") from error
        if depth == 0:
            self._check(files.power_loss(self.random), held, max(held, latest), 1)

    def _held(self, store: Store) -> int:
        if store.info is None:
            return NONE
        return NEW if store.info.run_id == OTHER.run_id else store.info.lineage - 1

    def _read(self, store: Store, held: int) -> None:
        number = store.snapshots.latest()
        assert number is not None
        demand((held, number) in HELD, f"snapshot {number} in state {held}")
        values, first = HELD[held, number]
        theta = store.snapshots.load_arrays(number, LAYOUT.fragments[0])["theta"]
        demand(theta.tobytes() == theta_of(values).tobytes(), "another theta")
        replayed = [r.frame.serial for _, r, _ in store.journal.replay(store.snapshots.read(number).first_segment)]
        demand(replayed == list(range(first, first + len(replayed))), f"records {replayed} in state {held}")
        store.start_journal(threaded=False)
