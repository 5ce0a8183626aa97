"""Settings of a worker's network, its limits of speed, and the watchdog over its calls, by a clock of the test."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco_client import watch
from diloco_client.network import Network, Throttle
from diloco_client.watch import STOOD_STILL, TICK, Watchdog
from diloco_proto.errors import ConfigError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept = 7.0

    def __call__(self) -> float:
        return self.now


# -- settings --


def test_what_is_given_counts_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Network.chosen(data_connections=None, upload_limit=None) == Network()
    monkeypatch.setenv("DILOCO_DATA_CONNECTIONS", "4")
    monkeypatch.setenv("DILOCO_UPLOAD_LIMIT", "2e6")
    monkeypatch.setenv("DILOCO_DOWNLOAD_LIMIT", "")
    assert Network.chosen(upload_limit=5e6) == Network(data_connections=4, upload_limit=5e6)
    assert Network.chosen() == Network(data_connections=4, upload_limit=2e6)
    monkeypatch.setenv("DILOCO_UPLOAD_LIMIT", "fast")
    with pytest.raises(ConfigError, match="DILOCO_UPLOAD_LIMIT is 'fast', which is no number"):
        Network.chosen()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data_connections": 0}, "data_connections is 0; it must be between 1 and 8"),
        ({"data_connections": 9}, "data_connections is 9"),
        ({"upload_limit": 100}, "upload_limit is 100 bytes a second; it must be 0 .* or at least 20000"),
        ({"download_limit": float("inf")}, "download_limit is inf"),
        ({"upload_limit": -1}, "upload_limit is -1"),
        ({"progress_timeout": 0}, "progress_timeout is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Network(**change)


# -- limits of speed --


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 5)), min_size=1, max_size=30))
def test_no_more_goes_than_the_rate_and_one_message(sends: list[tuple[int, float]]) -> None:
    clock = Clock()
    throttle = Throttle(100_000, clock)
    sent, began = 0, clock.now
    for size, idle in sends:
        clock.now += idle
        clock.now += throttle.reserve(size)
        assert sent <= (clock.now - began) * 100_000 + 1, "what went before has been paid for"
        sent += size


def test_without_a_limit_nothing_waits_and_with_one_who_asks_first_goes_first() -> None:
    assert Throttle(0).reserve(1 << 30) == 0
    throttle = Throttle(1000, Clock())
    assert [throttle.reserve(500) for _ in range(4)] == [0, 0.5, 1.0, 1.5]


# -- the watchdog --


class Dog(Watchdog):
    """One that looks when the test says so."""

    def __init__(self) -> None:
        self.clock = Clock()
        super().__init__(self.clock, lambda: self.clock.slept)
        self._running = True

    def after(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK)):
            self.clock.now += TICK
            self.look()


def watched(dog: Dog, patience: float) -> tuple[watch.Watch, list[str]]:
    ended: list[str] = []
    it = dog.begin(patience)
    it.guard(lambda: ended.append(it.why))
    return it, ended


def test_only_what_does_not_move_is_ended_and_once() -> None:
    dog = Dog()
    (moving, ends), (_, still) = watched(dog, 10), watched(dog, 10)
    for _ in range(4):
        dog.after(5)
        moving.moved()
    assert ends == []
    assert still == ["nothing has moved for 11 s"]
    dog.end(moving)
    dog.after(60)
    assert ends == []


def test_a_call_that_is_late_to_be_cancelled_is_cancelled_all_the_same() -> None:
    dog = Dog()
    it = dog.begin(10)
    dog.after(20)
    ended: list[str] = []
    it.guard(lambda: ended.append(it.why))
    assert len(ended) == 1


def test_a_process_that_was_stopped_gives_its_calls_their_time_again() -> None:
    dog = Dog()
    _, ended = watched(dog, 10)
    dog.after(5)
    dog.clock.now += 3600  # SIGSTOP
    dog.look()
    assert ended == []
    dog.after(4)
    assert ended == []
    dog.after(2)
    assert len(ended) == 1


def test_after_a_sleep_of_the_machine_no_connection_is_trusted() -> None:
    dog = Dog()
    (_, first), (_, second) = watched(dog, 1000), watched(dog, 10)
    dog.after(3)
    dog.clock.slept += STOOD_STILL / 2  # no more than the step of a clock
    dog.after(1)
    assert first == second == []
    dog.clock.slept += 7200
    dog.after(1)
    assert first == second == ["this machine was asleep for 7200 s"]
    _, later = watched(dog, 10)
    dog.after(5)
    assert later == []


def test_sleep_is_measured_from_any_start() -> None:
    before = watch.slept()
    assert watch.slept() - before < STOOD_STILL


def test_the_watchdog_runs_by_itself() -> None:
    dog = Watchdog()
    ended = threading.Event()
    it = dog.begin(0.05)
    it.guard(ended.set)
    assert ended.wait(30)
    assert it.why.startswith("nothing has moved")
    other = threading.Event()
    dog.begin(0.05).guard(other.set)
    assert other.wait(30)
