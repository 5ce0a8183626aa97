"""The demo: one server, some workers and a lone one for comparison, as processes of this machine.

Starts them, listens to their progress, compares the digests at the end, and leaves nothing behind.
"""

import contextlib
import dataclasses
import importlib.util
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

import diloco_client
from diloco_client.demo.display import Display
from diloco_client.demo.options import DemoError, DemoOptions
from diloco_client.demo.progress import ALONE, Progress
from diloco_client.demo.report import Report, make_report, save
from diloco_client.demo.team import Team

__all__ = ["DemoError", "DemoOptions", "run_demo"]

SERVER = "server"
"""Name of the server's process."""
START_SECONDS = 180.0
"""For the server to listen: on a machine's first run it compiles its kernels."""
SILENCE_SECONDS = 180.0
"""Without a word from any process before the demo gives up."""
TICK_SECONDS = 0.1


def run_demo(options: DemoOptions, server_command: Sequence[str], console: Console | None = None) -> Report:
    """Runs the demo and writes `options.out`/report.json and loss.png.

    `server_command` starts a server, given its flags. Raises DemoError when a process ends early. However
    the demo ends, by an error, Ctrl-C or SIGTERM too, no process is left.
    """
    started = time.monotonic()
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError("the demo draws with matplotlib, which is missing: pip install '.[demo]' in diloco's folder")
    if console is None:
        console = Console(stderr=options.json)
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    progress = Progress.of(options.workers)
    with (
        signals_raise(),
        tempfile.TemporaryDirectory(prefix="diloco-demo-") as scratch,
        Team(logs) as team,
        Display(console, options, progress) as display,
    ):
        stage = Stage(team, progress, display)
        port_file = Path(scratch, "port")
        # The server's own files go into its working directory, and with it when the demo is over.
        team.start(SERVER, _guarded([*server_command, *server_flags(options, port_file)]), cwd=Path(scratch))
        for name in progress.tracks:
            team.start(name, worker_command(options, name))
        display.say("starting; the first run on a machine compiles its kernels")
        stage.listen(until=port_file.exists, timeout=START_SECONDS)
        address = f"127.0.0.1:{port_file.read_text().strip()}"
        for name in progress.tracks:
            team.send(name, "" if name == ALONE else address)
        stage.listen(until=lambda: progress.all_in("ready"))
        display.say(f"{options.workers} workers have joined {address}")
        for name in progress.tracks:
            team.send(name, "go")
        stage.listen(until=lambda: progress.all_in("done"))
        digests = server_digests(address)
    report = make_report(options, progress, digests, seconds=time.monotonic() - started)
    save(report, progress, options.out)
    return report


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """Takes in what the team says, and shows it."""

    team: Team
    progress: Progress
    display: Display

    def listen(self, until: Callable[[], bool], timeout: float = SILENCE_SECONDS) -> None:
        """Until `until` says so. DemoError when a process ends before, or all are silent for `timeout` s."""
        heard = time.monotonic()
        while not until():
            received = self.team.receive(TICK_SECONDS)
            if received is not None:
                heard = time.monotonic()
                self._take(*received)
            elif time.monotonic() - heard > timeout:
                raise DemoError(f"no process said anything for {timeout:.0f} s; their logs may tell why")

    def _take(self, name: str, event: dict[str, Any] | None) -> None:
        if event is not None:
            self.progress.hear(name, event)
            self.display.update()
        elif name == SERVER or self.progress.tracks[name].phase != "done":
            self.team.fail(name)


def _guarded(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "diloco_client.demo.guard", *command]


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise, once: a second Ctrl-C must not interrupt the ending of the processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def server_flags(options: DemoOptions, port_file: Path) -> list[str]:
    """Flags of the server for these options. Every round waits for all: here they start and end together."""
    flags = {
        "port": 0,
        "port-file": port_file,
        "sync-every": options.sync_every,
        "num-fragments": options.num_fragments,
        "overlap-steps": options.overlap_steps,
        "mixing-alpha": options.mixing_alpha,
        "outer-lr": options.outer_lr,
        "outer-momentum": options.outer_momentum,
        "uplink-codec": options.codec,
        "downlink-codec": options.codec,
        "min-workers": options.workers,
        "grace-seconds": "inf",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def worker_command(options: DemoOptions, name: str) -> list[str]:
    """The command of training process `name`. The lone worker has the shard of worker 0."""
    alone = name == ALONE
    task = {
        "name": name,
        "index": 0 if alone else int(name.removeprefix("worker-")),
        "alone": alone,
        "workers": options.workers,
        "steps": options.steps,
        "seed": options.seed,
    }
    return [sys.executable, "-m", "diloco_client.demo.worker", json.dumps(task)]


def server_digests(address: str) -> dict[str, str]:
    """Fragment -> digest of θ on the server."""
    fragments = diloco_client.status(address)["fragments"]
    trained = [fragment for fragment in fragments if fragment["kind"] == "trained"]
    return {str(fragment["index"]): fragment["digest"] for fragment in trained}
