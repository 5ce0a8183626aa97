"""A worker's side of the algorithm, by plain calls: paces, fates that come late, and what is given up."""

from __future__ import annotations

import numpy as np
import pytest

from diloco_client.flights import Arrival, Base, Flight, Flights
from diloco_client.replica import Replica, Rules
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Encoded, Format
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Manifest, Pattern, Role, TensorSpec, build_layout
from diloco_proto.schedule import Schedule


class Copy:
    def __init__(self, values: Floats) -> None:
        self._values = values

    def wait(self) -> Floats:
        return self._values


class Worker:
    """A replica of one fragment a layer, each a vector of equal values, and a carrier that keeps what is pushed."""

    def __init__(
        self, sync_every: int = 8, fragments: int = 1, overlap: int = 2, alpha: float = 0.5, feedback: bool = False
    ) -> None:
        specs = [TensorSpec(f"layers.{i}.w", (64,), "float32", Role.TRAINED) for i in range(fragments)]
        layout = build_layout(Manifest(tuple(specs)), fragments, Pattern.STRIDED)
        self.locals = [np.zeros(64, np.float32) for _ in range(fragments)]
        self.flights = Flights(fragments)
        self.flights.bases = [Base(0, np.zeros(64, np.float32)) for _ in range(fragments)]
        self.pushed: list[Flight] = []
        rules = Rules(schedule=Schedule(sync_every, fragments, overlap), alpha=alpha, error_feedback=feedback)
        self.replica = Replica(layout, rules, self, self, 0)

    # what a replica asks of its carrier

    @property
    def bases(self) -> list[Base]:
        return self.flights.bases

    def push(self, flight: Flight) -> None:
        self.flights.launch(flight)
        self.pushed.append(flight)

    def flight(self, fragment: int) -> Flight | None:
        return self.flights.flight(fragment)

    def take(self, fragment: int) -> Arrival | None:
        return self.flights.take(fragment)

    # what it asks of the parameters

    def capture(self, fragment: int) -> Copy:
        return Copy(self.locals[fragment].copy())

    def mix(self, fragment: int, theta: Floats, alpha: float) -> None:
        self.locals[fragment] = np.float32(alpha) * self.locals[fragment] + np.float32(1 - alpha) * theta

    def shift(self, fragment: int, change: Floats) -> None:
        self.locals[fragment] += change

    def adopt(self, fragment: int, theta: Floats) -> None:
        self.locals[fragment][:] = theta

    def rebase_change(
        self, fragment: int, old: Floats, new: Floats, counted: Encoded | None, correction: Floats | None = None
    ) -> Floats:
        change = new - old
        if counted is not None:
            change = change + counted.codes.view(np.float32)
        return change if correction is None else change + correction

    # what happens to it

    def steps(self, count: int, by: float = -1.0) -> None:
        """Inner steps, each of which adds `by`; what has arrived is merged, nothing is waited for."""
        for _ in range(count):
            for local in self.locals:
                local += np.float32(by)
            self.replica.advance()
            self.replica.merge()

    def encode(self, flight: Flight, fmt: Format = Format.FP32) -> Floats:
        assert flight.captured is not None
        flight.encode(fmt, flight.base.theta)
        return flight.base.theta - flight.captured.wait()

    def answer(self, flight: Flight, kind: int, version: int = 0) -> bool:
        return self.flights.on_outcome(flight, pb.Outcome(kind=kind, version=version))

    def commit(self, version: int, theta: float, *, counted: bool = True, fragment: int = 0, base: int | None = None):
        fate = pb.FATE_COUNTED if counted else pb.FATE_NOT_COUNTED
        base = version - 1 if base is None else base
        self.flights.on_committed(pb.Committed(fragment=fragment, version=version, fate=fate, base_version=base))
        self.arrive(version, theta, fragment)

    def arrive(self, version: int, theta: float, fragment: int = 0) -> None:
        self.flights.on_arrived(fragment, Base(version, np.full(64, theta, np.float32)))

    def settle(self, theta: float = 0.0) -> None:
        """Everything under way is counted, and the fragment comes to the next version."""
        for fragment in range(len(self.locals)):
            flight = self.flight(fragment)
            if flight is not None and flight.encoded is None:
                self.encode(flight)
                version = flight.base.version + 1
                self.answer(flight, pb.OUTCOME_STAGED, flight.base.version)
                self.commit(version, theta, fragment=fragment)

    @property
    def local(self) -> float:
        assert (self.locals[0] == self.locals[0][0]).all()
        return float(self.locals[0][0])


