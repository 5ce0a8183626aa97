"""Run as a script: dies by SIGKILL at each of the fault points, one child process after another.

python dying_server.py DIRECTORY: for every point, state in DIRECTORY/point, and what was acknowledged, one number a
line, in DIRECTORY/point.acknowledged.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from workload import INFO, LAYOUT, blob_of, momentum_of, record_of, theta_of

from diloco_server.store import FaultPoints, Store
from diloco_server.store import state_pb2 as pb

POINTS = {
    "before_append": 4,
    "after_append": 4,
    "before_fsync": 4,
    "after_fsync": 4,
    "mid_snapshot": 2,
    "before_rename": 2,
    "after_rename": 2,
}
"""The second snapshot, or one of the records after it or before it."""


def live(directory: Path, point: str) -> None:
    acknowledged = os.open(f"{directory / point}.acknowledged", os.O_CREAT | os.O_WRONLY)
    faults = FaultPoints.from_environment({"DILOCO_FAULT": f"{point}:{POINTS[point]}"})
    store = Store(directory / point, faults=faults)
    store.begin(INFO)
    appended = 0
    for number in range(3):
        first = store.journal.rotate() if number else 1
        draft = store.snapshots.begin(number, LAYOUT, INFO.run_id)
        draft.add(pb.FragmentState(fragment=0, version=number, tokens=appended), theta_of(number), momentum_of(number))
        if number:
            store.journal.durable(store.journal.position).result(30)
        draft.finish(pb.Snapshot(rounds_committed=number, first_segment=first))
        if number == 0:
            store.start_journal()
        for serial in range(appended, appended + 3):
            store.journal.durable(store.journal.append(record_of(serial), blob_of(serial))).result(30)
            os.write(acknowledged, b"%d\n" % serial)
        appended += 3


def main(directory: Path) -> None:
    for point in POINTS:
        child = os.fork()
        if child == 0:
            live(directory, point)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{point}: the child was not killed but exited with {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    main(Path(sys.argv[1]))
