"""A run that is brought back from what it left on disk is the run that it was."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from driven_run import MANIFEST, Sim
from raw_worker import frames_of, header

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import read_frame
from diloco_proto.codec.formats import Floats
from diloco_server import keeping
from diloco_server.pushes import Ticket
from diloco_server.recovery import Recovery, capture, small_snapshot
from diloco_server.run import Run
from diloco_server.store import state_pb2 as disk

Journal = list[tuple[disk.Record, bytes]]


class Disk:
    """What a driven run leaves: a snapshot of its first moment, or of a later one, and the records since."""

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.save()

    def save(self) -> None:
        run = self.sim.run
        self.keep()
        waiting = {c.serial for c in run.rounds.waiting()}
        self.journal: Journal = [(r, b) for r, b in getattr(self, "journal", []) if _serial(r) in waiting]
        self.snapshot = small_snapshot(run)
        self.arrays: dict[int, dict[str, Floats]] = {}
        for fragment in run.layout.fragments:
            self.snapshot.fragments.append(capture(run.model, fragment.index))
            arrays = run.parameters.state(fragment.index).arrays()
            self.arrays[fragment.index] = {n: a.copy() for n, a in arrays.items() if a.size}

    def keep(self) -> None:
        records, self.sim.run.records = self.sim.run.records, []
        if hasattr(self, "journal"):
            self.journal += [(record, b"") for record in records]

    def push(self, worker: str, values: Floats, fragment: int, frames: Sequence[bytes] = (), **fields) -> pb.Outcome:
        """As `Sim.push`, and its frames are kept."""
        frames = frames_of(values)
        run = self.sim.run
        message = header(worker, fragment, frames, values.size // 64, **fields)
        ticket = run.begin_push(message)
        if not isinstance(ticket, Ticket):
            return ticket
        for place, frame in zip(ticket.places, frames, strict=True):
            ticket.assembly.add(place, read_frame(frame))
            self.journal.append((keeping.frame(ticket), frame))
        outcome = run.finish_push(ticket, self.sim.now)
        self.keep()
        self.sim.settle()
        self.keep()
        return outcome

    def recover(self, until: int | None = None, upto: int | None = None) -> Run:
        run = Run(self.sim.run.config, run_id=self.sim.run.run_id)
        copies = {f: {n: a.copy() for n, a in arrays.items()} for f, arrays in self.arrays.items()}
        recovery = Recovery(run, MANIFEST, self.snapshot, copies.__getitem__, until=until)
        for record, blob in self.journal[:upto]:
            recovery.take(disk.Record.FromString(record.SerializeToString()), memoryview(blob))
        recovery.finish(self.sim.now)
        return run


def _serial(record: disk.Record) -> int | None:
    body = record.WhichOneof("body")
    return getattr(record, body).serial if body in ("frame", "staged") else None


def bits(run: Run) -> object:
    """All that must be the same."""
    states = [run.parameters.state(f.index) for f in run.layout.fragments]
    rounds = [run.rounds.round(f.index) for f in run.layout.scheduled]
    return (
        run.run_id,
        [v.SerializeToString() for v in run.parameters.versions()],
        [{n: a.tobytes() for n, a in s.arrays().items()} for s in states],
        [(s.buffered, s.window if s.buffered else 0) for s in states],
        [(r.version, {w: (c.key, c.frames, c.tokens, c.norm) for w, c in r.contributions.items()}) for r in rounds],
        [r.expected for r in rounds],
        run.rounds.last_counted,
        [(list(w.norms), list(w.works), list(w.sizes)) for w in run.rounds.weights],
        [(m.worker_id, m.generation, m.state, m.shard, m.counted, m.done) for m in run.members.all()],
        (run.tokens, run.opened, run.stopped, run.members.shards, run.rounds_committed),
    )


SETTINGS = (
    {},
    {"outer_optimizer": "nesterov", "downlink_codec": "int4", "grace_seconds": "3"},
    {"outer_optimizer": "delayed-nesterov", "downlink_codec": "int4", "weighting": "tokens"},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", range(20))
def test_a_run_is_brought_back_to_the_bit_wherever_it_stopped(settings: dict[str, object], seed: int) -> None:
    rng = random.Random(seed)
    sim = Sim(**settings).enter("a", "b", "c")
    kept = Disk(sim)
    for _ in range(60):
        sim.now += rng.uniform(0, 2)
        worker, fragment = rng.choice("abcd"), rng.randrange(2)
        member = sim.run.members.known(worker)
        match rng.random():
            case x if x < 0.1 and member is not None and member.live:
                sim.say(worker, rng.choice(("leave", "finishing")), generation=member.generation)
            case x if x < 0.25 or member is None or not member.live:
                sim.hello(worker, generation=rng.randint(1, 2) if member is None else member.generation)
                sim.say(worker, "ready", generation=sim.run.members.known(worker).generation)
            case x if x < 0.3:
                kept.save()
            case _:
                values = np.zeros(sim.run.layout.fragments[fragment].length, np.float32)
                values[:70] = np.random.default_rng(rng.getrandbits(30)).standard_normal(70)
                version = sim.run.parameters.version(fragment)
                base = max(0, version - rng.choice((0, 0, 0, 1)))
                kept.push(
                    worker,
                    values,
                    fragment,
                    base_version=base,
                    since_version=base,
                    tokens=rng.randint(1, 9),
                    generation=member.generation,
                )
        kept.keep()
        assert bits(kept.recover()) == bits(sim.run)
    assert sim.run.rounds_committed > 3


def test_a_round_that_was_decided_and_not_made_is_made() -> None:
    sim = Sim().enter("a")
    kept = Disk(sim)
    kept.push("a", np.ones(128, np.float32) * np.r_[np.ones(100), np.zeros(28)].astype(np.float32), 0)
    kinds = [r.WhichOneof("body") for r, _ in kept.journal]
    assert kinds == ["frame", "staged", "closed", "published"]
    for upto in (3, 4):
        assert bits(kept.recover(upto=upto)) == bits(sim.run)
    staged = kept.recover(upto=2)
    assert staged.parameters.version(0) == 0
    assert [c.key.worker_id for c in staged.rounds.waiting()] == ["a"]
    assert [c.fragment for c in staged.due(sim.now)] == [0], "and it is due at once"


def test_a_run_goes_back_to_an_earlier_version() -> None:
    sim = Sim().enter("a")
    kept = Disk(sim)
    before = {}
    for version in range(4):
        before[version] = bits(sim.run)[2]
        for fragment in range(2):
            values = np.zeros(sim.run.layout.fragments[fragment].length, np.float32)
            values[:70] = version + 1
            kept.push("a", values, fragment, base_version=version, since_version=version)
    assert sim.versions() == [4, 4]
    back = kept.recover(until=2)
    assert [v.version for v in back.parameters.versions()] == [2, 2]
    assert bits(back)[2] == before[2]
    assert not back.rounds.waiting()


def test_no_contribution_gets_the_serial_of_one_before_the_snapshot() -> None:
    """A rollback to an older snapshot reads both."""
    sim = Sim().enter("a")
    kept = Disk(sim)
    kept.push("a", np.ones(128, np.float32), 0)
    kept.save()
    assert not kept.journal
    assert kept.recover().model.pushes.next_serial == sim.run.model.pushes.next_serial > 1
