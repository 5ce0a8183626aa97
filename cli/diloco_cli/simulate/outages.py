"""What befalls the server's process: it is killed and started again, perhaps from an earlier state."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from diloco_server.store.errors import CorruptJournal

from .broken import BrokenPromise
from .disk import Disk
from .revival import Back

if TYPE_CHECKING:
    from .world import World

SHARE = 0.4
"""Of the runs: the others keep nothing on disk."""

KINDS = ("server killed", "server killed, records lost", "server rolled back", "server back at a snapshot")


class Outages:
    """Of one world. They come from a random stream of their own: without any, a run is the same as if there were no
    such thing."""

    def __init__(self, world: World) -> None:
        self._world = world
        setting = world.setting
        self._rng = random.Random(f"outages {setting.seed}")
        self.disk: Disk | None = None
        if self._rng.random() < SHARE:
            sync = self._rng.choice((0.0, 0.0, 0.02, 0.2)) * setting.period
            self.disk = Disk(world.clock, sync * self._rng.random())

    def plan(self) -> None:
        """Decide when what happens."""
        if self.disk is None:
            return
        clock, rng, duration = self._world.clock, self._rng, self._world.setting.duration
        for _ in range(rng.randint(0, 4)):
            clock.after(rng.random() * duration, self._snapshot)
        for _ in range(rng.choice((1, 2, 2, 3))):
            clock.after(rng.random() * duration, self._kill)

    def heal(self) -> None:
        """Undo what lasts."""
        if not self._world.server.up:
            self._start(None)

    def _snapshot(self) -> None:
        pause = self._rng.choice((0.0, 0.02, 0.2)) * self._world.setting.period
        self._world.server.snapshot(lambda: pause * self._rng.random())

    def _kill(self) -> None:
        world, rng = self._world, self._rng
        server, lease = world.server, world.setting.config.lease_seconds
        if world.healing or not server.up:
            return
        assert self.disk is not None
        if not self.disk.snapshots:
            world.clock.after(0.2 * world.setting.period, self._kill)  # it has nothing yet to come back with
            return
        lost = server.kill(rng.choice((0.0, 0.0, 1.0, rng.random())))
        name = KINDS[1] if lost else KINDS[0]
        world.faults.note(name)
        for worker in world.alive():
            worker.link.reset(rng.choice((0.0, 0.0, rng.random() * 0.6 * lease)))
        down = rng.choice((0.0, rng.random() * 0.3 * lease, rng.random() * 2 * lease))
        back = self._back() if rng.random() < 0.25 else None
        world.clock.after(down, lambda: self._start(back))

    def _back(self) -> Back:
        """To a version that some snapshot leads to, or to the newest snapshot."""
        assert self.disk is not None
        if self._rng.random() < 0.4:
            return Back(None)
        run = self._world.server.run
        newest = max(run.parameters.version(f.index) for f in run.layout.scheduled)
        oldest = min(saved.version for saved in self.disk.snapshots)
        return Back(self._rng.randint(oldest, max(oldest, newest)))

    def _start(self, back: Back | None) -> None:
        world = self._world
        if world.server.up:
            return
        if back is not None:
            world.faults.note(KINDS[3] if back.version is None else KINDS[2])
        try:
            world.server.restart(back)
        except CorruptJournal as error:
            raise BrokenPromise(3, f"the server cannot come back from its disk: {error}") from error
        lease = world.setting.config.lease_seconds
        for worker in world.alive():
            worker.link.come_back(self._rng.choice((0.0, self._rng.random() * 0.3)) * lease)
