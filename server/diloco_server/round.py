"""One round: the contributions in it, the decision to close it, and the record that stays. Data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from diloco_proto.codec.formats import Encoded


@dataclass(frozen=True, slots=True)
class Key:
    """What identifies a contribution within a run."""

    fragment: int
    base_version: int
    worker_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One worker's outer gradient for one fragment against one base version, complete."""

    key: Key
    frames: dict[int, int]
    """First block of each frame -> its xxh3: together the identity of the bytes."""
    payload: Encoded
    tokens: int
    steps: int
    since_version: int
    """The fragment's version when the oldest of those steps was taken."""
    norm: float
    """L2 norm of the payload."""
    arrived: float
    serial: int = 0
    """Under which it is kept on disk; no other of the run has it."""


@dataclass(frozen=True, slots=True)
class Counted:
    """A worker's last counted contribution to a fragment, for ever: while its fate is unknown to the worker it
    pushes no other, so this one settles every repeated push, however late."""

    key: Key
    frames: dict[int, int]
    version: int
    """The version that its round led to."""


class Stage(Enum):
    """What became of a contribution that arrived."""

    STAGED = auto()
    ALREADY_HAVE = auto()
    COUNTED = auto()
    CLOSED = auto()
    CONFLICT = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundMember:
    """One counted contribution, as the record of its round keeps it."""

    worker_id: str
    weight: float
    """Share of the mean; of an asynchronous step, its weight relative to the usual one."""
    norm: float
    scale: float
    waited_seconds: float
    """From its arrival to the close."""
    tokens: int
    steps: int
    staleness: int


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round that is over, kept for status."""

    version: int
    """The version it led to."""
    members: tuple[RoundMember, ...]
    missed: tuple[str, ...]
    """Workers that were expected to the end and are not in it."""
    open_seconds: float
    fill_seconds: float = 0.0
    """From its first contribution to its last."""
    grace_seconds: float = 0.0
    """From its quorum to its close."""

    @property
    def counted(self) -> frozenset[str]:
        return frozenset(m.worker_id for m in self.members)


@dataclass(slots=True)
class Round:
    """The open round of one fragment."""

    version: int
    """The base version; the round leads to the next."""
    expected: set[str]
    opened_at: float
    contributions: dict[str, Contribution] = field(default_factory=dict)
    first_at: float | None = None
    quorum_at: float | None = None
    last_at: float | None = None
    closing: bool = False
    told_stuck: bool = False
    nobody: bool = False
    """It opened when no worker was ready."""

    @property
    def missing(self) -> set[str]:
        return self.expected - self.contributions.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The decision to close a round: its members in worker order, and how each enters the outer step."""

    fragment: int
    base_version: int
    contributions: tuple[Contribution, ...]
    weights: tuple[float, ...]
    scales: tuple[float, ...]
    closed_at: float
    delay: int = 1
    """Contributions that make one step of delayed Nesterov, should a new one begin here."""
