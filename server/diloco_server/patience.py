"""How long the server waits for its workers: for a sign of life, and for a next inner step. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from .members import Member, Members, MemberState
from .rounds import Rounds

log = logging.getLogger("diloco.server")

HANG_ROUNDS = 3.0
"""Times the usual length of a round without a step: then a worker's training hangs, though its heart beats."""

CIRCLE_SHARE = 0.5
"""Of the lease, at most: patience with a worker without a step in rounds that wait for each other in a circle. Two
heartbeats have then said that it takes none."""

FIRST_STEP_SECONDS = 900.0
"""Patience with a worker without a step before the first round is over: it may be compiling its model."""

STOOD_STILL = 0.5
"""Of the lease: when no time was taken note of for so long the server itself stood still, not the workers."""

TICK_SHARE = 0.2
"""Of the lease: how often time wants to be taken note of while there are workers."""


class Patience:
    """With the members of one run. `asynchronous`: no round waits for anybody."""

    def __init__(self, members: Members, *, asynchronous: bool) -> None:
        self._members = members
        self._asynchronous = asynchronous
        self._passed: float | None = None

    def passes(self, now: float) -> list[Member]:
        """Time passes. Returns whose lease has run out."""
        gap = 0.0 if self._passed is None else now - self._passed
        if gap > STOOD_STILL * self._members.lease_seconds:
            self._members.excuse(gap, now)
        self._passed = now
        gone = self._members.expired(now)
        for member in gone:
            silence = now - member.seen
            text = "worker %r was silent for %.0f s and is no longer expected"
            log.warning(text, member.worker_id, silence, extra={"worker": member.worker_id})
        return gone

    def hanging(self, rounds: Rounds, now: float) -> list[Member]:
        """Whose training is taken to hang from now on."""
        found = [member for member, deadline in self.may_hang(rounds) if now >= deadline]
        for member in found:
            member.hung = True
            log.warning(
                "worker %r has taken no step for %.0f s although its heart beats: rounds no longer wait for it",
                member.worker_id,
                now - member.moved,
                extra={"worker": member.worker_id},
            )
        return found

    def deadlines(self, rounds: Rounds | None) -> Iterator[float]:
        """When something of this happens even if nothing arrives."""
        expiry = self._members.next_expiry()
        if expiry is not None:
            yield expiry
        if rounds is not None:
            yield from (deadline for _, deadline in self.may_hang(rounds))
        if self._passed is not None and self._members.live():
            yield self._passed + TICK_SHARE * self._members.lease_seconds

    def may_hang(self, rounds: Rounds) -> list[tuple[Member, float]]:
        """The workers whose next step is awaited, and when they are taken to hang.

        Not those of which a contribution waits in a round: they may be waiting for its fate. But when rounds wait
        for each other in a circle, somebody has to be given up.
        """
        if self._asynchronous:
            return []
        usual, circle, lease = rounds.usual_seconds, rounds.in_circle(), self._members.lease_seconds
        patience = max(FIRST_STEP_SECONDS if usual is None else HANG_ROUNDS * usual, lease)
        least = min(patience, CIRCLE_SHARE * lease)
        return [
            (m, m.moved + (least if m.worker_id in circle else patience))
            for m in self._members.in_state(MemberState.READY)
            if not m.hung and (m.worker_id in circle or not rounds.holds(m.worker_id))
        ]