def test_what_was_counted_on_schedule_is_mixed() -> None:
    worker = Worker()
    worker.steps(6)
    (flight,) = worker.pushed
    assert (flight.steps, flight.since_version) == (6, 0)
    worker.encode(flight)
    worker.answer(flight, pb.OUTCOME_STAGED)
    worker.commit(1, -4.0)
    worker.steps(1)
    assert worker.local == -7.0, "not before its step"
    worker.steps(1)
    assert worker.local == 0.5 * -8.0 + 0.5 * -4.0


def test_the_event_of_the_round_may_come_before_the_answer_to_the_push() -> None:
    worker = Worker()
    worker.steps(6)
    (flight,) = worker.pushed
    worker.encode(flight)
    worker.commit(1, -4.0)
    worker.steps(2)
    assert worker.local == -8.0
    worker.answer(flight, pb.OUTCOME_STAGED)
    worker.steps(1)
    assert worker.local == -9.0 + 6.0 - 4.0, "late: the six counted steps are out, the three later ones stay"


def test_what_was_not_counted_stays_and_goes_into_the_next_push() -> None:
    worker = Worker()
    worker.steps(6)
    worker.answer(worker.pushed[0], pb.OUTCOME_CLOSED, 1)
    worker.arrive(1, 10.0)
    worker.steps(8)
    assert worker.local == -14.0 + 0.5 * 10.0, "it moves along as far as one that was counted"
    second = worker.pushed[1]
    assert (second.steps, second.base.version, second.since_version) == (14, 1, 0)


def test_an_update_that_does_not_have_the_contribution_yet_is_not_merged() -> None:
    worker = Worker(overlap=0)
    worker.steps(8)
    (flight,) = worker.pushed
    worker.encode(flight)
    worker.answer(flight, pb.OUTCOME_STAGED)
    worker.flights.on_committed(pb.Committed(version=1, fate=pb.FATE_UNSPECIFIED))
    worker.arrive(1, 5.0)
    worker.flights.on_committed(pb.Committed(version=2, fate=pb.FATE_COUNTED, base_version=0))
    worker.replica.merge()
    assert worker.local == -8.0
    worker.arrive(2, 6.0)
    worker.replica.merge()
    assert worker.local == 0.5 * -8.0 + 0.5 * 6.0
    worker.steps(8)
    assert worker.pushed[1].since_version == 2, "pushed and merged at one step: the next steps are on the new base"


def test_who_is_left_with_too_few_others_waits_only_for_a_version_that_there_is() -> None:
    worker = Worker()
    worker.steps(6)
    flight, flights = worker.pushed[0], worker.flights
    worker.encode(flight)
    assert flights.awaited(0, held=False)
    assert not flights.awaited(0, held=True)
    worker.answer(flight, pb.OUTCOME_CONFLICT)  # another process has staged other bytes: a fate, and the round is open
    assert not flights.awaited(0, held=True)
    flights.announce(0, 1)
    assert flights.awaited(0, held=True)
    worker.arrive(1, 0.0)
    assert not flights.awaited(0, held=False)


