"""A restart whose journal begins in the middle: frames of contributions that were counted long ago are gone."""

from __future__ import annotations

import numpy as np
import pytest
from driven_run import MANIFEST, Sim
from test_recovery import Disk

from diloco_server.recovery import Recovery
from diloco_server.run import Run
from diloco_server.store.errors import CorruptJournal


def recover(kept: Disk, *, without: int, snapshot_segment: int) -> Run:
    """From the snapshot, with a journal in segment 1 that has lost its first records."""
    kept.snapshot.segment = snapshot_segment
    run = Run(kept.sim.run.config, run_id=kept.sim.run.run_id)
    arrays = {f: {n: a.copy() for n, a in saved.items()} for f, saved in kept.arrays.items()}
    recovery = Recovery(run, MANIFEST, kept.snapshot, arrays.__getitem__)
    for record, blob in kept.journal[without:]:
        recovery.take(record, memoryview(blob), 1)
    recovery.finish(kept.sim.now)
    return run


def pushed() -> Disk:
    """Fragment 0 has had a round, and a contribution waits in fragment 1."""
    sim = Sim(grace_seconds="inf").enter("a", "b")
    kept = Disk(sim)
    values = np.zeros(128, np.float32)
    values[:70] = 1.0
    for worker, fragment in (("a", 0), ("b", 0), ("a", 1)):
        kept.push(worker, values[: sim.run.layout.fragments[fragment].length], fragment)
    assert sim.versions() == [1, 0]
    return kept


def test_what_was_counted_before_the_snapshot_needs_no_frames() -> None:
    kept = pushed()
    journal = list(kept.journal)
    kept.save()
    kept.journal = journal
    run = recover(kept, without=1, snapshot_segment=2)
    assert [v.version for v in run.parameters.versions()] == [1, 0]
    assert [(c.key.worker_id, c.key.fragment) for c in run.rounds.waiting()] == [("a", 1)]


def test_what_came_after_it_does() -> None:
    with pytest.raises(CorruptJournal, match="without all of its frames"):
        recover(pushed(), without=1, snapshot_segment=1)
