"""Opens a state directory: a run that goes on, or an empty place for a new one."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Executor
from dataclasses import dataclass

from diloco_proto.errors import ConfigError
from diloco_proto.manifest import build_layout

from .checkpoint import InitialParameters
from .config import RunConfig, ServerConfig
from .recovery import Recovery, capture, small_snapshot
from .run import Run
from .store import CorruptJournal, FaultPoints, RunInfo, Store
from .store import state_pb2 as disk

log = logging.getLogger("diloco.server")


@dataclass(frozen=True, slots=True)
class Opened:
    """A run, and the store that keeps it."""

    run: Run
    store: Store | None
    saved: disk.Snapshot | None = None
    """The snapshot that the run goes on from; None for a new one."""


def open_run(config: RunConfig, server: ServerConfig, threads: Executor, now: float) -> Opened:
    """The run that the state directory holds, or a new one. `now` is the engine's time in seconds.

    Raises StateInUse, StateMismatch, CorruptJournal, CorruptSnapshot, StorageFailed or ConfigError.
    """
    init = InitialParameters(server.init) if server.init else None
    if server.state_dir is None:
        return Opened(Run(config, init), None)
    store = Store(server.state_dir, faults=FaultPoints.from_environment(), new=server.new)
    try:
        if store.info is None:
            if server.rollback is not None:
                raise ConfigError(f"nothing to roll back: {server.state_dir} holds no run")
            return Opened(Run(config, init), store)
        store.check_same(config.as_text())
        if init is not None:
            log.warning("--init is not used: the run in %s goes on", server.state_dir)
        return _resume(config, server, store, store.info, threads, now)
    except BaseException:
        store.close()
        raise


def _resume(
    config: RunConfig, server: ServerConfig, store: Store, info: RunInfo, threads: Executor, now: float
) -> Opened:
    began, until = time.monotonic(), server.rollback
    if store.rolled_back_before(until):
        log.warning(
            "the run was rolled back to version %d at an earlier start, and goes on from where it has come to since: "
            "leave out --rollback. After one start without it, it can be rolled back there again",
            until,
        )
        until = None
    number = _newest(store, until)
    saved = store.snapshots.read(number)
    run = Run(config, run_id=_run_id(info.run_id, info.lineage))
    fragments = build_layout(info.manifest, config.num_fragments, config.pattern).fragments
    recovery = Recovery(
        run, info.manifest, saved, lambda f: store.snapshots.load_arrays(number, fragments[f]), threads, until
    )
    try:
        replay = store.journal.replay if until is None else store.replay_back
        for segment, record, blob in replay(saved.first_segment):
            recovery.take(record, blob, segment)
    except CorruptJournal:
        if until is None or any(v.version < until for v in run.parameters.versions()[: run.layout.num_scheduled]):
            raise
        log.warning("the journal is damaged, but only after version %d", until)
    recovery.finish(now)
    if until is not None:
        saved = small_snapshot(run)
        run.run_id = _run_id(info.run_id, _roll_back(store, run, saved, until))
        log.warning("rolled back to version %d; what came after it is in %s", until, store.root / "old")
    elif not saved.first_segment and not saved.clean:
        run.run_id = _run_id(info.run_id, store.new_lineage())
        log.warning("rounds since the last snapshot are lost (--durability snapshots): workers go on from there")
    log.warning(
        "run %s goes on at version %d: snapshot of %d outer steps, and %d more from the journal, in %.1f s",
        run.run_id,
        run.complete_rounds,
        saved.rounds_committed,
        recovery.replayed,
        time.monotonic() - began,
    )
    return Opened(run, store, saved)


def _newest(store: Store, until: int | None) -> int:
    """The newest snapshot that no fragment of which is beyond `until`."""
    numbers = store.snapshots.list()
    for number in reversed(numbers):
        if until is None or all(f.version <= until for f in store.snapshots.read(number).fragments):
            return number
    oldest = max((f.version for f in store.snapshots.read(numbers[0]).fragments), default=0)
    raise ConfigError(
        f"cannot roll back to version {until}: the oldest snapshot that is kept is of version {oldest}; "
        "choose that or a later one (--keep-snapshots keeps more)"
    )


def _roll_back(store: Store, run: Run, saved: disk.Snapshot, version: int) -> int:
    """Make the run as it is now, at `version`, the newest state on disk. Returns its lineage."""
    draft = store.snapshots.begin(run.rounds_committed, run.layout, run.run_id)
    for fragment in run.layout.fragments:
        arrays = {n: a for n, a in run.parameters.state(fragment.index).arrays().items() if a.size}
        draft.add(capture(run.model, fragment.index), **arrays)
    store.roll_back(draft, saved, version)
    assert store.info is not None
    return store.info.lineage


def _run_id(stem: str, lineage: int) -> str:
    """The id that workers know: another one after every roll-back."""
    return stem if lineage <= 1 else f"{stem}.{lineage - 1}"
