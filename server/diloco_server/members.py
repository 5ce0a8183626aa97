"""Who is in the run: workers, their generations and leases. Pure: time is passed in, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import NotMember, Superseded

KEPT_GONE = 256
"""Workers that are gone and still remembered, for status and so that an older process of theirs is refused."""


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

    def moves(self, now: float) -> None:
        """Its training goes on."""
        self.moved, self.hung = now, False


class Members:
    """All workers, the last of those that are gone included, in the order of their first hello."""

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._by_id: dict[str, Member] = {}

    def all(self) -> list[Member]:
        return list(self._by_id.values())

    def live(self) -> list[Member]:
        return [m for m in self._by_id.values() if m.live]

    def in_state(self, state: MemberState) -> list[Member]:
        return [m for m in self._by_id.values() if m.state is state]

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
            counts = (known.counted, known.not_counted) if known else (0, 0)
            known = Member(worker_id, generation, now, now, counted=counts[0], not_counted=counts[1])
            self._by_id[worker_id] = known
            self._forget()
        elif known.state is MemberState.GONE:
            known.state = MemberState.JOINING
        known.seen = now
        return known

    def _forget(self) -> None:
        gone = sorted(self.in_state(MemberState.GONE), key=lambda m: m.seen)
        for member in gone[: max(0, len(gone) - KEPT_GONE)]:
            del self._by_id[member.worker_id]

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

    def expired(self, now: float) -> list[Member]:
        """Live members whose lease has run out."""
        return [m for m in self.live() if now - m.seen >= self.lease_seconds]

    def next_expiry(self) -> float | None:
        """When the next lease runs out if nobody is heard of, or None without live members."""
        seen = [m.seen for m in self.live()]
        return min(seen) + self.lease_seconds if seen else None
