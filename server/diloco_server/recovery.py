"""A run as it was: from a snapshot, and the records of the journal since. Pure, but for the arithmetic of its rounds.

What a restart brings back is all that was acknowledged: parameters and the state of their outer optimizer, open rounds
with the contributions that wait in them, who was in the run, and every worker's last counted contribution. Rounds that
were decided are computed again from their contributions, by the same kernels, to the same bits. Contributions that
were not complete are gone: their workers push them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import replace

from diloco_proto.codec import read_frame
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Manifest

from . import keeping
from .assembly import Assembly, Place, Work
from .members import MemberState
from .model import Model
from .outer import Bounds
from .round import Close, Contribution
from .run import Run
from .store import state_pb2 as disk
from .store.errors import CorruptJournal

Arrays = Callable[[int], dict[str, Floats]]
"""Reads the arrays of a fragment: theta, and of those that have it momentum, residual, buffer."""


def capture(model: Model, fragment: int) -> disk.FragmentState:
    """The small part of a fragment's state, while its arrays are held still."""
    small = disk.FragmentState(
        fragment=fragment, version=model.parameters.version(fragment), digest=model.parameters.digest(fragment)
    )
    if fragment >= model.layout.num_scheduled:
        return small
    outer, rounds = model.parameters.state(fragment), model.rounds
    bounds = outer.bounds
    weights, current = rounds.weights[fragment], rounds.round(fragment)
    small.buffered, small.window = outer.buffered, outer.window
    if bounds is not None:
        small.bounds.extend((bounds.theta, bounds.momentum, bounds.residual, bounds.buffer, bounds.update))
    small.tokens = model.tokens_of(fragment)
    small.norms.extend(weights.norms)
    small.works.extend(weights.works)
    small.sizes.extend(weights.sizes)
    small.last_counted.extend(keeping.counted(c) for c in rounds.last_counted[fragment].values())
    if current is not None:
        small.expected.extend(sorted(current.expected))
        small.nobody = current.nobody
    return small


def small_snapshot(run: Run, first_segment: int = 0, segment: int = 0, *, clean: bool = False) -> disk.Snapshot:
    """All of a snapshot but its fragments and the time."""
    return disk.Snapshot(
        run_id=run.run_id,
        rounds_committed=run.rounds_committed,
        progress=run.progress(),
        members=[keeping.member(m) for m in run.members.all()],
        first_segment=first_segment,
        segment=segment,
        clean=clean,
        next_serial=run.model.pushes.next_serial,
    )


