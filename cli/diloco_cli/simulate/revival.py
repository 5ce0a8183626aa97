"""Brings the run of a simulated server back from its disk, as the server does when it starts."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field

from diloco_proto.manifest import Manifest
from diloco_server.config import RunConfig
from diloco_server.model import Committed
from diloco_server.recovery import Recovery
from diloco_server.round import Close
from diloco_server.run import Run

from .disk import Disk, Saved


@dataclass(frozen=True, slots=True)
class Back:
    """The run is to go on from an earlier state: from this version of every fragment, as --rollback does; with None
    from the newest snapshot, as --durability snapshots does."""

    version: int | None


@dataclass(slots=True)
class Revived:
    """A run that was brought back."""

    run: Run
    saved: Saved
    """From which."""
    kept: int
    """So many records are in it."""
    back: Back | None = None
    remade: list[Committed] = field(default_factory=list)
    """Outer steps that were made again."""


class _Remaking(Run):
    """Collects what it commits while it is brought back."""

    def __init__(self, config: RunConfig, run_id: str) -> None:
        super().__init__(config, run_id=run_id)
        self.remade: list[Committed] | None = []

    def commit(self, close: Close, threads: Executor | None = None) -> Committed:
        committed = super().commit(close, threads)
        if self.remade is not None:
            self.remade.append(committed)
        return committed


def revive(disk: Disk, config: RunConfig, manifest: Manifest, now: float, back: Back | None = None) -> Revived:
    """The run that the disk holds. Raises CorruptJournal."""
    until = back.version if back else None
    saved = next(s for s in reversed(disk.snapshots) if until is None or s.version <= until)
    run = _Remaking(config, _run_id(disk))
    recovery = Recovery(run, manifest, saved.snapshot, saved.read, until=until)
    kept = disk.position if back is None or until is not None else saved.position
    if back is None or until is not None:
        for segment, record, blob in disk.replay(saved.snapshot.first_segment):
            recovery.take(record, blob, segment)
    recovery.finish(now)
    remade, run.remade = run.remade or [], None
    if back is not None:
        disk.lineage += 1
        run.run_id = _run_id(disk)
        disk.snapshots = [Saved.whole(run, disk.segment + 1, disk.position)]
        saved = disk.snapshots[0]
    return Revived(run, saved, kept, back, remade)


def _run_id(disk: Disk) -> str:
    return f"{disk.run_id}.{disk.lineage}" if disk.lineage else disk.run_id
