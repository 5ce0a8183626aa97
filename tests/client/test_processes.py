"""Real processes: one is killed, one is stopped for longer than its lease, one joins late; the run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import pytest

import diloco_client

SCRIPT = Path(__file__).with_name("process_worker.py")
LEASE = 4.0
GRACE = 1.0
STOPPED_SECONDS = 20.0
SERVER = [
    *("--port", "0", "--sync-every", "20", "--num-fragments", "2", "--overlap-steps", "2"),
    *("--lease-seconds", str(LEASE), "--grace-seconds", str(GRACE)),
]


class Watch:
    """Reads the status all the time, so that no round's record is missed."""

    def __init__(self, address: str) -> None:
        self.rounds: dict[tuple[int, int], dict[str, Any]] = {}
        self.workers: dict[str, dict[str, Any]] = {}
        self._address = address
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            status = diloco_client.status(self._address, rounds=64)
            with self._changed:
                self.workers = {w["worker_id"]: w for w in status["workers"]}
                for fragment in status["fragments"]:
                    for record in fragment["rounds"]:
                        self.rounds.setdefault((fragment["index"], record["version"]), record)
                self._changed.notify_all()

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout), f"waited in vain for {what}"

    def members(self, fragment: int = 0) -> list[frozenset[str]]:
        """Who was in each round of the fragment, oldest first."""
        records = [r for (p, _), r in sorted(self.rounds.items()) if p == fragment]
        return [frozenset(m["worker_id"] for m in r["members"]) for r in records]

    def until_rounds_of(self, names: str, count: int = 2) -> None:
        """The last `count` rounds were made by exactly these workers, one letter each."""
        wanted = [frozenset(names)] * count
        self.until(lambda: self.members()[-count:] == wanted, f"{count} rounds of {names}")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Processes:
    """Those started within the block; none survives it."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, *command: str, output: int | TextIO = subprocess.PIPE) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, text=True)
        self._stack.enter_context(process)  # closes its pipes
        self._stack.callback(process.kill)
        return process


@pytest.mark.timeout(180)
def test_a_run_survives_a_kill_a_stop_and_a_late_joiner(tmp_path: Path) -> None:
    flag, port_file = tmp_path / "finish", tmp_path / "port"
    with Processes() as processes:
        with (tmp_path / "server.log").open("w") as log:
            processes.start("-m", "diloco_cli.server", *SERVER, "--port-file", str(port_file), output=log)
        deadline = time.monotonic() + 60
        while not port_file.exists():
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.05)
        address = f"127.0.0.1:{port_file.read_text().strip()}"

        def start(name: str) -> subprocess.Popen[str]:
            return processes.start(str(SCRIPT), address, name, str(flag))

        workers = {name: start(name) for name in "abcd"}
        watch = Watch(address)
        watch.until_rounds_of("abcd")

        workers["d"].kill()
        watch.until_rounds_of("abc")

        os.kill(workers["c"].pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        watch.until_rounds_of("ab")
        workers["e"] = start("e")
        watch.until_rounds_of("abe")
        remaining = STOPPED_SECONDS - (time.monotonic() - stopped_at)
        assert remaining > 0
        time.sleep(remaining)  # what is tested is a stop of this length
        assert frozenset("abe") == watch.members()[-1]
        os.kill(workers["c"].pid, signal.SIGCONT)
        watch.until_rounds_of("abce")
        states = {name: w["state"] for name, w in watch.workers.items()}
        assert states == {"a": "ready", "b": "ready", "c": "ready", "d": "gone", "e": "ready"}

        flag.touch()
        reports = {}
        for name in "abce":
            output, errors = workers[name].communicate(timeout=60)
            assert workers[name].returncode == 0, errors
            reports[name] = json.loads(output)
        status = diloco_client.status(address)
        watch.close()

    digests = {str(f["index"]): int(f["digest"], 16) for f in status["fragments"]}
    assert all(report == {"digests": digests, "holds_theta": True} for report in reports.values())
    counted = [members for fragment in (0, 1) for members in watch.members(fragment)]
    assert all(members <= frozenset("abcde") for members in counted)
    for fragment in (0, 1):
        versions = [version for p, version in sorted(watch.rounds) if p == fragment]
        assert versions == list(range(1, len(versions) + 1)), "a record is missing"
    usual = sorted(r["open_seconds"] for r in watch.rounds.values())[len(watch.rounds) // 2]
    longest = max(r["open_seconds"] for r in watch.rounds.values())
    assert longest < LEASE + GRACE + 2 * usual + 2.0
