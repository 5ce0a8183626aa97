"""What befalls the crash test, at random and from one seed: deaths, cuts, stalls, sleep."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable

from proxy import Proxy

from .stage import Stage
from .team import Player

PAUSE = (0.3, 3.0)
"""Seconds from one trouble to the next."""

FAULTS = {
    "before_append": 60,
    "after_append": 60,
    "before_fsync": 40,
    "after_fsync": 40,
    "before_publish": 15,
    "mid_snapshot": 6,
    "before_rename": 3,
    "after_rename": 3,
}
"""Points at which the server may die, and the most times that it passes them before."""

Action = Callable[[], None]


class Trouble:
    """Call `go_on` again and again."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._random = random.Random(stage.options.seed)
        self._later: list[tuple[float, int, Action]] = []
        self._order = itertools.count()
        self.counts: dict[str, int] = {}
        self._ended = 0
        """Connections that were ended in order."""
        self._kinds: list[tuple[Action, int]] = [
            (self._kill_server, 3),
            (self._drain_server, 1),
            (self._kill_worker, 4),
            (self._cut, 3),
            (self._cut_in_mid_frame, 3),
            (self._stall, 3),
            (self._slow, 1),
            (self._orphan, 1),
            (self._refuse, 1),
            (self._sleep, 1),
        ]
        stage.on_server_down = lambda: self._in(self._uniform(0.0, 2.0), self._start_server)
        stage.on_worker_down = lambda player: self._in(self._uniform(0.0, 4.0), lambda: self._start_worker(player))
        self._next()

    def go_on(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()

    def end(self) -> None:
        """Mend everything."""
        stage = self._stage
        while self._later:
            action = heapq.heappop(self._later)[2]
            if action != self._strike:
                action()
        stage.on_server_down = stage.start_server
        stage.on_worker_down = lambda player: stage.start_worker(player, resume=True)
        for link in stage.links:
            link.refusing = False
            link.up.cut_after = link.down.cut_after = None
            link.up.rate = link.down.rate = 0.0
            link.deliver()
            link.resume()
        if stage.fault and stage.team.server.running:
            stage.kill_server()  # it would die while the workers finish

    def _in(self, seconds: float, action: Action) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), action))

    def _uniform(self, least: float, most: float) -> float:
        return self._random.uniform(least, most)

    def _next(self) -> None:
        self._in(self._uniform(*PAUSE), self._strike)

    def _strike(self) -> None:
        kinds, weights = zip(*self._kinds, strict=True)
        self._random.choices(kinds, weights)[0]()
        self._next()

    def _note(self, kind: str, text: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self._stage.say(text)

    @property
    def cuts(self) -> int:
        """Connections that were cut or ended on their way."""
        return self._ended + sum(link.cuts for link in self._stage.links)

    def _link(self) -> tuple[str, Proxy]:
        """Rather one that is used."""
        links = self._stage.links
        index = self._random.choice([i for i, link in enumerate(links) if link.open] or range(len(links)))
        return f"the link of worker-{index}", links[index]

    # -- deaths --

    def _kill_server(self) -> None:
        if self._stage.server_up and self._stage.team.server.running:
            self._note("server killed", "kill the server")
            self._stage.kill_server()

    def _drain_server(self) -> None:
        if self._stage.server_up and self._stage.team.server.running and not self._stage.draining:
            self._note("server stopped", "stop the server in order")
            self._stage.drain_server()

    def _start_server(self) -> None:
        fault = ""
        if self._random.random() < 0.4:
            point = self._random.choice(list(FAULTS))
            fault = f"{point}:{self._random.randint(1, FAULTS[point])}"
        self._stage.start_server(fault)

    def _kill_worker(self) -> None:
        player = self._random.choice(self._stage.team.workers)
        early = self._random.random() < 0.2  # before it has joined; else hardly any would ever train
        if player.running and (early or player in self._stage.joined):
            self._note("worker killed", f"kill {player.name}")
            self._stage.kill_worker(player)

    def _start_worker(self, player: Player) -> None:
        resume = self._random.random() < 0.65
        self._stage.say(f"start {player.name} {'from its checkpoint' if resume else 'afresh'}")
        self._stage.start_worker(player, resume=resume)

    def _sleep(self) -> None:
        player = self._random.choice(self._stage.team.workers)
        if player.running and not player.frozen:
            process, seconds = player.process, self._uniform(0.5, 12.0)
            self._note("sleep", f"{player.name} sleeps for {seconds:.1f} s")
            self._stage.freeze(player, True)
            self._in(seconds, lambda: self._stage.freeze(player, False) if player.process is process else None)

    # -- links --

    def _cut(self) -> None:
        name, link = self._link()
        some, reset = link.open, self._random.random() < 0.7
        chosen = self._random.sample(some, 1) if some and self._random.random() < 0.5 else some
        cut = link.cut(*chosen, reset=reset)
        self._ended += 0 if reset else cut
        self._note("cut", f"cut {name}: {cut} connections")

    def _cut_in_mid_frame(self) -> None:
        name, link = self._link()
        way = self._random.choice((link.up, link.down))
        way.cut_after = self._random.randint(0, 60_000)
        self._note("cut in mid-frame", f"{name} is going to be cut")

    def _stall(self) -> None:
        name, link = self._link()
        seconds = self._uniform(0.5, 12.0)
        self._note("stall", f"{name} stalls for {seconds:.1f} s")
        link.stall()
        self._in(seconds, link.resume)

    def _slow(self) -> None:
        name, link = self._link()
        self._note("slow", f"{name} is slow")
        link.up.rate = link.down.rate = self._uniform(5e3, 1e5)

        def mend() -> None:
            link.up.rate = link.down.rate = 0.0

        self._in(self._uniform(1.0, 8.0), mend)

    def _orphan(self) -> None:
        name, link = self._link()
        self._note("orphan", f"{name} breaks on the worker's side only")
        self._ended += len(link.open)
        link.orphan()
        self._in(self._uniform(0.5, 6.0), link.deliver)

    def _refuse(self) -> None:
        name, link = self._link()
        self._note("refuse", f"{name} refuses new connections")
        link.refusing = True
        link.cut()

        def mend() -> None:
            link.refusing = False

        self._in(self._uniform(0.5, 6.0), mend)