def test_who_was_away_too_long_adopts_the_global_parameters_and_its_residual_goes(caplog) -> None:
    worker = Worker(feedback=True)
    worker.steps(6)
    worker.encode(worker.pushed[0], Format.INT2)
    worker.answer(worker.pushed[0], pb.OUTCOME_STAGED)
    worker.commit(1, -4.0)
    worker.steps(8)
    assert worker.pushed[1].residual is not None
    worker.answer(worker.pushed[1], pb.OUTCOME_RESYNC, 50)
    worker.arrive(49, 7.0)
    worker.steps(2)
    assert worker.local != 7.0
    worker.arrive(50, 8.0)
    worker.steps(1)
    assert worker.local == 8.0
    assert "away for 50 rounds" in caplog.text
    worker.steps(5)
    assert (worker.pushed[2].steps, worker.pushed[2].since_version, worker.pushed[2].residual) == (5, 50, None)


def test_a_resync_without_a_newer_base_is_settled_at_once() -> None:
    worker = Worker()
    worker.steps(6)
    worker.answer(worker.pushed[0], pb.OUTCOME_RESYNC, 0)
    worker.steps(2)
    assert worker.local == 0.0


@pytest.mark.parametrize("counted", [True, False])
def test_the_residual_advances_only_when_it_was_counted(counted: bool) -> None:
    worker = Worker(feedback=True, overlap=2)
    worker.locals[0][:] = np.linspace(-1, 1, 64, dtype=np.float32)
    worker.steps(6)
    first = worker.pushed[0]
    delta = worker.encode(first, Format.INT2)
    assert first.residual is None
    worker.answer(first, pb.OUTCOME_STAGED)
    worker.commit(1, 0.0, counted=counted)
    worker.steps(8)
    residual = worker.pushed[1].residual
    if counted:
        decoded = delta - first.next_residual
        np.testing.assert_array_equal(residual, delta - decoded)
        assert np.abs(residual).max() > 0
    else:
        assert residual is None


@pytest.mark.parametrize(
    ("fragments", "overlap", "whole", "paces"), [(4, 2, 8, (4, 8, 5)), (4, 0, 40, (10, 40, 4)), (4, 2, 100, (8, 33))]
)
def test_another_pace_begins_with_a_period_and_keeps_the_order_of_pushes(
    fragments: int, overlap: int, whole: int, paces: tuple[int, ...]
) -> None:
    worker = Worker(whole, fragments, overlap)
    for pace in paces:
        worker.replica.set_pace(pace)
        for _ in range(3 * whole):
            worker.replica.advance()
            worker.settle()
            worker.replica.merge()
        assert worker.replica.sync_every == pace
    order = [flight.fragment for flight in worker.pushed]
    first = order[0]
    assert order == [(first + i) % fragments for i in range(len(order))]


def test_a_worker_of_half_the_pace_advances_twice_as_far_a_step() -> None:
    worker = Worker(8, 1, 0)
    worker.replica.set_pace(4)
    for _ in range(8):
        worker.steps(1)
        worker.settle()
    worker.replica.merge()
    assert worker.replica.global_step == 8
    worker.steps(2)
    assert worker.replica.global_step == 12


def test_tokens_are_steps_until_they_are_reported() -> None:
    worker = Worker(8, 1, 0)
    worker.steps(8)
    assert worker.pushed[0].tokens == 8
    worker.settle()
    worker.replica.merge()
    for _ in range(8):
        worker.replica.report(100)
        worker.steps(1)
    assert worker.pushed[1].tokens == 800


def test_a_period_never_begins_with_a_contribution_of_no_step() -> None:
    worker = Worker(sync_every=8, fragments=1, overlap=2)
    worker.steps(6)
    (flight,) = worker.pushed
    worker.encode(flight)
    worker.replica.set_pace(4)
    worker.answer(flight, pb.OUTCOME_RESYNC, 3)
    worker.arrive(3, 1.0)
    worker.steps(2)
    assert all(f.steps > 0 for f in worker.pushed), "the server refuses it"


