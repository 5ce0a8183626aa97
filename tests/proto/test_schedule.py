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
    return Schedule(every, draw(st.integers(1, every)), draw(st.integers(0, every - 1)))


@settings(deadline=None)
@given(schedules(), st.integers(0, 500))
def test_each_fragment_is_pushed_and_applied_once_a_period(schedule: Schedule, start: int) -> None:
    period = range(start + 1, start + schedule.sync_every + 1)
    for kind in ("push", "apply"):
        dues = list(chain.from_iterable(getattr(schedule.due(k), kind) for k in period))
        assert sorted(dues) == list(range(schedule.num_fragments))


@settings(deadline=None)
@given(schedules())
def test_an_apply_comes_overlap_steps_after_its_push(schedule: Schedule) -> None:
    horizon = range(1, 4 * schedule.sync_every + 1)
    dues = {k: schedule.due(k) for k in horizon}
    for fragment in range(schedule.num_fragments):
        pushes = [k for k in horizon if fragment in dues[k].push]
        applies = [k for k in horizon if fragment in dues[k].apply]
        assert applies[0] == schedule.apply_offset(fragment)
        skipped = applies[0] <= schedule.overlap_steps  # the push would have been at k <= 0
        expected = [k + schedule.overlap_steps for k in pushes]
        assert applies[skipped:] == [k for k in expected if k in horizon]
        assert all(b - a == schedule.sync_every for a, b in pairwise(pushes))


@settings(deadline=None)
@given(schedules(), st.integers(1, 500))
def test_fragments_never_share_a_step(schedule: Schedule, step: int) -> None:
    assert len(schedule.due(step).push) <= 1
    assert len(schedule.due(step).apply) <= 1


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
