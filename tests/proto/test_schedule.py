"""When fragments are pushed and applied."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_proto.errors import ConfigError
from diloco_proto.schedule import Due, Schedule


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    every = draw(st.integers(1, 40))
    return Schedule(every, draw(st.integers(1, every)), draw(st.integers(0, every - 1)), draw(st.booleans()))


def fragments(schedule: Schedule) -> range:
    return range(schedule.num_fragments + schedule.buffers)


@settings(deadline=None)
@given(schedules(), st.integers(0, 500))
def test_each_fragment_is_pushed_and_applied_once_a_period(schedule: Schedule, start: int) -> None:
    period = range(start + 1, start + schedule.sync_every + 1)
    for kind in ("push", "apply"):
        dues = list(chain.from_iterable(getattr(schedule.due(k), kind) for k in period))
        assert sorted(dues) == list(fragments(schedule))


@settings(deadline=None)
@given(schedules())
def test_an_apply_comes_overlap_steps_after_its_push(schedule: Schedule) -> None:
    horizon = range(1, 4 * schedule.sync_every + 1)
    dues = {k: schedule.due(k) for k in horizon}
    for fragment in fragments(schedule):
        pushes = [k for k in horizon if fragment in dues[k].push]
        applies = [k for k in horizon if fragment in dues[k].apply]
        assert applies[0] == schedule.apply_offset(fragment)
        skipped = applies[0] <= schedule.overlap_steps  # the push would have been at k <= 0
        expected = [k + schedule.overlap_steps for k in pushes]
        assert applies[skipped:] == [k for k in expected if k in horizon]
        assert all(b - a == schedule.sync_every for a, b in pairwise(pushes))


@settings(deadline=None)
@given(schedules(), st.integers(1, 500))
def test_trained_fragments_never_share_a_step_and_buffers_go_with_the_last(schedule: Schedule, step: int) -> None:
    last = schedule.num_fragments - 1
    for due in (schedule.due(step).push, schedule.due(step).apply):
        assert sum(p <= last for p in due) <= 1
        assert (last + 1 in due) == (schedule.buffers and last in due)


@settings(deadline=None)
@given(schedules(), st.integers(1, 500))
def test_a_joiner_in_phase_does_what_the_others_do(schedule: Schedule, step: int) -> None:
    assert schedule.due(step) == schedule.due(step + schedule.sync_every)


def test_classic_diloco() -> None:
    schedule = Schedule(5, 1, 0)
    assert [k for k in range(1, 16) if schedule.due(k) == Due((0,), (0,))] == [5, 10, 15]
    assert all(schedule.due(k) == Due((), ()) for k in range(1, 16) if k % 5)


def test_periods_that_fragments_do_not_divide() -> None:
    schedule = Schedule(11, 4, 2)
    assert [schedule.apply_offset(p) for p in range(4)] == [2, 5, 8, 11]
    assert schedule.due(2) == Due((), (0,))
    assert schedule.due(3) == Due((1,), ())
    assert schedule.due(11) == Due((0,), (3,))


def test_buffers_are_applied_at_the_end_of_a_period() -> None:
    schedule = Schedule(11, 4, 2, buffers=True)
    assert [schedule.apply_offset(p) for p in range(5)] == [2, 5, 8, 11, 11]
    assert schedule.due(9) == Due((3, 4), ())
    assert schedule.due(11) == Due((0,), (3, 4))
    assert Schedule(5, 1, 0, buffers=True).due(5) == Due((0, 1), (0, 1))


def test_another_period_keeps_all_else() -> None:
    assert Schedule(11, 4, 2, buffers=True).with_sync_every(6) == Schedule(6, 4, 2, buffers=True)
    with pytest.raises(ConfigError, match=r"sync_every \(3\)"):
        Schedule(11, 4, 2).with_sync_every(3)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ((0, 1, 0), "sync_every is 0"),
        ((-3, 1, 0), "sync_every is -3"),
        ((5, 0, 0), "num_fragments is 0"),
        ((5, 1, -1), "overlap_steps is -1"),
        ((3, 4, 0), r"sync_every \(3\) must be at least num_fragments \(4\)"),
        ((5, 5, 5), r"sync_every \(5\) must be greater than overlap_steps \(5\)"),
    ],
)
def test_settings_that_can_never_work(settings: tuple[int, int, int], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Schedule(*settings)
