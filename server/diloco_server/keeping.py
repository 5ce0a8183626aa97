"""What a run leaves behind to be kept on disk: the records of its journal, made from its own terms. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from diloco_proto import outer_pb2 as pb

from .members import Member, MemberState
from .pushes import Ticket
from .round import Close, Counted, Key
from .store import state_pb2 as disk

NEVER_FLUSHED = -1


def key_record(key: Key) -> disk.Key:
    return disk.Key(fragment=key.fragment, base_version=key.base_version, worker_id=key.worker_id)


def key_of(record: disk.Key) -> Key:
    return Key(record.fragment, record.base_version, record.worker_id)


def frame(ticket: Ticket) -> disk.Record:
    """A frame of a contribution came; its bytes go along."""
    key = ticket.announced.key
    return disk.Record(
        frame=disk.Frame(serial=ticket.assembly.serial, fragment=key.fragment, base_version=key.base_version)
    )


def staged(ticket: Ticket, norm: float) -> disk.Record:
    """A contribution is complete."""
    work = ticket.assembly.work
    return disk.Record(
        staged=disk.Staged(
            serial=ticket.assembly.serial,
            key=key_record(ticket.announced.key),
            generation=ticket.header.generation,
            tokens=work.tokens,
            steps=work.steps,
            since_version=work.since_version,
            norm=norm,
        )
    )


def closed(close: Close) -> disk.Record:
    """A round is decided."""
    return disk.Record(
        closed=disk.Closed(
            fragment=close.fragment,
            base_version=close.base_version,
            serials=[c.serial for c in close.contributions],
            weights=close.weights,
            scales=close.scales,
            delay=close.delay,
        )
    )


def published(fragment: int, version: int, digest: int, void: bool, expected: Iterable[str]) -> disk.Record:
    """An outer step was made, and the next round is open."""
    return disk.Record(
        published=disk.Published(fragment=fragment, version=version, digest=digest, void=void, expected=expected)
    )


def member(m: Member) -> disk.Member:
    """All of a member that outlives the server's process."""
    return disk.Member(
        worker_id=m.worker_id,
        generation=m.generation,
        shard=m.shard,
        state=m.state.value,
        sync_every=m.sync_every,
        counted=m.counted,
        not_counted=m.not_counted,
        done=m.done,
        flush=NEVER_FLUSHED if m.flush is None else m.flush,
        barrier=m.barrier,
        step=m.step,
        tokens=m.last.tokens,
        hung=m.hung,
    )


def member_of(record: disk.Member, now: float) -> Member:
    """The member again, with a lease that begins now."""
    return Member(
        worker_id=record.worker_id,
        generation=record.generation,
        seen=now,
        moved=now,
        shard=record.shard,
        state=MemberState(record.state),
        sync_every=record.sync_every,
        counted=record.counted,
        not_counted=record.not_counted,
        done=record.done,
        flush=None if record.flush == NEVER_FLUSHED else record.flush,
        barrier=record.barrier,
        last=pb.Heartbeat(step=record.step, tokens=record.tokens),
        hung=record.hung,
    )


def counted(c: Counted) -> disk.Counted:
    return disk.Counted(key=key_record(c.key), frames=c.frames, version=c.version)


def counted_of(record: disk.Counted) -> Counted:
    return Counted(key_of(record.key), dict(record.frames), record.version)
