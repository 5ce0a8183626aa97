"""What the server tells of the run: Describe and Status."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import PROTOCOL_VERSION
from diloco_proto.manifest import Role
from diloco_proto.wire import manifest_to_pb

from .engine import Engine
from .members import MemberState
from .round import RoundRecord
from .run import Run

STATES = ("empty", "seeding", "waiting", "running", "finished", "draining")


@cache
def software() -> str:
    """The version of diloco that runs here."""
    try:
        return version("diloco")
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def describe(run: Run, kept: Sequence[pb.KeptSnapshot] = ()) -> pb.RunDescription:
    """Settings and manifest; the manifest is empty until a worker has brought it."""
    manifest = run.manifest
    return pb.RunDescription(
        run_id=run.run_id,
        protocol=PROTOCOL_VERSION,
        config=run.config.as_text(),
        manifest=manifest_to_pb(manifest) if manifest else None,
        layout_fingerprint=run.layout.fingerprint if manifest else 0,
        seeded=run.seeded,
        kept=kept,
    )


def status(engine: Engine, rounds: int = 0) -> pb.RunStatus:
    """How the run stands now, with the records of the last `rounds` rounds of each fragment."""
    run, now = engine.run, engine.clock()
    means = engine.rates.means(now, engine.totals)
    return pb.RunStatus(
        run_id=run.run_id,
        state=state(engine),
        uptime_seconds=now - engine.started_at,
        parameters=sum(f.parameters for f in run.layout.trained) if run.manifest else 0,
        rounds=run.rounds_committed,
        bytes_in=engine.bytes_in,
        bytes_out=engine.bytes_out,
        config=run.config.as_text(),
        workers=[
            pb.WorkerStatus(
                worker_id=m.worker_id,
                state=m.state.value,
                seen_seconds=now - m.seen,
                counted=m.counted,
                not_counted=m.not_counted,
                last=m.last,
                shard=m.shard,
                sync_every=m.sync_every,
                steps_per_second=m.speed.steps_per_second or 0.0,
            )
            for m in run.members.all()
        ],
        fragments=_fragments(run, now, rounds) if run.manifest else [],
        tokens=run.tokens,
        stopped=run.stopped,
        rates=pb.Rates(**dataclasses.asdict(means)),
        storage=engine.storage() if engine.storage is not None else None,
        sessions=engine.sessions,
        version=software(),
    )


def state(engine: Engine) -> str:
    """One word, of STATES."""
    run = engine.run
    if engine.draining:
        return "draining"
    if run.manifest is None:
        return "empty"
    if not run.seeded:
        return "seeding"
    if not run.opened:
        return "waiting"
    live = run.members.live()
    finished = not live or all(m.state is MemberState.FINISHED for m in live)
    return "finished" if finished else "running"


_KIND = {Role.TRAINED: "trained", Role.BUFFER: "buffers", Role.FROZEN: "frozen"}


def _fragments(run: Run, now: float, rounds: int) -> list[pb.FragmentStatus]:
    result = []
    for fragment in run.layout.fragments:
        entry = pb.FragmentStatus(
            index=fragment.index,
            kind=_KIND[fragment.role],
            parameters=fragment.parameters,
            version=run.parameters.version(fragment.index),
            digest=run.parameters.digest(fragment.index),
            update_bytes=run.parameters.last_update_bytes(fragment.index),
        )
        result.append(entry)
        if fragment.role is Role.FROZEN:
            continue
        current = run.rounds.round(fragment.index)
        if current is not None:
            entry.contributed.extend(sorted(current.contributions))
            entry.waiting_for.extend(sorted(current.missing))
            entry.open_seconds = now - current.opened_at
            entry.waits.extend(_waits(run, fragment.index, now))
        records = run.rounds.records[fragment.index]
        if records:
            entry.round_seconds = records[-1].open_seconds
        entry.rounds.extend(_record(r) for r in list(records)[len(records) - min(rounds, len(records)) :])
    return result


def _waits(run: Run, fragment: int, now: float) -> list[pb.Wait]:
    """For whom the contributions of an open round wait, and for how long at most."""
    current = run.rounds.round(fragment)
    if current is None or current.first_at is None or current.closing:
        return []
    grace = run.rounds.grace_end(fragment)
    waits = []
    for worker_id in sorted(current.missing):
        wait = pb.Wait(worker_id=worker_id, seconds=now - current.first_at)
        waits.append(wait)
        member = run.members.known(worker_id)
        lease = run.members.silent_until(member, now) if member is not None else None
        ends = [(e, name) for e, name in ((grace, "grace"), (lease, "lease")) if e is not None and math.isfinite(e)]
        if ends:
            end, wait.bound = min(ends)
            wait.at_most = max(0.0, end - now)
    return waits


def _record(record: RoundRecord) -> pb.RoundStatus:
    return pb.RoundStatus(
        version=record.version,
        members=[pb.RoundMember(**dataclasses.asdict(member)) for member in record.members],
        missed=record.missed,
        open_seconds=record.open_seconds,
        fill_seconds=record.fill_seconds,
        grace_seconds=record.grace_seconds,
    )
