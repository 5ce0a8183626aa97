"""Who is in the run: workers, their generations and leases. Pure: time is passed in, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import InvalidContribution, NotMember, Superseded

from .pace import Speed
from .round import RoundRecord

COUNTS = ("step", "steps", "tokens", "bytes_up", "bytes_down", "train_seconds", "stall_seconds")

MOST_COUNTED = 1 << 53
"""Of any of these; beyond it neither a double nor JSON tells two numbers apart."""

KEPT_GONE = 256
"""Workers that are gone and still remembered, for status and so that an older process of theirs is refused."""

BEAT_SHARE = 1 / 5
"""Of the lease: how often a worker is to send a heartbeat."""

CUT_SHARE = 1 / 3
"""Of the lease: so long a worker whose connection broke may take to come back. A process that was killed breaks it
at once, and rounds need not wait for the whole lease; one that was only cut off is back within seconds."""


class MemberState(StrEnum):
    """A member's way through the run; only READY members are expected in rounds."""

    JOINING = "joining"
    READY = "ready"
    FINISHING = "finishing"
    FINISHED = "finished"
    GONE = "gone"


@dataclass(slots=True)
class Member:
    """One worker, by id. `generation` tells its processes apart."""

    worker_id: str
    generation: int
    seen: float
    moved: float
    """When its training was last known to go on."""
    shard: int
    """Its share of the data; see `Members.shards`."""
    sync_every: int = 0
    """Its H; 0 before it was ready."""
    start_step: int = 0
    """The inner step at which it was told to begin."""
    speed: Speed = field(default_factory=Speed)
    cut_at: float | None = None
    """When its connection broke, if it has not come back."""
    hung: bool = False
    done: bool = False
    """It has said that it ends, by finishing: the run goes on without it, even after it has left."""
    flush: int | None = None
    """Number of its last flush together with the others."""
    barrier: int = 0
    """The meeting of all workers for which it has finished, counted from 1."""
    state: MemberState = MemberState.JOINING
    counted: int = 0
    not_counted: int = 0
    last: pb.Heartbeat = field(default_factory=pb.Heartbeat)

    @property
    def live(self) -> bool:
        return self.state is not MemberState.GONE

    @property
    def step(self) -> int:
        """How far it is known to have come, in the run's count."""
        return max(self.start_step, self.last.step)

    def moves(self, now: float) -> None:
        """Its training goes on."""
        self.moved, self.hung = now, False

    def hears_of(self, record: RoundRecord, now: float) -> None:
        """A round is over."""
        if self.worker_id in record.counted:
            self.counted += 1
            self.moves(now)  # it may have waited for this
        elif self.worker_id in record.missed:
            self.not_counted += 1

    def hears(self, beat: pb.Heartbeat, now: float) -> None:
        """Raises InvalidContribution for numbers that nobody can have counted: they would come back as those of all."""
        for name in COUNTS:
            if not 0 <= getattr(beat, name) <= MOST_COUNTED:
                raise InvalidContribution(
                    f"worker {self.worker_id!r} sent a heartbeat in which {name} is {getattr(beat, name)}"
                )
        self.seen = now
        if self.state is MemberState.READY and beat.steps:  # before that it only waits for others
            self.speed.hear(self.last, beat)
        if beat.step > self.last.step:
            self.moves(now)
        self.last = beat