class Recovery:
    """Brings one Run back. Give it the records in order, then call `finish`."""

    def __init__(
        self,
        run: Run,
        manifest: Manifest,
        snapshot: disk.Snapshot,
        arrays: Arrays,
        threads: Executor | None = None,
        until: int | None = None,
    ) -> None:
        """`until`: no fragment goes beyond this version (a rollback).

        Raises CorruptJournal (from `take`) when the records do not lead where they once led.
        """
        self._run = run
        self._model = run.resume(manifest)
        self._threads = threads
        self._until = until
        self._assemblies: dict[int, Assembly] = {}
        self._bases: dict[int, int] = {}
        """Base version of each assembly, by serial."""
        self._staged: dict[int, Contribution] = {}
        self._nobody: set[int] = set()
        """Fragments whose open round began when no worker was ready."""
        self._expected: dict[int, set[str]] = {}
        self._last_serial = max(0, snapshot.next_serial - 1)
        self._segment = snapshot.segment
        self.replayed = 0
        """Outer steps that were made again."""
        for small in snapshot.fragments:
            self._restore(small, arrays(small.fragment))
        for member in snapshot.members:
            run.members.restore(keeping.member_of(member, 0.0))
        run.restore(snapshot.progress)

    def _restore(self, small: disk.FragmentState, arrays: dict[str, Floats]) -> None:
        model, fragment = self._model, small.fragment
        state = model.parameters.restore(fragment, small.version, small.digest, arrays)
        if fragment >= model.layout.num_scheduled:
            return
        state.buffered, state.window = small.buffered, small.window
        state.bounds = Bounds(*small.bounds) if small.bounds else None
        model.restore_tokens(fragment, small.tokens)
        weights = model.rounds.weights[fragment]
        weights.norms.extend(small.norms)
        weights.works.extend(small.works)
        weights.sizes.extend(small.sizes)
        model.rounds.last_counted[fragment].update((c.key.worker_id, keeping.counted_of(c)) for c in small.last_counted)
        self._expect(fragment, small.expected, nobody=small.nobody)

    # -- records --

    def take(self, record: disk.Record, blob: memoryview, segment: int | None = None) -> None:
        """One record, of this segment of the journal. Raises CorruptJournal."""
        match record.WhichOneof("body"):
            case "frame":
                self._frame(record.frame, blob)
            case "staged":
                self._stage(record.staged, old=segment is not None and segment < self._segment)
            case "closed":
                self._close(record.closed)
            case "published":
                self._published(record.published)
            case "member":
                self._member(record.member)
            case "progress":
                self._progress(record.progress)

    def _member(self, record: disk.Member) -> None:
        member = keeping.member_of(record, 0.0)
        self._run.members.restore(member)
        for fragment, expected in self._expected.items():
            if member.state is not MemberState.READY or member.hung:
                expected.discard(member.worker_id)
            elif self._run.opened and fragment in self._nobody and not self._has_contributions(fragment):
                expected.add(member.worker_id)

    def _has_contributions(self, fragment: int) -> bool:
        return any(c.key.fragment == fragment for c in self._staged.values())

    def _progress(self, record: disk.Progress) -> None:
        was_open = self._run.opened
        self._run.restore(record)
        if self._run.opened and not was_open:
            self._expected.clear()
            self._nobody.clear()

    def _frame(self, record: disk.Frame, blob: memoryview) -> None:
        self._last_serial = max(self._last_serial, record.serial)
        frame = read_frame(bytes(blob))
        assembly = self._assemblies.get(record.serial)
        if assembly is None:
            fragment = self._model.layout.fragments[record.fragment]
            assembly = self._assemblies[record.serial] = Assembly(fragment, frame.format, serial=record.serial)
            self._bases[record.serial] = record.base_version
        place = Place(frame.first_block, frame.num_blocks, frame.checksum)
        if place.first_block not in assembly.frames and assembly.claim([place]):
            assembly.add(place, frame)

    def _stage(self, record: disk.Staged, old: bool) -> None:
        """`old`: the record is from before the snapshot."""
        assembly = self._assemblies.pop(record.serial, None)
        if old and (assembly is None or not assembly.complete):
            self._bases.pop(record.serial, None)
            return  # frames of it were dropped: it was counted before the snapshot
        if assembly is None or not assembly.complete:
            raise CorruptJournal(
                f"the contribution of worker {record.key.worker_id!r} to fragment {record.key.fragment} is in the "
                "journal without all of its frames"
            )
        assembly.work = Work(record.tokens, record.steps, record.since_version)
        self._bases.pop(record.serial)
        self._staged[record.serial] = Contribution(
            key=keeping.key_of(record.key),
            frames=assembly.frames,
            payload=assembly.encoded(),
            tokens=record.tokens,
            steps=record.steps,
            since_version=record.since_version,
            norm=record.norm,
            arrived=0.0,
            serial=record.serial,
        )

    def _close(self, record: disk.Closed) -> None:
        fragment, version = record.fragment, self._model.parameters.version(record.fragment)
        members = [self._staged.pop(serial, None) for serial in record.serials]
        if record.base_version < version or self._beyond(record.base_version):
            return
        contributions = tuple(c for c in members if c is not None)
        if record.base_version > version or len(contributions) < len(members):
            raise CorruptJournal(
                f"the journal closes version {record.base_version} of fragment {fragment}, of which it does not hold "
                f"all contributions, or not all rounds since version {version}"
            )
        close = Close(
            fragment=fragment,
            base_version=record.base_version,
            contributions=contributions,
            weights=tuple(record.weights),
            scales=tuple(record.scales),
            closed_at=0.0,
            delay=record.delay,
        )
        self._run.redo(close, self._threads)
        self._expected.pop(fragment, None)
        self._nobody.discard(fragment)
        self.replayed += 1
        limit = record.base_version + 1 - self._run.config.staleness_limit(len(self._run.members.all()))
        for serial in [s for s, base in self._bases.items() if base < limit]:
            if self._assemblies[serial].fragment.index == fragment:
                del self._assemblies[serial], self._bases[serial]

    def _beyond(self, base_version: int) -> bool:
        return self._until is not None and base_version >= self._until

    def _published(self, record: disk.Published) -> None:
        fragment, parameters = record.fragment, self._model.parameters
        if record.version != parameters.version(fragment):
            return
        if record.digest != parameters.digest(fragment):
            raise CorruptJournal(
                f"version {record.version} of fragment {fragment}, computed again from the journal, is not what was "
                "published: was the state written by another version of diloco, or on broken memory?"
            )
        self._expect(fragment, record.expected, nobody=not record.expected)

    def _expect(self, fragment: int, workers: Iterable[str], *, nobody: bool) -> None:
        self._expected[fragment] = set(workers)
        (self._nobody.add if nobody else self._nobody.discard)(fragment)

    # -- the end --

    def finish(self, now: float) -> None:
        """Everything was read: rounds go on at the time `now`, when every lease begins anew."""
        run, model = self._run, self._model
        model.pushes.next_serial = max(self._last_serial + 1, model.pushes.next_serial)
        ready = {m.worker_id for m in run.members.in_state(MemberState.READY)}
        for member in run.members.all():
            member.seen = member.moved = now
        run.recovered()
        if run.opened:
            for fragment in range(model.layout.num_scheduled):
                if fragment not in self._expected:
                    self._open_anew(fragment, ready)
                expected = ready & self._expected[fragment]
                model.rounds.expect(fragment, expected, now, nobody=fragment in self._nobody)
            for contribution in self._staged.values() if self._until is None else ():
                model.rounds.restage(replace(contribution, arrived=now), now)

    def _open_anew(self, fragment: int, ready: set[str]) -> None:
        """A round opens only now. That is kept, as of any other: after one more restart it is not to wait for those
        who join from now on."""
        version, digest = self._model.parameters.version(fragment), self._model.parameters.digest(fragment)
        self._run.records.append(keeping.published(fragment, version, digest, False, sorted(ready)))
        self._expect(fragment, ready, nobody=not ready)
