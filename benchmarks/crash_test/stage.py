"""Where the crash test takes place: a guarded server, its workers, and a bad link for each of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from proxy import Proxy

import diloco_client

from .team import Player, Team
from .worker import Task

UPLINKS = ("int4", "int2", "e3m0", "int4", "ternary")
"""One a seed: some have error feedback, whose residuals must come through too."""

KEEP_ALL = 1_000_000
"""Snapshots; so the journal reaches back to the beginning."""


class BrokenRun(Exception):
    """Something happened that must not happen."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    seconds: float
    seed: int
    workers: int
    asynchronous: bool


@dataclass(slots=True)
class Timeline:
    """Who was up when: (time, name, whether it comes up or goes down)."""

    events: list[tuple[float, str, bool]] = field(default_factory=list)

    def note(self, name: str, up: bool, at: float | None = None) -> None:
        self.events.append((time.time() if at is None else at, name, up))

    def longest_standstill(self, steps: list[float], end: float) -> float:
        """Seconds in which no outer step was made while the server and a worker were up, before any or after all of
        them included. Times in which one of them was not up do not count, nor do they begin anew."""
        server, workers = False, set[str]()
        longest = waited = 0.0
        marks = [(at, "", False) for at in steps]
        former = 0.0
        for at, name, up in sorted([*self.events, *marks, (end, "", False)]):
            if at > end:
                break
            if server and workers:
                waited += at - former
                longest = max(longest, waited)
            former = at
            if not name:
                waited = 0.0
            elif name == "server":
                server = up
            elif up:
                workers.add(name)
            else:
                workers.discard(name)
        return longest


