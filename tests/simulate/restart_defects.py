"""Defects in what outlives the server's process, and in what workers do when the run has gone back."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from defects import Defect, Patch, replace

from diloco_cli.simulate.server import VirtualServer
from diloco_client.flights import Flights
from diloco_client.replica import Replica
from diloco_proto.errors import InvalidContribution, NotReady
from diloco_server.members import Members
from diloco_server.parameters import Parameters
from diloco_server.recovery import Recovery
from diloco_server.rounds import Rounds
from diloco_server.run import Run


def answered_at_once(self: VirtualServer, header: object, outcome: object, answer: object) -> None:
    self.watch.acknowledged(header, outcome)
    answer(outcome)


def after_recovery(change: object) -> Patch:
    """`change` gets the Recovery that has finished."""
    original = Recovery.finish

    def finish(self: Recovery, now: float) -> None:
        original(self, now)
        change(self)

    return replace(Recovery, "finish", finish)


def before_the_end(change: object) -> Patch:
    """`change` gets the Recovery that is about to finish."""
    original = Recovery.finish

    def finish(self: Recovery, now: float) -> None:
        change(self)
        original(self, now)

    return replace(Recovery, "finish", finish)


def forget_last_counted(recovery: Recovery) -> None:
    for counted in recovery._model.rounds.last_counted:
        counted.clear()


def only_what_was_published(patch: pytest.MonkeyPatch) -> None:
    close, published = Recovery._close, Recovery._published
    decided: dict[tuple[int, int], object] = {}

    def later(self: Recovery, record: object) -> None:
        decided[id(self), record.fragment] = record

    def now(self: Recovery, record: object) -> None:
        if (id(self), record.fragment) in decided:
            close(self, decided.pop((id(self), record.fragment)))
        published(self, record)

    patch.setattr(Recovery, "_close", later)
    patch.setattr(Recovery, "_published", now)


def without(name: str) -> Patch:
    """The state of the outer optimizer comes back without one of its arrays."""
    original = Parameters.restore

    def restore(self: Parameters, fragment: int, version: int, digest: int, arrays: dict[str, np.ndarray]) -> object:
        return original(self, fragment, version, digest, {n: a * (n != name) for n, a in arrays.items()})

    return replace(Parameters, "restore", restore)


def forget_norms(recovery: Recovery) -> None:
    for weights in recovery._model.rounds.weights:
        weights.norms.clear()


def forget_window(recovery: Recovery) -> None:
    for fragment in recovery._model.layout.scheduled:
        recovery._model.parameters.state(fragment.index).buffered = 0


def first_serial(recovery: Recovery) -> None:
    recovery._model.pushes.next_serial = 1


def judged_again(patch: pytest.MonkeyPatch) -> None:
    restage = Rounds.restage

    def stage(self: Rounds, contribution: object, now: float) -> object:
        known = self.seen_before(contribution.key, contribution.frames)
        return restage(self, contribution, now) if known is None else known

    patch.setattr(Rounds, "restage", stage)


def opened_long_ago(patch: pytest.MonkeyPatch) -> None:
    original = Rounds.expect

    def expect(self: Rounds, fragment: int, workers: object, now: float, **options: object) -> None:
        opened_at = self._open[fragment].opened_at
        original(self, fragment, workers, now, **options)
        self._open[fragment].opened_at = opened_at

    patch.setattr(Rounds, "expect", expect)


def no_patience_before_the_opening(patch: pytest.MonkeyPatch) -> None:
    original = Rounds.seen_before

    def seen_before(self: Rounds, key: object, frames: object) -> object:
        try:
            return original(self, key, frames)
        except NotReady as error:
            raise InvalidContribution(str(error)) from error

    patch.setattr(Rounds, "seen_before", seen_before)


def first_rounds_are_not_kept(patch: pytest.MonkeyPatch) -> None:
    original = Run.open

    def opened(self: Run, now: float) -> None:
        original(self, now)
        self.records = [r for r in self.records if r.WhichOneof("body") != "published"]

    patch.setattr(Run, "open", opened)


def all_who_are_ready(recovery: Recovery) -> None:
    recovery._expected.clear()


def any_lineage(patch: pytest.MonkeyPatch) -> None:
    original = Run.check_run_id

    def check(self: Run, run_id: str) -> None:
        original(self, self.run_id if run_id.partition(".")[0] == self.run_id.partition(".")[0] else run_id)

    patch.setattr(Run, "check_run_id", check)


def merged_as_ever(patch: pytest.MonkeyPatch) -> None:
    original = Replica._merge

    def merge(self: Replica, fragment: int, old: object, arrival: object) -> None:
        original(self, fragment, old, dataclasses.replace(arrival, afresh=False))

    patch.setattr(Replica, "_merge", merge)


def still_under_way(patch: pytest.MonkeyPatch) -> None:
    original = Flights.rolled_back

    def rolled_back(self: Flights, versions: object) -> None:
        flights = list(self._flights)
        original(self, versions)
        self._flights = flights

    patch.setattr(Flights, "rolled_back", rolled_back)


no = partial(replace, value=lambda self, *_, **__: None)

RESTART_DEFECTS = [
    Defect("a push is answered before it is on disk", 3, 91, replace(VirtualServer, "_answer", answered_at_once)),
    Defect(
        "an outer step is made before it is on disk",
        3,
        134,
        lambda p: p.setattr(VirtualServer, "_decide", VirtualServer._begin_commit),
    ),
    Defect("contributions that wait are forgotten at a restart", 3, 11, before_the_end(lambda r: r._staged.clear())),
    Defect("contributions that wait are judged again at a restart", 3, 4015, judged_again),
    Defect("frames that are still needed are dropped", 3, 11, replace(Run, "serials", lambda self: set())),
    Defect("the last counted contributions are forgotten at a restart", 3, 122, after_recovery(forget_last_counted)),
    Defect("a round that was decided and not published is not made again", 3, 56, only_what_was_published),
    Defect("the serials of contributions start anew", 3, 5628, after_recovery(first_serial)),
    Defect("the members are forgotten at a restart", 3, 122, no(Members, "restore")),
    Defect("the momentum is not restored", 2, 227, without("momentum")),
    Defect("the residual is not restored", 2, 19, without("residual")),
    Defect("the buffer of delayed Nesterov is not restored", 2, 122, without("buffer")),
    Defect("the place in the window of delayed Nesterov is not restored", 2, 91, after_recovery(forget_window)),
    Defect("the usual norms are forgotten at a restart", 2, 91, after_recovery(forget_norms)),
    Defect("whom rounds waited for is forgotten at a restart", 4, 19, before_the_end(all_who_are_ready)),
    Defect("whom the first rounds wait for is not kept", 4, 11, first_rounds_are_not_kept),
    Defect("rounds seem to have opened long ago after a restart", 4, 1118, opened_long_ago),
    Defect("a push before the run is open again is an error", 5, 31, no_patience_before_the_opening),
    Defect("pushes to what the run was before it went back are taken", 6, 181, any_lineage),
    Defect("what the run has undone is merged", 5, 337, merged_as_ever),
    Defect("what was under way when the run went back stays so", 4, 48, still_under_way),
]
