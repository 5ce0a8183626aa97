"""A run driven by plain calls: its clock, its workers' messages, and what each was told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from raw_worker import flat, frames_of, header, hello, manifest_of

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import read_frame
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Manifest
from diloco_server import RunConfig
from diloco_server.checkpoint import InitialParameters
from diloco_server.parameters import snapshot_frames
from diloco_server.pushes import Ticket
from diloco_server.run import Run

SIZES = (100, 70)
MANIFEST = manifest_of(*SIZES)
PLAIN = {
    "sync_every": 4,
    "num_fragments": 2,
    "overlap_steps": 1,
    "uplink_codec": "fp32",
    "downlink_codec": "fp32",
    "outer_optimizer": "sgd",
    "outer_lr": 1.0,
    "weighting": "uniform",
    "grace_seconds": "inf",
    "lease_seconds": 10.0,
}
"""Such that theta becomes theta minus the mean of the contributions."""


def const(value: float, fragment: int = 0) -> Floats:
    return flat(np.full(SIZES[fragment], value, np.float32))


class Sim:
    """A run, its clock, and what each worker was told."""

    def __init__(self, *, init: InitialParameters | None = None, manifest: Manifest = MANIFEST, **changes) -> None:
        self.run = Run(RunConfig(**(PLAIN | changes)), init)
        self.manifest = manifest
        self._now = 0.0
        self._told: dict[str, list[pb.SessionEvent]] = defaultdict(list)

    @property
    def now(self) -> float:
        return self._now

    @now.setter
    def now(self, time: float) -> None:
        """Let time pass up to then, as the engine's timer does; what is due just then is left to the caller."""
        while (deadline := self.run.next_deadline()) is not None and deadline < time:
            self._now = max(self._now, deadline)
            self.settle()
        self._now = time

    def hello(self, worker: str, **fields) -> None:
        manifest = fields.pop("manifest", self.manifest)
        self.run.hello(hello(worker, manifest, **fields), self.now)
        self.settle()

    def told(self, worker: str) -> dict[str, object]:
        """What the worker was told since the last look, by kind."""
        news = self.run.news.take()
        for name, event in news:
            self._told[name].append(event)
        events, self._told[worker] = self._told[worker], []
        return {e.WhichOneof("body"): getattr(e, e.WhichOneof("body")) for e in events}

    def say(self, worker: str, what: str, generation: int = 1) -> None:
        getattr(self.run, what)(self.run.members.get(worker, generation), self.now)
        self.settle()

    def finish(self, worker: str, flush: int = 1) -> None:
        self.run.finished(self.run.members.get(worker, 1), flush, self.now)
        self.settle()

    def beat(self, worker: str, step: int = 0) -> None:
        self.run.hear(worker, 1, pb.SessionRequest(heartbeat=pb.Heartbeat(step=step)), self.now)

    def push(
        self, worker: str, values: Floats, fragment: int = 0, frames: Sequence[bytes] = (), **fields
    ) -> pb.Outcome:
        frames = frames or frames_of(values)
        message = header(worker, fragment, frames, values.size // 64, **fields)
        ticket = self.run.begin_push(message)
        if not isinstance(ticket, Ticket):
            return ticket
        for place, frame in zip(ticket.places, frames, strict=True):
            ticket.assembly.add(place, read_frame(frame))
        outcome = self.run.finish_push(ticket, self.now)
        self.settle()
        return outcome

    def contribute(self, worker: str, value: float = 1.0, fragment: int = 0, **fields) -> pb.Outcome:
        fields.setdefault("base_version", self.run.parameters.version(fragment))
        return self.push(worker, const(value, fragment), fragment, **fields)

    def seed(self, worker: str, fragment: int, value: float = 0.0, **fields) -> pb.Outcome:
        return self.push(worker, const(value, fragment), fragment, purpose=pb.PURPOSE_SEED, **fields)

    def settle(self) -> None:
        """What the engine does after anything has happened."""
        self.run.tick(self.now)
        for close in self.run.due(self.now):
            self.run.publish(self.run.commit(close), self.now)
        self.run.settle_finish()

    def at(self, now: float) -> None:
        self.now = now
        self.settle()

    def enter(self, *workers: str) -> Sim:
        """The workers join and are ready, as if all at the same moment; the first seeds zeros."""
        for worker in workers:
            self.hello(worker)
        if not self.run.seeded:
            for fragment in range(2):
                self.seed(workers[0], fragment)
        for worker in workers:
            self.say(worker, "ready")
            self.told(worker)
        for fragment in range(2) if self.run.opened and not self.run.config.asynchronous else ():
            current = self.run.rounds.round(fragment)
            assert current is not None
            current.expected.update(workers)
        return self

    def theta(self, fragment: int = 0) -> float:
        """The value that all of the fragment's parameters have."""
        snapshot = self.run.parameters.pin(fragment)
        frame = read_frame(pb.PullReply.FromString(next(snapshot_frames(snapshot, 0))).frame)
        self.run.parameters.unpin(snapshot)
        values = frame.codes.view(np.float32)[: SIZES[fragment]]
        assert (values == values[0]).all()
        return float(values[0])

    def versions(self) -> list[int]:
        return [v.version for v in self.run.parameters.versions()]

    def waits_for(self, fragment: int = 0) -> set[str]:
        found = self.run.rounds.round(fragment)
        assert found is not None
        return found.missing
