"""A worker in virtual time: its life around the real Replica, from its join to its end."""

from __future__ import annotations

from collections.abc import Callable

from diloco_client.flights import Base
from diloco_client.replica import Replica, Rules
from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import DilocoError
from diloco_proto.schedule import Schedule

from .clock import Clock, Gate, Life, Task
from .line import Line
from .link import VirtualLink
from .parcels import Traffic
from .server import VirtualServer
from .toy import Trainer


class VirtualWorker:
    """One process of one worker, from its join to its end.

    `step_seconds` gives the time that the next inner step takes; `stride` is how many may be taken as one event while
    nothing is due; `wire_scale` multiplies what the line has to carry. `steps` is how many inner steps it takes
    before it ends by finishing; None for as many as the run lasts.
    """

    def __init__(
        self,
        clock: Clock,
        server: VirtualServer,
        line: Line,
        trainer: Trainer,
        worker_id: str,
        generation: int,
        *,
        step_seconds: Callable[[], float],
        steps: int | None = None,
        together: bool = False,
        flush: bool = True,
        stride: int = 1,
        parts: int = 1,
        wire_scale: float = 1.0,
    ) -> None:
        self.worker_id = worker_id
        self.generation = generation
        self.trainer = trainer
        self.line = line
        self.steps = steps
        self.together = together
        self.flush = flush
        """Whether it ends by flushing; else it just leaves."""
        self.replica: Replica | None = None
        self.stall_seconds = 0.0
        self.compute_seconds = 0.0
        self.stalled_since: float | None = None
        self.joined_at: float | None = None
        """When it began to train."""
        self.gate = line.worker
        self.training = Gate(self.gate)
        """Of its training alone; heartbeats pass it by."""
        self.dead = False
        self._clock = clock
        self._watch = server.watch
        self._stride = stride
        self._step_seconds = step_seconds
        self.link = VirtualLink(
            clock,
            server,
            line,
            self.gate,
            trainer,
            worker_id,
            generation,
            changed=self._poke,
            failed=self._stop,
            beat=self._heartbeat,
            parts=parts,
            wire_scale=wire_scale,
        )
        self._task = Task(clock, self._live(), self.training)
        self._heart = Task(clock, self._beat(), self.gate)

    # -- its life --

    def _live(self) -> Life:
        link = self.link
        link.connect()
        yield lambda: link.has_snapshots
        for fragment in range(len(link.layout.fragments)):
            self.trainer.adopt(fragment, link.snapshots[fragment].theta)
        link.begin()
        yield lambda: link.start_step is not None
        self.joined_at = self._clock.now
        yield from self._train()
        if self.flush:
            yield from self._flush()
        link.say(pb.SessionRequest(heartbeat=self._heartbeat()))
        link.say(pb.SessionRequest(leave=pb.Leave(reason="done")))
        link.ended = True
        self._heart.kill()

    def _train(self) -> Life:
        link, settings = self.link, self.link.settings
        buffers = link.layout.num_scheduled > link.layout.num_trained
        schedule = Schedule(settings.sync_every, link.layout.num_trained, settings.overlap_steps, buffers)
        rules = Rules(schedule=schedule, alpha=settings.mixing_alpha, error_feedback=settings.error_feedback)
        replica = self.replica = Replica(link.layout, rules, self.trainer, link, link.start_step or 0)
        while not link.stopped and (self.steps is None or replica.taken < self.steps):
            left = self._stride if self.steps is None else min(self._stride, self.steps - replica.taken)
            ahead = max(1, min(left, replica.steps_until_due()))
            seconds = sum(self._step_seconds() for _ in range(ahead))
            yield seconds
            self.compute_seconds += seconds
            if link.pace is not None:
                replica.set_pace(link.pace)
            for _ in range(ahead):
                self._watch.count("inner step")
                replica.report(self.trainer.step())
                due = replica.advance()
            for fragment in due:
                yield from self._wait(
                    lambda fragment=fragment: (  # type: ignore[misc]
                        not link.connected or not link.its_flights.awaited(fragment, held=link.held)
                    )
                )
            replica.merge()

    def _flush(self) -> Life:
        link, replica = self.link, self.replica
        assert replica is not None
        flights = link.its_flights
        replica.push_remainders()
        yield from self._wait(flights.staged)
        link.say(pb.SessionRequest(finishing=pb.Finishing()))
        while not flights.none_in_flight():
            yield from self._wait(flights.anything_ready)
            replica.merge(early=True)
            replica.push_remainders()
        if self.together:
            link.say(pb.SessionRequest(finished=pb.Finished(flush=1)))
            yield from self._wait(lambda: link.final is not None and flights.caught_up(link.final))
        replica.merge(early=True)
        replica.adopt_all()
        if self.together:
            self._watch.met(link)

    def _wait(self, condition: Callable[[], bool]) -> Life:
        """Wait, counted as stalled."""
        began = self.stalled_since = self._clock.now
        yield condition
        self.stall_seconds += self._clock.now - began
        self.stalled_since = None

    def _beat(self) -> Life:
        while True:
            yield self.link.heartbeat_seconds
            self.link.send(pb.SessionRequest(heartbeat=self._heartbeat()))

    def _heartbeat(self) -> pb.Heartbeat:
        replica = self.replica
        stalled = self.stall_seconds
        if self.stalled_since is not None:
            stalled += self._clock.now - self.stalled_since
        return pb.Heartbeat(
            step=replica.global_step if replica else 0,
            steps=replica.taken if replica else 0,
            train_seconds=self.compute_seconds + stalled,
            stall_seconds=stalled,
        )

    # -- from outside --

    @property
    def failure(self) -> DilocoError | None:
        return self.link.failure

    @property
    def over(self) -> bool:
        """It has ended, one way or the other."""
        return self.dead or self._task.over

    @property
    def done(self) -> bool:
        """It has ended by finishing, or by leaving."""
        return self._task.over and not self.dead and self.failure is None

    @property
    def bases(self) -> list[Base]:
        return list(self.link.bases)

    @property
    def traffic(self) -> Traffic:
        return self.link.traffic

    def kill(self, *, noticed: bool = True, lag: float | None = None) -> None:
        """As SIGKILL does, or as the machine's end does if the server does not notice."""
        self.dead = True
        self._stop()
        self.link.ended = True
        self.link.lose(noticed=noticed, lag=lag)
        self.gate.close_for_ever()

    def _stop(self) -> None:
        self._task.kill()
        self._heart.kill()

    def _poke(self) -> None:
        self._task.poke()
