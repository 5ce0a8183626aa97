"""Contributions on their way, and the fates and newer bases that settle them. Pure: no threads, no clock.

A Flight is one contribution whose fate is not settled; a fragment has at most one. An Arrival is a newer base of a
fragment, ready to be merged. Bases are never changed in place.

When the run was rolled back (an operator's doing, or a server that lost its latest state) nothing that a worker holds
of it is worth anything: its flights end without a fate, its bases are *outdated* until a snapshot of each fragment has
come, and what it pushes in between goes nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Encoded, Format, Packed, empty_encoded
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import DilocoError

from .captured import Captured, encode_captured

_KEPT = (pb.OUTCOME_STAGED, pb.OUTCOME_ALREADY_HAVE)


@dataclass(frozen=True, slots=True)
class Base:
    """Global parameters of one fragment at one version; of those, what this process holds."""

    version: int
    theta: Floats
    announced: int = 0
    """Digest of the whole fragment, by the server's word; 0 where nobody asks for it."""


@dataclass(slots=True, kw_only=True)
class Flight:
    """One contribution: the work since the last counted one, up to inner step `step` of this process, to be merged
    at step `due_step`."""

    fragment: int
    base: Base
    captured: Captured | None
    step: int
    due_step: int
    steps: int
    tokens: int
    tokens_until: int
    """Tokens of this process up to `step`."""
    since_version: int
    feedback: bool
    residual: Floats | None
    """With error feedback: what earlier contributions left out; None for nothing."""
    encoded: Encoded | None = None
    next_residual: Floats | None = None
    """What is left out once this one is counted."""
    header: pb.PushHeader | None = None
    frames: Sequence[Packed | bytes] = ()
    outcome: pb.Outcome | None = None
    verdict: pb.Committed | None = None
    """The event of the round that settles it, whichever comes first: that or its outcome."""
    counted: bool | None = None
    """The fate; None while unknown."""
    needs: int = 0
    """Once the fate is known: the version from which on a base takes account of it."""
    missed: bool = False
    """The session broke and was taken up again before the outcome was here: the event of its round may be among those
    of the time in between, which are lost."""
    unfit: DilocoError | None = None
    """Why it cannot be encoded, once that was tried."""
    restored: bool = False
    """Captured by a former process of this worker, which left it in its saved state."""

    @property
    def resync(self) -> bool:
        """The run wants nothing of this work any more."""
        return self.outcome is not None and self.outcome.kind == pb.OUTCOME_RESYNC

    @property
    def replaced(self) -> bool:
        """The run has other bytes under this key: a process between the one that saved this and us pushed the same
        steps, which must not be pushed again."""
        return self.restored and self.outcome is not None and self.outcome.kind == pb.OUTCOME_CONFLICT

    @property
    def correction(self) -> Floats | None:
        """With error feedback: by how much the residual grows when this is counted."""
        if self.next_residual is None:
            return None
        return self.next_residual if self.residual is None else self.next_residual - self.residual

    def encode(
        self, fmt: Format, base: Floats, memory: Encoded | None = None, left_out: Floats | None = None
    ) -> Encoded:
        """Encode Δ = `base` − captured, and with it what earlier contributions left out. `base` is that of the flight,
        rounded as the local values are, so that a bf16 parameter does not send its own rounding as a gradient.
        `memory`, `left_out`: for the result and, with error feedback, for what it leaves out, if they need not get
        their own.

        Raises UnencodableValue.
        """
        assert self.captured is not None
        encoded = memory or empty_encoded(fmt, len(base) // BLOCK)
        if self.feedback and left_out is None:
            left_out = np.empty_like(base)
        encode_captured(self.captured, base, encoded, self.residual, left_out)
        self.encoded, self.next_residual = encoded, left_out
        return encoded


@dataclass(frozen=True, slots=True)
class Arrival:
    """A base to merge, and the flight that is settled by it, if there was one."""

    base: Base
    flight: Flight | None
    afresh: bool = False
    """After the run was rolled back: the former base is no base of it."""


class Flights:
    """What one worker holds and awaits of each fragment."""

    def __init__(self, count: int) -> None:
        self.bases: list[Base] = []
        self._flights: list[Flight | None] = [None] * count
        self._arrived: list[Base | None] = [None] * count
        self._announced = [0] * count
        self._outdated = [False] * count

    def launch(self, flight: Flight) -> bool:
        """The fragment must have none under way. False if its base is outdated: then this goes nowhere."""
        assert self._flights[flight.fragment] is None
        if self._outdated[flight.fragment]:
            return False
        self._flights[flight.fragment] = flight
        return True

    def flight(self, fragment: int) -> Flight | None:
        return self._flights[fragment]

    def holds(self, flight: Flight) -> bool:
        """It is still under way."""
        return self._flights[flight.fragment] is flight

    def restore(self, fragment: int, base: Base, flight: Flight | None) -> None:
        """The base and the contribution under way that a former process had; what is newer by now has arrived."""
        if not self._outdated[fragment]:
            newest = self.newest(fragment)
            self._arrived[fragment] = newest if newest.version > base.version else None
            self.bases[fragment], self._flights[fragment] = base, flight

    # -- what is heard --

    def on_outcome(self, flight: Flight, outcome: pb.Outcome) -> bool:
        """The answer to a push. True if it is to be pushed again, and counts as not answered: the fate is not in the
        answer, and was perhaps told while nobody heard it; or the server has forgotten a part, as it does when it is
        started anew, so that nobody has completed the contribution."""
        flight.outcome = outcome
        self.announce(flight.fragment, outcome.version)
        self._settle_fate(flight)
        missed, flight.missed = flight.missed, False
        again = flight.counted is None and (missed or outcome.kind == pb.OUTCOME_PART_HELD)
        if again:
            flight.outcome = None
        return again

    def on_committed(self, event: pb.Committed) -> None:
        """A round is over."""
        flight = self._flights[event.fragment]
        spoken = event.fate != pb.FATE_UNSPECIFIED
        if flight is not None and spoken and event.base_version == flight.base.version:
            flight.verdict = event
            self._settle_fate(flight)
        self.announce(event.fragment, event.version)

    def on_versions(self, versions: Iterable[pb.FragmentVersion]) -> list[Flight]:
        """Where the run is, after a reconnection. Returns what to push again, since its fate was perhaps not heard; of
        what has no answer yet `on_outcome` says it."""
        again = []
        for entry in versions:
            if entry.fragment >= len(self._flights):
                continue
            self.announce(entry.fragment, entry.version)
            flight = self._flights[entry.fragment]
            if flight is None or flight.counted is not None:
                continue
            if flight.outcome is None:
                flight.missed = True
            elif flight.outcome.kind in _KEPT:
                flight.outcome = None
                again.append(flight)
        return again

    def rolled_back(self, versions: Iterable[pb.FragmentVersion]) -> None:
        """The run is another one now than that of which this worker holds bases and contributions."""
        count = len(self._flights)
        self._flights, self._arrived = [None] * count, [None] * count
        self._outdated = [True] * count
        self._announced = [0] * count
        for entry in versions:
            if entry.fragment < count:
                self.announce(entry.fragment, entry.version)

    def announce(self, fragment: int, version: int) -> None:
        """The fragment has come to a version."""
        self._announced[fragment] = max(self._announced[fragment], version)

    def on_arrived(self, fragment: int, base: Base) -> None:
        """A newer base is here."""
        self._arrived[fragment] = base

    def _settle_fate(self, flight: Flight) -> None:
        """By the outcome if that says it, else by the event of the round it was staged for."""
        outcome, verdict = flight.outcome, flight.verdict
        if outcome is None or flight.counted is not None:
            return
        if outcome.kind == pb.OUTCOME_COUNTED:
            flight.counted, flight.needs = True, outcome.version
        elif outcome.kind in (pb.OUTCOME_CLOSED, pb.OUTCOME_CONFLICT):
            flight.counted, flight.needs = False, flight.base.version + 1
        elif outcome.kind == pb.OUTCOME_RESYNC:
            flight.counted, flight.needs = False, outcome.version
        elif verdict is not None:
            flight.counted, flight.needs = verdict.fate == pb.FATE_COUNTED, verdict.version

    # -- what is to be done --

    def wanted(self, fragment: int) -> Base | None:
        """The newest base held, if the run has come further."""
        if self.lacks_base(fragment):
            return None
        newest = self.newest(fragment)
        return newest if newest.version < self._announced[fragment] else None

    def outdated(self, fragment: int) -> bool:
        """The run was rolled back, and the base is still that of before."""
        return self._outdated[fragment]

    def lacks_base(self, fragment: int) -> bool:
        """A snapshot is needed, whatever the versions."""
        return self._outdated[fragment] and self._arrived[fragment] is None

    def newest(self, fragment: int) -> Base:
        return self._arrived[fragment] or self.bases[fragment]

    def settled(self, fragment: int) -> bool:
        """`take` has something."""
        flight = self._flights[fragment]
        if flight is None:
            return self._arrived[fragment] is not None
        return flight.counted is not None and self.newest(fragment).version >= flight.needs

    def awaited(self, fragment: int, *, held: bool) -> bool:
        """Whether a worker that reached the step of its merge waits: nothing is ready yet. When `held`, too few workers
        train for a round to close, it waits for rounds that are over: of those no more than the update has to come."""
        flight = self._flights[fragment]
        over = (
            flight is None
            or flight.verdict is not None
            or (flight.counted is not None and flight.needs <= self._announced[fragment])
        )
        return not self.settled(fragment) and (over or not held)

    def take(self, fragment: int) -> Arrival | None:
        """What is ready to be merged, unless a contribution's fate is still open. It becomes the base."""
        if not self.settled(fragment):
            return None
        arrival = Arrival(self.newest(fragment), self._flights[fragment], self._outdated[fragment])
        self._arrived[fragment] = self._flights[fragment] = None
        self._outdated[fragment] = False
        self.bases[fragment] = arrival.base
        return arrival

    def staged(self) -> bool:
        """Every contribution under way has reached the server."""
        return all(f is None or f.outcome is not None for f in self._flights)

    def none_in_flight(self) -> bool:
        """Nothing is awaited: no fate, and no snapshot after a rollback."""
        return all(f is None for f in self._flights) and not any(self._outdated)

    def anything_ready(self) -> bool:
        return any(self.settled(p) for p in range(len(self._flights)))

    def caught_up(self, versions: dict[int, int]) -> bool:
        """The newest base of each fragment is at least at its version."""
        return all(not self.lacks_base(p) and self.newest(p).version >= v for p, v in versions.items())
