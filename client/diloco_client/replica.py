"""A worker's side of the algorithm: what is pushed and merged at which inner step, and how. Pure.

The schedule is Streaming DiLoCo's (arXiv 2501.18512). A merge exchanges the base of a fragment for a newer one by
the rule of the contribution's fate:

    counted, on schedule   local ← α·local + (1 − α)·θ          the paper's: a fraction α of counted work stays
    counted, but late      local ← local + θ − base + c         takes out what was counted (c), keeps all later steps
    not counted            local ← local + (1 − α)·(θ − base)   keeps all local work, which goes into the next push
    not in the round       local ← local + θ − base             the same, of a round without a push of this worker
    out of date            local ← θ                            the run wants nothing of this work any more
    rolled back            local ← θ                            nor of any work of a stretch that it has undone

Not counted, a worker moves along with the others by no more than one that was counted: the share α of what they did
stays open in its next push. Moving along in full costs a run in which half of the pushes are dropped 14 % of its loss,
this 1 % (docs/log.md).

Buffers (BatchNorm statistics) always become the global ones: a mean of variances is one, a sum is not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from diloco_proto.codec import Encoded
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Layout
from diloco_proto.schedule import Schedule

from .captured import Captured
from .flights import Arrival, Base, Flight

log = logging.getLogger("diloco")

NEVER = 1 << 62
"""Due step of a remainder: it is merged off schedule and in full, at any step from which on its fate is known."""


class Parameters(Protocol):
    """The local parameters of a worker, by fragment."""

    def capture(self, fragment: int) -> Captured: ...
    def mix(self, fragment: int, theta: Floats, alpha: float) -> None: ...
    def shift(self, fragment: int, change: Floats) -> None: ...
    def adopt(self, fragment: int, theta: Floats) -> None: ...
    def rebase_change(
        self, fragment: int, old: Floats, new: Floats, counted: Encoded | None, correction: Floats | None = None
    ) -> Floats: ...


class Carrier(Protocol):
    """Takes contributions away and holds what is ready to be merged."""

    @property
    def bases(self) -> Sequence[Base]: ...
    def push(self, flight: Flight) -> None: ...
    def flight(self, fragment: int) -> Flight | None: ...
    def take(self, fragment: int) -> Arrival | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the run has settled for every worker."""

    schedule: Schedule
    """With the whole H."""
    alpha: float
    error_feedback: bool