class Stage:
    """Call `look` again and again: it notices what has happened, and starts again what should run."""

    def __init__(self, folder: Path, options: Options, stack: ExitStack, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.options = options
        self.say = say
        self.team = stack.enter_context(Team(folder, options.workers))
        self.links = [stack.enter_context(Proxy(1)) for _ in range(options.workers)]
        self.finish = folder / "finish"
        self.timeline = Timeline()
        self.kills = 0
        self.server_up = False
        self.fault = ""
        """That the present server was given."""
        self.draining = False
        self.joined: set[Player] = set()
        self.ended: set[Player] = set()
        """Workers that have finished in order."""
        self.on_server_down: Callable[[], None] = self.start_server
        self.on_worker_down: Callable[[Player], None] = lambda player: self.start_worker(player, resume=True)
        for player in self.team.workers:
            (folder / player.name).mkdir()

    # -- starting --

    def start_server(self, fault: str = "") -> None:
        """On another port than before."""
        self._port_file.unlink(missing_ok=True)
        run = ["--sync-every=10", "--num-fragments=3", "--overlap-steps=2", "--lease-seconds=9"]
        run += [f"--uplink-codec={UPLINKS[self.options.seed % len(UPLINKS)]}"]
        if self.options.asynchronous:
            run += ["--outer-optimizer=delayed-nesterov"]
        store = [f"--state-dir={self.state}", "--snapshot-every=3", f"--keep-snapshots={KEEP_ALL}"]
        daemon = ["--port=0", "--secure", f"--port-file={self._port_file}", "--log-format=json", "--log-level=debug"]
        self.fault, self.draining = fault, False
        environment = {"DILOCO_FAULT": fault} if fault else {}
        self.team.server.start(["-m", "diloco_cli.server", *daemon, *store, *run], **environment)

    @property
    def _port_file(self) -> Path:
        return self.folder / "port"

    def start_worker(self, player: Player, *, resume: bool) -> None:
        index = self.team.workers.index(player)
        task = Task(
            name=player.name,
            index=index,
            workers=self.options.workers,
            seed=self.options.seed,
            life=player.lives,
            resume=resume,
            folder=str(self.folder / player.name),
            url_file=str(self._url_file(index)),
            finish=str(self.finish),
        )
        player.start(["-m", "crash_test.worker", task.as_argument()])

    def _url_file(self, index: int) -> Path:
        return self.folder / f"url-{index}"

    def _write_urls(self) -> None:
        """The server's join URL, with the address of each worker's own link."""
        url = urlsplit((self.state / "join-url").read_text().strip())
        for index, link in enumerate(self.links):
            path, place = self._url_file(index), f"{url.username}@{link.address}"
            with (
                suppress(FileExistsError),
                os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as f,
            ):
                f.write(urlunsplit(url._replace(netloc=place)))

    # -- what has happened --

    def look(self) -> None:
        """Raises BrokenRun."""
        self._look_at_server()
        for player in self.team.workers:
            self._look_at_worker(player)

    def _look_at_server(self) -> None:
        server = self.team.server
        if server.process is None:
            return
        if not server.running:
            status = server.reap()
            killed = status == -signal.SIGKILL
            self._server_is_down()
            if not killed and not (self.draining and status == 0):
                raise BrokenRun(f"the server ended with status {status}:\n{server.last_words()}")
            if killed:
                self.kills += 1
                self.say(f"the server is dead{f', at {self.fault}' if self.fault else ''}")
            self.on_server_down()
        elif not self.server_up and self._port_file.exists():
            port = int(self._port_file.read_text())
            self._write_urls()
            for link in self.links:
                link.upstream_port = port
            self.server_up = True
            self.timeline.note("server", True)
            if self.team.server.lives == 1:
                for player in self.team.workers:
                    self.start_worker(player, resume=False)

    def _server_is_down(self) -> None:
        if self.server_up:
            self.server_up = False
            self.timeline.note("server", False)

    def _look_at_worker(self, player: Player) -> None:
        if player.process is None:
            return
        if not player.running:
            status = player.reap()
            self.timeline.note(player.name, False)
            self.joined.discard(player)
            if status == -signal.SIGKILL:
                self.on_worker_down(player)
            elif status == 0 and self.finish.exists():
                self.ended.add(player)
            else:
                raise BrokenRun(f"{player.name} ended with status {status}:\n{player.last_words()}")
        elif player not in self.joined:
            record, life = self.folder / player.name / "record.jsonl", f"{player.name}.{player.lives - 1}"
            if record.exists() and f'"event": "joined", "life": "{life}"'.encode() in record.read_bytes():
                self.joined.add(player)
                self.timeline.note(player.name, True)

    def until(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        """Raises BrokenRun when it takes longer, or something breaks."""
        deadline = time.monotonic() + timeout
        while not condition():
            self.look()
            if time.monotonic() > deadline:
                words = "\n".join(f"  {p.name}:\n{p.last_words()}" for p in self.team.players if p.lives)
                raise BrokenRun(f"waited {timeout:.0f} s in vain for {what}\n{words}")
            time.sleep(0.05)

    def all_train(self) -> bool:
        """By the server's word: a worker may run and still be on its way back to it."""
        if not self.server_up or len(self.joined) < len(self.team.workers):
            return False
        states = [worker["state"] for worker in self.status()["workers"]]
        return states == ["ready"] * len(self.team.workers)

    def status(self) -> dict[str, Any]:
        """The server's, by its direct address and with the observer's token."""
        return diloco_client.status(f"file:{self.state / 'observer-url'}", timeout=30.0)

    # -- what is done to them --

    def kill_worker(self, player: Player) -> None:
        self.timeline.note(player.name, False)
        self.joined.discard(player)
        self.kills += 1
        player.kill()

    def freeze(self, player: Player, frozen: bool) -> None:
        player.freeze(frozen)
        if player in self.joined:
            self.timeline.note(player.name, not frozen)

    def kill_server(self) -> None:
        self.fault = ""
        self._port_file.unlink(missing_ok=True)
        self.team.server.kill()
        self._server_is_down()

    def drain_server(self) -> None:
        self.draining = True
        self.team.server.signal(signal.SIGTERM)
