"""The state directory of a simulated server, in memory. What was not synced may be gone when the server dies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from diloco_proto.codec.formats import Floats
from diloco_server.recovery import capture, small_snapshot
from diloco_server.run import Run
from diloco_server.store import state_pb2 as pb

from .clock import Action, Clock, Timer


@dataclass(slots=True)
class Saved:
    """A snapshot, and how many records the journal had when it was begun."""

    snapshot: pb.Snapshot
    position: int
    arrays: dict[int, dict[str, Floats]] = field(default_factory=dict)

    @classmethod
    def begin(cls, run: Run, first_segment: int, segment: int, position: int) -> Saved:
        """`add` every fragment next."""
        return cls(small_snapshot(run, first_segment, segment), position)

    @classmethod
    def whole(cls, run: Run, segment: int, position: int) -> Saved:
        """Of a run that stands still."""
        saved = cls.begin(run, segment, segment, position)
        for fragment in run.layout.fragments:
            saved.add(run, fragment.index)
        return saved

    def add(self, run: Run, fragment: int) -> None:
        """A fragment as it is now."""
        self.snapshot.fragments.append(capture(run.model, fragment))
        arrays = run.parameters.state(fragment).arrays()
        self.arrays[fragment] = {name: array.copy() for name, array in arrays.items() if array.size}

    @property
    def version(self) -> int:
        """The highest of a fragment."""
        return max(f.version for f in self.snapshot.fragments)

    def read(self, fragment: int) -> dict[str, Floats]:
        return {name: array.copy() for name, array in self.arrays[fragment].items()}


class Disk:
    """A journal in segments, and snapshots. A sync takes `sync_seconds`; one serves all who wait when it begins."""

    def __init__(self, clock: Clock, sync_seconds: float = 0.0) -> None:
        self.snapshots: list[Saved] = []
        self.run_id = ""
        """Of the run, without its lineage."""
        self.lineage = 0
        """How often the run went back to an earlier state."""
        self.segment = 1
        """Of the journal, that records go to now."""
        self._clock = clock
        self.sync_seconds = sync_seconds
        self._records: list[tuple[int, bytes, bytes]] = []
        """Segment, message and blob."""
        self._synced = 0
        self._waiting: list[tuple[int, Action]] = []
        self._timer: Timer | None = None

    @property
    def position(self) -> int:
        """Records so far."""
        return len(self._records)

    def append(self, record: pb.Record, blob: bytes = b"") -> None:
        self._records.append((self.segment, record.SerializeToString(), blob))

    def rotate(self) -> int:
        """Begin the next segment."""
        self.segment += 1
        return self.segment

    def when_synced(self, action: Action) -> None:
        """Once all records so far are on disk."""
        if not self.sync_seconds:
            self._synced = self.position
        if self.position <= self._synced:
            action()
            return
        self._waiting.append((self.position, action))
        if self._timer is None:
            self._sync()

    def _sync(self) -> None:
        position = self.position
        self._timer = self._clock.after(self.sync_seconds, lambda: self._end_sync(position))

    def _end_sync(self, position: int) -> None:
        self._synced, self._timer = position, None
        waiting, self._waiting = self._waiting, [w for w in self._waiting if w[0] > position]
        for at, action in waiting:
            if at <= position:
                action()
        if self._waiting and self._timer is None:
            self._sync()

    def crash(self, survive: float) -> int:
        """The server dies, and of the records that were not synced only this share is left, the oldest. Returns how
        many are lost."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._waiting = None, []
        before = self.position
        del self._records[self._synced + round(survive * (before - self._synced)) :]
        self._synced = self.position
        return before - self.position

    def replay(self, first_segment: int) -> Iterator[tuple[int, pb.Record, memoryview]]:
        """The records of the journal from a segment on."""
        for segment, message, blob in self._records:
            if segment >= first_segment:
                yield segment, pb.Record.FromString(message), memoryview(blob)
