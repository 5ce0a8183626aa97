"""What the server tells of the run: Describe and Status."""

from __future__ import annotations

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import PROTOCOL_VERSION
from diloco_proto.manifest import Role
from diloco_proto.wire import manifest_to_pb

from .engine import Engine
from .members import MemberState
from .run import Run


def describe(run: Run) -> pb.RunDescription:
    """Settings and manifest; the manifest is empty until a worker has brought it."""
    manifest = run.manifest
    return pb.RunDescription(
        run_id=run.run_id,
        protocol=PROTOCOL_VERSION,
        config=run.config.as_text(),
        manifest=manifest_to_pb(manifest) if manifest else None,
        layout_fingerprint=run.layout.fingerprint if manifest else 0,
        seeded=run.seeded,
    )


def status(engine: Engine) -> pb.RunStatus:
    """How the run stands now."""
    run, now = engine.run, engine.clock()
    return pb.RunStatus(
        run_id=run.run_id,
        state=_state(engine),
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
            )
            for m in run.members.all()
        ],
        fragments=_fragments(run, now) if run.manifest else [],
    )


def _state(engine: Engine) -> str:
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


def _fragments(run: Run, now: float) -> list[pb.FragmentStatus]:
    result = []
    for fragment in run.layout.fragments:
        entry = pb.FragmentStatus(
            index=fragment.index,
            kind=fragment.role.value,
            parameters=fragment.parameters,
            version=run.parameters.version(fragment.index),
            digest=run.parameters.digest(fragment.index),
            update_bytes=run.parameters.last_update_bytes(fragment.index),
        )
        current = run.rounds.round(fragment.index) if fragment.role is Role.TRAINED else None
        if current is not None:
            entry.contributed.extend(sorted(current.contributions))
            entry.waiting_for.extend(sorted(current.missing))
            entry.open_seconds = now - current.opened_at
        if fragment.role is Role.TRAINED and run.rounds.records[fragment.index]:
            entry.round_seconds = run.rounds.records[fragment.index][-1].open_seconds
        result.append(entry)
    return result
