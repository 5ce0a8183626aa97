"""Dynamic local updates: H by speed."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from diloco_proto import outer_pb2 as pb
from diloco_proto.schedule import Schedule
from diloco_server.pace import Speed, new_paces, next_pace, reference_speed

SCHEDULE = Schedule(100, 4, 2)


def speed(steps_per_second: float, stall: float = 0.0) -> Speed:
    """As after one heartbeat of ten seconds, of which `stall` were waiting."""
    measured = Speed()
    steps = round(steps_per_second * (10 - stall))
    measured.hear(pb.Heartbeat(), pb.Heartbeat(steps=steps, train_seconds=10, stall_seconds=stall))
    return measured


@dataclass
class Worker:
    speed: Speed
    sync_every: int = field(default=100)


def test_speed_is_that_of_computing() -> None:
    assert speed(4.0, stall=5.0).steps_per_second == pytest.approx(4.0)
    assert Speed().steps_per_second is None


def test_speed_follows_a_change_within_some_heartbeats() -> None:
    measured = Speed()
    beats = [pb.Heartbeat(steps=10 * i, train_seconds=10 * i) for i in range(20)]
    beats += [pb.Heartbeat(steps=190 + 5 * i, train_seconds=190 + 10 * i) for i in range(1, 30)]
    for before, now in pairwise(beats):
        measured.hear(before, now)
    assert measured.steps_per_second == pytest.approx(0.5, abs=0.05)


def test_a_heartbeat_of_a_new_process_is_not_compared_with_the_old_one() -> None:
    measured = Speed()
    measured.hear(pb.Heartbeat(steps=1000, train_seconds=10), pb.Heartbeat(steps=3, train_seconds=20))
    assert measured.steps_per_second is None


def test_the_whole_h_goes_with_a_high_percentile_of_the_speeds() -> None:
    assert reference_speed([1.0, 1.0, 2.0, 4.0]) == 4.0
    assert reference_speed([1.0] * 19 + [100.0]) == 1.0


def test_slower_workers_get_fewer_steps() -> None:
    workers = [Worker(speed(s)) for s in (4.0, 2.0, 1.0)]
    paces = {id(w): pace for w, pace in new_paces(workers, SCHEDULE)}
    assert [paces.get(id(w)) for w in workers] == [None, 50, 25]


def test_h_stays_possible_and_ignores_small_changes() -> None:
    assert next_pace(100, 0.001, SCHEDULE) == 4
    assert next_pace(100, 0.001, Schedule(100, 4, 9)) == 10
    assert next_pace(50, 0.53, SCHEDULE) == 50
    assert next_pace(50, 0.6, SCHEDULE) == 60
    assert next_pace(97, 1.0, SCHEDULE) == 100
    assert next_pace(100, 0.96, SCHEDULE) == 100


def test_nobody_is_paced_before_anything_was_measured() -> None:
    assert new_paces([Worker(Speed()), Worker(Speed())], SCHEDULE) == []