@pytest.mark.parametrize("fragments", [4])
def test_what_a_period_owes_is_not_pushed_without_a_step(fragments: int) -> None:
    worker = Worker(sync_every=16, fragments=fragments, overlap=3)
    worker.steps(13)
    for flight in worker.pushed:
        worker.encode(flight)
        worker.answer(flight, pb.OUTCOME_RESYNC, 3)
    worker.replica.set_pace(8)
    for fragment in range(fragments):
        worker.arrive(3, 1.0, fragment)
    worker.steps(3)
    assert worker.replica.sync_every == 8
    assert all(f.steps > 0 for f in worker.pushed)


KEPT = (pb.OUTCOME_STAGED, pb.OUTCOME_ALREADY_HAVE, pb.OUTCOME_PART_HELD)


@pytest.mark.parametrize("kind", KEPT)
def test_an_answer_from_before_a_reconnection_does_not_say_the_fate_and_is_asked_for_again(kind: int) -> None:
    worker = Worker()
    worker.steps(6)
    (flight,) = worker.pushed
    worker.encode(flight)
    assert worker.flights.on_versions([pb.FragmentVersion(version=1)]) == [], "its answer is still on its way"
    assert worker.answer(flight, kind), "the event of its round may have been told to nobody"
    worker.arrive(1, -4.0)
    worker.steps(2)
    assert worker.local == -8.0
    assert not worker.answer(flight, pb.OUTCOME_COUNTED, 1)
    worker.steps(1)
    assert worker.local == -9.0 + 6.0 - 4.0


def test_what_is_known_or_will_be_told_is_not_asked_for_again() -> None:
    told = Worker()
    told.steps(6)
    told.encode(told.pushed[0])
    assert not told.answer(told.pushed[0], pb.OUTCOME_STAGED), "no reconnection"
    assert told.flights.on_versions([pb.FragmentVersion(version=0)]) == told.pushed
    assert not told.answer(told.pushed[0], pb.OUTCOME_ALREADY_HAVE), "asked in this session"
    heard = Worker()
    heard.steps(6)
    heard.encode(heard.pushed[0])
    heard.flights.on_versions([pb.FragmentVersion(version=0)])
    heard.commit(1, -4.0)
    assert not heard.answer(heard.pushed[0], pb.OUTCOME_STAGED), "its event came in the new session"
    closed = Worker()
    closed.steps(6)
    closed.flights.on_versions([pb.FragmentVersion(version=1)])
    assert not closed.answer(closed.pushed[0], pb.OUTCOME_CLOSED, 1)


@pytest.mark.parametrize("counted", [True, False])
def test_after_a_flush_that_failed_the_remainder_is_merged_and_the_worker_goes_on(counted: bool) -> None:
    worker = Worker()
    worker.steps(3)
    worker.replica.push_remainders()  # the flush gives up before its fate is known, and the training goes on
    (remainder,) = worker.pushed
    worker.encode(remainder)
    worker.steps(1)
    worker.answer(remainder, pb.OUTCOME_STAGED)
    worker.commit(1, -3.0, counted=counted)
    worker.steps(1)
    assert worker.local == -5.0 + (0.0 if counted else -3.0)
    worker.steps(1)
    assert worker.flight(0) is worker.pushed[1], "the one that is due at step 6"
    assert worker.pushed[1].steps == (3 if counted else 6)


@pytest.mark.parametrize(("asked", "taken_back"), [(45, 47), (45, 48), (44, 46), (48, 50)])
def test_a_pace_that_is_taken_back_before_it_began_costs_no_push(asked: int, taken_back: int) -> None:
    orders = []
    for paces in ({}, {asked: 22, taken_back: 24}):
        worker = Worker(sync_every=24, fragments=12, overlap=4)
        for step in range(1, 97):
            if step in paces:
                worker.replica.set_pace(paces[step])
            worker.steps(1)
            worker.settle()
        orders.append([flight.fragment for flight in worker.pushed])
    assert orders[0] == orders[1]
