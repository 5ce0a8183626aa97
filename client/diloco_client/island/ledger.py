"""What the ranks of an island have told one another of each fragment: the answers to their pushes, and what they have
fetched. The same on every rank, since all read the same words in the same order. Pure.

A contribution is pushed in parts, each by the rank that owns it. Its outcome is known once all owners have theirs: that
of them which says most of the whole. A part of a base is worth something once all owners have theirs of one version,
and their digests add up to what the server has announced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from diloco_proto import outer_pb2 as pb

from ..pushing import most_telling


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one rank has fetched of its part of a fragment."""

    version: int
    digest: int
    """Of the part, a summand of the whole."""
    announced: int
    """Of the whole, by the server's word."""


class Verdict(Enum):
    """On what the ranks have fetched."""

    OPEN = auto()
    """Some have nothing yet, or an older version than others."""
    SOUND = auto()
    DAMAGED = auto()
    """All have the same version, but it is not what the server has."""


def judge(parts: Sequence[Fetched]) -> Verdict:
    """By the parts of all owners."""
    if len({part.version for part in parts}) != 1:
        return Verdict.OPEN
    total = sum(part.digest for part in parts) % (1 << 64)
    return Verdict.SOUND if {part.announced for part in parts} == {total} else Verdict.DAMAGED


@dataclass(slots=True)
class _Entry:
    """Of one fragment."""

    owners: frozenset[int]
    turn: int = 0
    """How often contributions were sent off, repetitions counted."""
    outcomes: dict[int, pb.Outcome] = field(default_factory=dict)
    fetched: dict[int, Fetched] = field(default_factory=dict)


class Ledger:
    """By fragment, of which `owners` are the ranks that own a part."""

    def __init__(self, owners: Sequence[frozenset[int]]) -> None:
        self._entries = [_Entry(ranks) for ranks in owners]

    def turn(self, fragment: int) -> int:
        """Names what is under way: outcomes of an earlier turn are no answer to it."""
        return self._entries[fragment].turn

    def sent(self, fragment: int) -> None:
        """All owners push, for the first time or again."""
        entry = self._entries[fragment]
        entry.turn += 1
        entry.outcomes.clear()

    def answered(self, rank: int, fragment: int, turn: int, outcome: pb.Outcome) -> None:
        """A rank tells the outcome of its push."""
        entry = self._entries[fragment]
        if turn == entry.turn:
            entry.outcomes[rank] = outcome

    def outcome(self, fragment: int) -> pb.Outcome | None:
        """Of the whole contribution, once all have told; PART_HELD if none of them has completed it."""
        entry = self._entries[fragment]
        if entry.outcomes.keys() < entry.owners:
            return None
        outcomes = [entry.outcomes[rank] for rank in sorted(entry.owners)]
        version = max(outcome.version for outcome in outcomes)
        return pb.Outcome(kind=most_telling(outcomes).kind, version=version)

    def has(self, rank: int, fragment: int, fetched: Fetched) -> None:
        """A rank tells what it has fetched."""
        self._entries[fragment].fetched[rank] = fetched

    def newest(self, fragment: int) -> int:
        """The newest version that any rank has told of; -1 for none."""
        return max((part.version for part in self._entries[fragment].fetched.values()), default=-1)

    def verdict(self, fragment: int) -> Verdict:
        entry = self._entries[fragment]
        if not entry.fetched or entry.fetched.keys() < entry.owners:
            return Verdict.OPEN
        return judge([entry.fetched[rank] for rank in sorted(entry.owners)])

    def clear_fetched(self, fragment: int) -> None:
        """What was told is settled, or worthless."""
        self._entries[fragment].fetched.clear()
