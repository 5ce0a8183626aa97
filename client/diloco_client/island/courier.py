"""The courier of one rank of an island: it carries this rank's part of every fragment.

What its transfers come to is told at the next meeting, and only what all ranks have been told of changes the Flights,
on the training thread. So these are the same on every rank, whoever was faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.profiler import record_function

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format, digest
from diloco_proto.errors import DilocoError

from ..binding import Binding
from ..courier import Courier
from ..fetching import SNAPSHOT_TRIES, unfit_snapshot
from ..flights import Base, Flight
from ..transport import Transport
from .council import Council, Word
from .ledger import Fetched, Ledger, Verdict

NOTHING = np.empty(0, np.float32)


class IslandCourier(Courier):
    """Takes its seat in the council when it is made, and leaves it when it is closed."""

    def __init__(
        self,
        transport: Transport,
        binding: Binding,
        uplink: Format,
        identity: Callable[[], pb.PushHeader],
        council: Council,
    ) -> None:
        super().__init__(transport, binding, uplink, identity)
        island = council.island
        self._council = council
        self._log = council.log
        self._ledger = Ledger([island.owners(f.num_blocks) for f in binding.layout.scheduled])
        self._owns = [span.num_blocks > 0 for span in binding.spans]
        self._outcomes: list[tuple[int, int, pb.Outcome]] = []
        """(fragment, turn, outcome) of this rank's pushes, to be told."""
        self._fresh: dict[int, Base] = {}
        """Fetched and not told yet, by fragment."""
        self._digests: dict[int, int] = {}
        """Of what is in `_fresh`."""
        self._told: dict[int, Base] = {}
        """Told, and not settled yet."""
        self._told_cut_off = False
        self._cut_off: set[int] = set()
        """Ranks whose transfers do not get through, though the session may."""
        self._afresh: set[int] = set()
        """Fragments whose snapshot is needed, since what was fetched is not what the server has."""
        self._damaged: Counter[int] = Counter()
        council.seat(self)

    def close(self) -> None:
        self._council.unseat(self)
        super().close()

    # -- training thread: waiting --

    def wait(self, fragment: int) -> None:
        with record_function("diloco::wait"):
            self._council.wait(
                lambda: self._flights.settled(fragment),
                lambda: self._out_of_reach or self._held or self.hurried(),
            )

    def wait_until(self, condition: Callable[[], bool], patience: float, limit: float | None = None) -> bool:
        began, lost_at = self._council.clock, None

        def give_up() -> bool:
            nonlocal lost_at
            now = self._council.clock
            lost_at = None if not self._out_of_reach else now if lost_at is None else lost_at
            return (lost_at is not None and now - lost_at > patience) or (limit is not None and now - began > limit)

        return self._council.wait(condition, give_up)

    @property
    def _out_of_reach(self) -> bool:
        """Of any rank: no contribution is complete without its part, and no base."""
        return not self._connected or bool(self._cut_off)

    def raise_fatal(self) -> None:
        self._council.raise_fatal()

    def fail(self, error: DilocoError) -> None:
        self._council.fail(error)

    # -- meetings --

    def say(self) -> dict[str, Any]:
        with self._changed:
            word: dict[str, Any] = {}
            if self._outcomes:
                word["pushed"] = [(p, turn, o.kind, o.version) for p, turn, o in self._outcomes]
                self._outcomes.clear()
            if self._fresh:
                word["fetched"] = [
                    (p, base.version, self._digests[p], base.announced) for p, base in self._fresh.items()
                ]
                self._told.update(self._fresh)
                self._fresh.clear()
            cut_off = self._transport.out_of_reach
            if cut_off != self._told_cut_off:
                self._told_cut_off = word["cut off"] = cut_off
            return word

    def hear(self, words: Sequence[Word]) -> None:
        with self._changed:
            for rank, word in enumerate(words):
                for fragment, turn, kind, version in word.get("pushed", ()):
                    self._ledger.answered(rank, fragment, turn, pb.Outcome(kind=kind, version=version))
                for fragment, *told in word.get("fetched", ()):
                    self._ledger.has(rank, fragment, Fetched(*told))
                if "cut off" in word:
                    self._note_cut_off(rank, word["cut off"])
            for fragment in range(self._count):
                self._settle_outcome(fragment)
                self._settle_fetched(fragment)
            self._fetch_wanted()

    def _note_cut_off(self, rank: int, cut_off: bool) -> None:
        if not cut_off:
            self._cut_off.discard(rank)
            return
        self._cut_off.add(rank)
        self._log.warning("what rank %d of this worker transfers does not reach the server; training goes on", rank)

    def _settle_outcome(self, fragment: int) -> None:
        flight, outcome = self._flights.flight(fragment), self._ledger.outcome(fragment)
        if flight is None or flight.outcome is not None or outcome is None:
            return
        if self._flights.on_outcome(flight, outcome):
            self._send(flight)

    def _settle_fetched(self, fragment: int) -> None:
        verdict = self._ledger.verdict(fragment)
        if verdict is Verdict.OPEN:
            return
        version = self._ledger.newest(fragment)
        mine = self._told.pop(fragment, None)
        self._ledger.clear_fetched(fragment)
        self._afresh.discard(fragment)
        if verdict is Verdict.SOUND:
            self._damaged.pop(fragment, None)
            self._flights.on_arrived(fragment, mine or Base(version, NOTHING))
            return
        self._damaged[fragment] += 1
        self._log.warning("fragment %d differs from the server's after its update; fetching it afresh", fragment)
        if self._damaged[fragment] > SNAPSHOT_TRIES:
            raise unfit_snapshot(fragment)
        self._afresh.add(fragment)

    def on_welcome(self, run_id: str, versions: list[pb.FragmentVersion]) -> None:
        with self._changed:
            if self._run_id and run_id != self._run_id:
                self._fresh.clear()
                self._told.clear()
                self._afresh.clear()
                for fragment in range(self._count):
                    self._ledger.clear_fetched(fragment)
        super().on_welcome(run_id, versions)

    # -- background threads --

    def _broken(self, error: DilocoError) -> None:
        self._council.fail(error)

    def _send(self, flight: Flight) -> None:
        self._ledger.sent(flight.fragment)
        if self._owns[flight.fragment]:
            self._uphill.put(flight)

    def _prepare(self, flight: Flight) -> None:
        if self._owns[flight.fragment]:
            super()._prepare(flight)

    def _pushed(self, flight: Flight, outcome: pb.Outcome) -> None:
        self._outcomes.append((flight.fragment, self._ledger.turn(flight.fragment), outcome))
        self._council.news()

    def _to_fetch(self, fragment: int) -> tuple[bool, Base | None]:
        if not self._owns[fragment] or fragment in self._fresh:
            return False, None
        if fragment in self._told:  # it is fetched on only to come up with others
            told = self._told[fragment]
            return told.version < self._ledger.newest(fragment), told
        if fragment in self._afresh:
            return True, None
        return super()._to_fetch(fragment)

    def _fetched(self, fragment: int, newer: Base, run_id: str) -> None:
        found = digest(newer.theta, self._binding.spans[fragment].first_block)  # takes a while: not under the lock
        with self._changed:
            known = self._told.get(fragment)
            if self._run_id == run_id and (known is None or newer.version != known.version):
                self._fresh[fragment], self._digests[fragment] = newer, found
                self._council.news()

    def _credible(self, newer: Base, found: int) -> bool:
        """The ranks find out together."""
        return True