@dataclass(slots=True)
class Uncounted:
    """Where the work on a fragment begins that was not counted yet."""

    step: int
    tokens: int
    since_version: int
    accounted: int
    """Base version up to which the local values take account of what was counted of this worker; -1 for nothing."""
    residual: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a replica has come."""

    taken: int
    origin: int
    k: int
    """Steps of the schedule since `origin`, of `sync_every` a period."""
    sync_every: int
    tokens: int | None
    rounds: int
    counted: int
    not_counted: int


class Replica:
    """One worker between its trainer and its carrier.

    Steps: `taken` are the inner steps of this process, and of those that it has resumed. `global_step` is the run's
    count: it began at `start_step`, and a worker with a smaller H advances by as much a round as the others.
    """

    def __init__(self, layout: Layout, rules: Rules, parameters: Parameters, carrier: Carrier, start_step: int) -> None:
        self.taken = 0
        self.rounds = 0
        self.counted = 0
        self.not_counted = 0
        self._parameters = parameters
        self._carrier = carrier
        self._rules = rules
        self._num_trained = layout.num_trained
        self._count = layout.num_scheduled
        self._schedule = rules.schedule
        self._wanted_pace = rules.schedule.sync_every
        self._owes = False
        self._dropped = 0
        self._origin, self._k = 0, start_step
        self._tokens: int | None = None
        self._uncounted = [Uncounted(0, 0, base.version, base.version - 1) for base in carrier.bases]

    @property
    def global_step(self) -> int:
        return self._origin + self._k * self._rules.schedule.sync_every // self._schedule.sync_every

    @property
    def sync_every(self) -> int:
        """This worker's H."""
        return self._schedule.sync_every

    @property
    def tokens(self) -> int:
        """Tokens trained on in the steps `taken`, as reported; inner steps if nothing was."""
        return self.taken if self._tokens is None else self._tokens

    def report(self, tokens: int) -> None:
        """So many more tokens were trained on."""
        if self._tokens is None:
            self._tokens = 0
            for uncounted in self._uncounted:
                uncounted.tokens = 0  # from now on they are tokens, no longer steps
        self._tokens += tokens

    def steps_until_due(self) -> int:
        """Inner steps until something is to be pushed or merged; at least 1."""
        return self._schedule.steps_until_due(self._k)

    def set_pace(self, sync_every: int) -> None:
        """Another H, from the next period that begins with nothing under way. Any thread may call it."""
        self._wanted_pace = sync_every

    # -- what outlives the process --

    @property
    def progress(self) -> Progress:
        return Progress(
            taken=self.taken,
            origin=self._origin,
            k=self._k,
            sync_every=self._schedule.sync_every,
            tokens=self._tokens,
            rounds=self.rounds,
            counted=self.counted,
            not_counted=self.not_counted,
        )

    def uncounted(self, fragment: int) -> Uncounted:
        """A copy; the residual is never changed in place."""
        return replace(self._uncounted[fragment])

    def resume(self, progress: Progress, *, moved_on: bool) -> None:
        """Count on from where a former process was; `reinstate` or `give_up` must follow for each fragment.

        At its place in the schedule; or, if the run has `moved_on`, at the run's, where any joiner begins.
        """
        start_step = self.global_step
        self.taken, self._tokens = progress.taken, progress.tokens
        self.rounds, self.counted, self.not_counted = progress.rounds, progress.counted, progress.not_counted
        self._origin, self._k = progress.origin, progress.k
        self._schedule = self._rules.schedule.with_sync_every(progress.sync_every)
        if moved_on:
            self._origin, self._k = 0, max(start_step, self.global_step)
            self._schedule = self._rules.schedule

    def reinstate(self, fragment: int, uncounted: Uncounted) -> None:
        """The local values are those of the former process again."""
        self._uncounted[fragment] = replace(uncounted)

    def give_up(self, fragment: int) -> None:
        """local ← θ: what the former process had as not counted is in θ by now, or is dropped."""
        self._adopt(fragment, self._carrier.bases[fragment])

    def account(self, fragment: int, base_version: int) -> None:
        """A contribution of a former process against this version may yet be counted; none of its work is in the
        local values."""
        uncounted = self._uncounted[fragment]
        uncounted.accounted = max(uncounted.accounted, base_version)

    # -- after an inner step --

    def advance(self) -> list[int]:
        """An inner step is over: push what is due. Returns the fragments that are to be merged now, for whose fates
        the caller waits before it calls `merge`."""
        self.taken += 1
        self._k += 1
        due = self._schedule.due(self._k)
        for fragment in due.push:
            self._owes = self._owes or self._withheld
            if not self._owes and self._carrier.flight(fragment) is None:
                self._push(fragment, self.taken + self._schedule.overlap_steps)
        return [p for p in due.apply if self._carrier.flight(p) is not None]

    def merge(self, *, early: bool = False) -> None:
        """Merge what has arrived: what is due now, what is late, and rounds that this worker was not in.

        A contribution that is due at a later step waits for it, unless `early`; a remainder waits for none.
        """
        for fragment in range(self._count):
            flight = self._carrier.flight(fragment)
            if flight is not None and self.taken < flight.due_step != NEVER and not early:
                continue
            old = self._carrier.bases[fragment]
            arrival = self._carrier.take(fragment)
            if arrival is not None:
                self._merge(fragment, old, arrival)
        if (self._pace_changes or self._owes) and self._k % self._schedule.sync_every == 0:
            self._begin_period()

    def push_remainders(self) -> None:
        """Push what was not counted yet, of every fragment that has no contribution under way."""
        for fragment in range(self._count):
            begun = max(self._dropped, self._uncounted[fragment].step)
            if self.taken > begun and self._carrier.flight(fragment) is None:
                self._push(fragment, NEVER)

    def drop_remainders(self) -> None:
        """The local values are no longer those of the inner steps: none of what is not under way is to be pushed."""
        self._dropped = self.taken

    @property
    def all_pushed(self) -> bool:
        """Every inner step of every fragment is counted or under way; what the run has refused is neither."""
        flights = [self._carrier.flight(p) for p in range(self._count)]
        return self.taken == self._dropped or all(
            self.taken <= (uncounted.step if flight is None or flight.counted is False else flight.step)
            for uncounted, flight in zip(self._uncounted, flights, strict=True)
        )

    def adopt_all(self) -> None:
        """local ← θ: everything is settled."""
        for fragment, base in enumerate(self._carrier.bases):
            self._parameters.adopt(fragment, base.theta)
            self._begin_anew(fragment, self.taken, self.tokens, base.version)

    # -- one fragment --

    def _push(self, fragment: int, due_step: int) -> None:
        uncounted, tokens = self._uncounted[fragment], self.tokens
        feedback = self._rules.error_feedback and fragment < self._num_trained
        self._carrier.push(
            Flight(
                fragment=fragment,
                base=self._carrier.bases[fragment],
                captured=self._parameters.capture(fragment),
                step=self.taken,
                due_step=due_step,
                steps=self.taken - uncounted.step,
                tokens=max(1, tokens - uncounted.tokens),
                tokens_until=tokens,
                since_version=uncounted.since_version,
                feedback=feedback,
                residual=uncounted.residual if feedback else None,
            )
        )

    def _merge(self, fragment: int, old: Base, arrival: Arrival) -> None:
        """Exchange the base `old` for a newer one."""
        flight, new = arrival.flight, arrival.base
        counted = flight is not None and flight.counted is True
        self.rounds += new.version > old.version
        self.counted += counted
        self.not_counted += flight is not None and not counted
        if arrival.afresh or fragment >= self._num_trained:
            self._adopt(fragment, new)
        elif flight is not None and flight.replaced:
            log.warning(
                "fragment %d: another process of this worker has pushed the work that this one resumed with; it goes "
                "on from the global parameters",
                fragment,
            )
            self._adopt(fragment, new)
        elif flight is not None and flight.resync:
            log.warning(
                "fragment %d: this worker was away for %d rounds, longer than the run allows (max_away); it goes on "
                "from the global parameters",
                fragment,
                new.version - flight.since_version,
            )
            self._adopt(fragment, new)
        elif flight is not None and counted:
            self._merge_counted(flight, old, new)
        else:
            change = self._parameters.rebase_change(fragment, old.theta, new.theta, None)
            if flight is not None and flight.due_step != NEVER:
                change *= np.float32(1.0 - self._rules.alpha)
            self._parameters.shift(fragment, change)

    def _merge_counted(self, flight: Flight, old: Base, new: Base) -> None:
        if flight.due_step == self.taken:
            self._parameters.mix(flight.fragment, new.theta, self._rules.alpha)
        else:
            change = self._parameters.rebase_change(
                flight.fragment, old.theta, new.theta, flight.encoded, flight.correction
            )
            self._parameters.shift(flight.fragment, change)
        # Steps taken since the push began on the old base; without any, the next one will be on the new.
        since_version = new.version if flight.step == self.taken else flight.base.version
        self._begin_anew(flight.fragment, flight.step, flight.tokens_until, since_version)
        uncounted = self._uncounted[flight.fragment]
        uncounted.accounted = flight.base.version
        if flight.feedback:
            uncounted.residual = flight.next_residual

    def _adopt(self, fragment: int, new: Base) -> None:
        """local ← θ, and nothing of earlier work is left to push."""
        self._parameters.adopt(fragment, new.theta)
        self._begin_anew(fragment, self.taken, self.tokens, new.version)
        uncounted = self._uncounted[fragment]
        uncounted.accounted, uncounted.residual = new.version - 1, None

    def _begin_anew(self, fragment: int, step: int, tokens: int, since_version: int) -> None:
        """All work up to `step` is settled."""
        uncounted = self._uncounted[fragment]
        uncounted.step, uncounted.tokens, uncounted.since_version = step, tokens, since_version

    @property
    def _pace_changes(self) -> bool:
        return self._wanted_pace != self._schedule.sync_every

    @property
    def _withheld(self) -> bool:
        """What is due now belongs to the next period, which is to begin with nothing under way."""
        schedule = self._schedule
        last = self._k - 1
        return (
            self._pace_changes and (last + schedule.overlap_steps) // schedule.sync_every > last // schedule.sync_every
        )

    def _begin_period(self) -> None:
        """Begin anew with the wanted pace, unless something late is under way; then go on as before, and likewise if it
        is the former pace again. What was withheld is pushed in any case."""
        self._owes = False
        if self._pace_changes and all(self._carrier.flight(p) is None for p in range(self._count)):
            self._origin, self._k = self.global_step, 0
            self._schedule = self._schedule.with_sync_every(self._wanted_pace)
            log.info("this worker synchronises every %d inner steps from now on", self._wanted_pace)
        for fragment in range(self._count):
            # The period owes these already. Were they left out, this worker would push in another order than the
            # others, and each could wait for what the other has not pushed yet.
            offset = self._schedule.apply_offset(fragment)
            owed = offset <= self._schedule.overlap_steps and self._carrier.flight(fragment) is None
            if owed and self.taken > self._uncounted[fragment].step:
                self._push(fragment, self.taken + offset)