class Members:
    """All workers, the last of those that are gone included, in the order of their first hello."""

    def __init__(self, lease_seconds: float, min_workers: int = 1) -> None:
        self.lease_seconds = lease_seconds
        self._min_workers = min_workers
        self.shards = min_workers
        """How many shares the data is dealt out to: grows when there are more live workers, never shrinks."""
        self._by_id: dict[str, Member] = {}

    def all(self) -> list[Member]:
        return list(self._by_id.values())

    def live(self) -> list[Member]:
        return [m for m in self._by_id.values() if m.live]

    def in_state(self, state: MemberState) -> list[Member]:
        return [m for m in self._by_id.values() if m.state is state]

    @property
    def all_end(self) -> bool:
        """There are live ones, and all of them are finishing or have finished."""
        states = {m.state for m in self.live()}
        return bool(states) and states <= {MemberState.FINISHING, MemberState.FINISHED}

    @property
    def needed(self) -> int:
        """`min_workers` less those that ended by finishing, at least 1; death does not lower it."""
        return max(1, self._min_workers - sum(m.done for m in self.all()))

    def step_beside(self, joiner: Member, least: int) -> int:
        """The run's current inner step, for a worker that joins: that of the furthest of the others who train, else as
        far as anybody is known to have come, at least this."""
        training = [m.step for m in self.in_state(MemberState.READY) if m is not joiner]
        return max(training or [least, *(m.step for m in self.all())])

    def hello(self, worker_id: str, generation: int, now: float) -> Member:
        """Admit a worker, or take up the session of one that lost its connection.

        The same generation keeps its state; a newer one replaces it. Raises Superseded for an older one.
        """
        known = self._by_id.get(worker_id)
        if known is not None and generation < known.generation:
            raise Superseded(
                f"worker {worker_id!r} was joined by a newer process; stop this one, or give it another worker_id"
            )
        if known is None or generation > known.generation:
            former, known = known, Member(worker_id, generation, now, now, self._free_shard(known))
            if former is not None:
                known.counted, known.not_counted = former.counted, former.not_counted
                known.start_step = former.step
            self._by_id[worker_id] = known
            self._forget()
        elif known.state is MemberState.GONE:
            known.shard = self._free_shard(known)
            known.state = MemberState.JOINING
        known.seen, known.cut_at = now, None
        self.shards = max(self.shards, known.shard + 1)
        return known

    def _free_shard(self, known: Member | None) -> int:
        """The worker's former shard if no other has it now, else the lowest that is free."""
        taken = {m.shard for m in self.live() if m is not known}
        if known is not None and known.shard not in taken:
            return known.shard
        return next(i for i in range(len(taken) + 1) if i not in taken)

    def _forget(self) -> None:
        gone = sorted(self.in_state(MemberState.GONE), key=lambda m: m.seen)
        for member in gone[: max(0, len(gone) - KEPT_GONE)]:
            del self._by_id[member.worker_id]

    def restore(self, member: Member) -> None:
        """Put a member back, in place of what was known of it."""
        self._by_id[member.worker_id] = member

    def get(self, worker_id: str, generation: int) -> Member:
        """The live member of that id and generation. Raises Superseded or NotMember."""
        member = self._by_id.get(worker_id)
        if member is None or not member.live:
            raise NotMember(
                f"worker {worker_id!r} is not a member of this run (its lease may have run out): say hello again"
            )
        if member.generation != generation:
            raise Superseded(f"worker {worker_id!r} was joined by another process; this one is no longer a member")
        return member

    def known(self, worker_id: str) -> Member | None:
        return self._by_id.get(worker_id)

    def _expiry(self, member: Member) -> float:
        lease = member.seen + self.lease_seconds
        return lease if member.cut_at is None else min(lease, member.cut_at + CUT_SHARE * self.lease_seconds)

    def silent_until(self, member: Member, now: float) -> float | None:
        """When a member that is overdue with its heartbeat is given up; None while it beats."""
        silent = member.cut_at is not None or now - member.seen > 2 * BEAT_SHARE * self.lease_seconds
        return self._expiry(member) if silent else None

    def expired(self, now: float) -> list[Member]:
        """Live members whose lease has run out."""
        return [m for m in self.live() if now >= self._expiry(m)]

    def next_expiry(self) -> float | None:
        """When the next lease runs out if nobody is heard of, or None without live members."""
        return min((self._expiry(m) for m in self.live()), default=None)

    def excuse(self, seconds: float, now: float) -> None:
        """The server itself stood still for so long, until now: that counts for nobody."""
        for member in self.live():
            member.seen = min(now, member.seen + seconds)
            member.moved = min(now, member.moved + seconds)
            if member.cut_at is not None:
                member.cut_at = min(now, member.cut_at + seconds)
