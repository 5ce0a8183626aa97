"""The simulated disk keeps what was synced, and nothing that it should not."""

from __future__ import annotations

import pytest

from diloco_cli.simulate.clock import Clock
from diloco_cli.simulate.disk import Disk
from diloco_server.store import state_pb2 as state


def write(disk: Disk, *serials: int) -> None:
    for serial in serials:
        disk.append(state.Record(frame=state.Frame(serial=serial)), bytes([serial]))


def held(disk: Disk, first_segment: int = 0) -> list[tuple[int, int, bytes]]:
    return [(segment, r.frame.serial, bytes(blob)) for segment, r, blob in disk.replay(first_segment)]


def test_one_sync_serves_all_who_wait_when_it_begins() -> None:
    clock, told = Clock(), []
    disk = Disk(clock, sync_seconds=1.0)
    write(disk, 1)
    disk.when_synced(lambda: told.append((1, clock.now)))
    clock.after(0.5, lambda: write(disk, 2))
    clock.after(0.6, lambda: disk.when_synced(lambda: told.append((2, clock.now))))
    while clock.step():
        pass
    assert told == [(1, 1.0), (2, 2.0)]
    disk.when_synced(lambda: told.append((3, clock.now)))
    assert told[-1] == (3, 2.0), "there was nothing to sync"


@pytest.mark.parametrize(("survive", "left"), [(0.0, [1]), (0.5, [1, 2]), (1.0, [1, 2, 3])])
def test_a_crash_takes_the_newest_of_what_was_not_synced(survive: float, left: list[int]) -> None:
    clock, told = Clock(), []
    disk = Disk(clock, sync_seconds=1.0)
    write(disk, 1)
    disk.when_synced(lambda: None)
    clock.step()
    write(disk, 2, 3)
    disk.when_synced(lambda: told.append("never"))
    assert disk.crash(survive) == 3 - len(left)
    assert not clock.step()
    assert not told
    assert [serial for _, serial, _ in held(disk)] == left


def test_a_journal_is_read_from_a_segment_on() -> None:
    disk = Disk(Clock())
    write(disk, 1)
    second = disk.rotate()
    write(disk, 2, 3)
    assert held(disk, second) == [(second, 2, b"\2"), (second, 3, b"\3")]
    assert disk.crash(0.0) == 3, "nobody has waited for a sync"
