"""Defects put into the real code, one mechanism at a time. The simulator must find each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from diloco_client.flights import Flights
from diloco_client.replica import Replica
from diloco_proto.codec import BLOCK, Encoded, decode_fragment, digest
from diloco_proto.errors import InvalidContribution
from diloco_proto.manifest import Manifest
from diloco_server import parameters, weights
from diloco_server.config import RunConfig
from diloco_server.members import Members
from diloco_server.outer import FragmentState
from diloco_server.patience import Patience
from diloco_server.pushes import Pushes
from diloco_server.round import Stage
from diloco_server.rounds import Rounds
from diloco_server.run import Run
from diloco_server.weights import Weights

Patch = Callable[[pytest.MonkeyPatch], None]
Take = Callable[[int, Encoded], None]


@dataclass(frozen=True)
class Defect:
    """`apply` switches a mechanism off; the run of `seed` then breaks `promise`."""

    name: str
    promise: int
    seed: int
    apply: Patch


def replace(owner: type, name: str, value: object) -> Patch:
    return lambda patch: patch.setattr(owner, name, value)


def never(stage: Stage) -> Patch:
    """Pushes are not recognised as this."""
    original = Rounds.seen_before

    def seen_before(self: Rounds, key: object, frames: object) -> Stage | None:
        found = original(self, key, frames)
        return None if found is stage else found

    return replace(Rounds, "seen_before", seen_before)


def any_version(patch: pytest.MonkeyPatch) -> None:
    original = Rounds.seen_before

    def seen_before(self: Rounds, key: object, frames: object) -> Stage | None:
        try:
            return original(self, key, frames)
        except InvalidContribution:
            return None

    patch.setattr(Rounds, "seen_before", seen_before)


def any_generation(patch: pytest.MonkeyPatch) -> None:
    original = Members.get
    patch.setattr(
        Members, "get", lambda self, name, _: original(self, name, getattr(self.known(name), "generation", 0))
    )


def older_may_join(patch: pytest.MonkeyPatch) -> None:
    original = Members.hello

    def hello(self: Members, name: str, generation: int, now: float) -> object:
        known = self.known(name)
        return original(self, name, max(generation, known.generation if known else 0), now)

    patch.setattr(Members, "hello", hello)


def by_arrival(patch: pytest.MonkeyPatch) -> None:
    original = Rounds._close

    def close(self: Rounds, fragment: int, current: object, now: float, delay: int) -> object:
        made = original(self, fragment, current, now, delay)
        order = [list(current.contributions).index(c.key.worker_id) for c in made.contributions]
        arrange = lambda items: tuple(items[i] for i in np.argsort(order))  # noqa: E731
        for name in ("contributions", "scales") if self._asynchronous else ("contributions", "weights", "scales"):
            object.__setattr__(made, name, arrange(getattr(made, name)))
        return made

    patch.setattr(Rounds, "_close", close)


def no_rebase(patch: pytest.MonkeyPatch) -> None:
    original = Replica._merge

    def merge(self: Replica, fragment: int, old: object, arrival: object) -> None:
        if arrival.flight is not None and not arrival.flight.counted:
            self._parameters.adopt(fragment, arrival.base.theta)
        else:
            original(self, fragment, old, arrival)

    patch.setattr(Replica, "_merge", merge)


def no_subtraction(patch: pytest.MonkeyPatch) -> None:
    original = Replica._merge_counted

    def merge(self: Replica, flight: object, old: object, new: object) -> None:
        whole = self._parameters.rebase_change
        if flight.due_step != self.taken:
            self._parameters.rebase_change = lambda p, a, b, *_: whole(p, a, b, None)
        original(self, flight, old, new)
        self._parameters.rebase_change = whole

    patch.setattr(Replica, "_merge_counted", merge)


def late_is_mixed(patch: pytest.MonkeyPatch) -> None:
    original = Replica._merge_counted

    def merge(self: Replica, flight: object, old: object, new: object) -> None:
        flight.due_step = self.taken
        original(self, flight, old, new)

    patch.setattr(Replica, "_merge_counted", merge)


def residual_always(patch: pytest.MonkeyPatch) -> None:
    original = Replica._merge

    def merge(self: Replica, fragment: int, old: object, arrival: object) -> None:
        original(self, fragment, old, arrival)
        if arrival.flight is not None and arrival.flight.feedback:
            self._uncounted[fragment].residual = arrival.flight.next_residual

    patch.setattr(Replica, "_merge", merge)


def joiner_is_awaited(patch: pytest.MonkeyPatch) -> None:
    original = Run.ready

    def ready(self: Run, member: object, now: float) -> None:
        original(self, member, now)
        for current in self.rounds._open:
            if current is not None:
                current.expected.add(member.worker_id)

    patch.setattr(Run, "ready", ready)


def unquantized(patch: pytest.MonkeyPatch) -> None:
    original = parameters.commit

    def commit(
        state: FragmentState,
        given: object,
        weights: object,
        settings: object,
        take: Take,
        *args: object,
        **options: object,
    ) -> None:
        before, sent = state.theta.copy(), np.zeros_like(state.theta)

        def also(first: int, part: Encoded) -> None:
            sent[first * BLOCK : (first + part.num_blocks) * BLOCK] = decode_fragment(part)
            take(first, part)

        original(state, given, weights, settings, also, *args, **options)
        state.theta[:] = before - (sent + state.residual)
        state.digest = digest(state.theta)

    patch.setattr(parameters, "commit", commit)


def excuse_into_the_future(patch: pytest.MonkeyPatch) -> None:
    def excuse(self: Members, seconds: float, now: float) -> None:
        for member in self.live():
            member.seen += seconds
            member.moved += seconds
            if member.cut_at is not None:
                member.cut_at += seconds

    patch.setattr(Members, "excuse", excuse)


def parts_of_any_process(patch: pytest.MonkeyPatch) -> None:
    original = Pushes.claim

    def claim(self: Pushes, announced: object) -> object:
        filling = self._assemblies.get(announced.key)
        if filling is not None:
            filling.generation = announced.header.generation
        return original(self, announced)

    patch.setattr(Pushes, "claim", claim)


def forget_counted(patch: pytest.MonkeyPatch) -> None:
    original = Rounds.committed

    def committed(self: Rounds, close: object, now: float) -> object:
        record = original(self, close, now)
        self.last_counted[close.fragment].clear()
        return record

    patch.setattr(Rounds, "committed", committed)


def floor_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "_set_floor", lambda self: None)


def not_asked_again(patch: pytest.MonkeyPatch) -> None:
    original = Flights.on_versions

    def on_versions(self: Flights, versions: object) -> list[object]:
        kept = [(f, f.outcome) for f in self._flights if f is not None]
        original(self, versions)
        for flight, outcome in kept:
            flight.outcome = outcome
        return []

    patch.setattr(Flights, "on_versions", on_versions)


def cut_is_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Members, "_expiry", lambda self, member: member.seen + self.lease_seconds)


def any_staleness(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunConfig, "staleness_limit", lambda self, live: 10**6 * self.asynchronous)


DEFECTS = [
    Defect("a contribution that waits is not known again", 3, 2, never(Stage.ALREADY_HAVE)),
    Defect("a contribution that was counted is not known again", 3, 21, forget_counted),
    Defect("other bytes under the same key are taken", 3, 22, never(Stage.CONFLICT)),
    Defect("contributions to a round that is over are taken", 3, 32, never(Stage.CLOSED)),
    Defect("an older process may push and speak", 3, 15, any_generation),
    Defect("an older process may join again", 3, 8, older_may_join),
    Defect("parts of two processes are mixed", 5, 1957, parts_of_any_process),
    Defect("contributions are summed in the order of arrival", 2, 18, by_arrival),
    Defect("weights have no cap", 2, 2, lambda patch: patch.setattr(weights, "MAX_WEIGHT", 1e9)),
    Defect("norms have no limit", 2, 45, replace(Weights, "scales", lambda self, members: (1.0,) * len(members))),
    Defect("the update that is applied is not the encoded one", 1, 1, unquantized),
    Defect("what was not counted is overwritten", 5, 0, no_rebase),
    Defect("what was counted late is not taken out", 3, 0, no_subtraction),
    Defect("what was counted late is mixed", 5, 0, late_is_mixed),
    Defect("the residual advances with what was not counted", 5, 6, residual_always),
    Defect("fates are not asked for again after a cut", 4, 49, not_asked_again),
    Defect("the dead stay expected", 4, 0, replace(Rounds, "no_longer_expected", lambda self, name, now: None)),
    Defect("leases do not run out", 4, 0, replace(Members, "expired", lambda self, now: [])),
    Defect(
        "a cut does not shorten the lease",
        4,
        0,
        replace(Members, "_expiry", lambda self, m: m.seen + self.lease_seconds),
    ),
    Defect("a standstill of the server is excused twice", 4, 132, excuse_into_the_future),
    Defect("hanging training is not noticed", 4, 55, replace(Patience, "may_hang", lambda self, rounds: [])),
    Defect("rounds may wait in a circle", 4, 609, replace(Rounds, "in_circle", lambda self: set())),
    Defect("who joins is awaited at once", 4, 0, joiner_is_awaited),
    Defect("the grace has no end", 4, 8, replace(Rounds, "_grace_now", lambda self: float("inf"))),
    Defect("no quorum is noted", 4, 8, replace(Rounds, "_note_quorum", lambda self, current, now: None)),
    Defect("the floor stays when workers end", 4, 0, floor_stays),
    Defect("another model is not noticed", 6, 0, replace(Manifest, "first_difference", lambda self, other: None)),
    Defect("contributions against future versions are taken", 6, 111, any_version),
    Defect("incomplete contributions are kept for ever", 7, 0, replace(Pushes, "drop_older", lambda self, *_: None)),
    Defect(
        "any staleness is taken",
        6,
        6,
        replace(RunConfig, "staleness_limit", lambda self, live: 10**6 * self.asynchronous),
    ),
]
