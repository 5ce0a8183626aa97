"""Keeps a simulated run on its disk, as the server's Keeper does."""

from __future__ import annotations

from collections.abc import Callable

from diloco_proto import outer_pb2 as pb
from diloco_server import keeping
from diloco_server.pushes import Ticket
from diloco_server.run import Run
from diloco_server.store import state_pb2 as state

from .clock import Action, Clock, Gate
from .disk import Disk, Saved


class VirtualKeeper:
    """Of one process of the server; `gate` is that of the process. `saved` is called when a snapshot is complete."""

    def __init__(self, disk: Disk, run: Run, clock: Clock, gate: Gate, saved: Callable[[], None]) -> None:
        self._disk = disk
        self._run = run
        self._clock = clock
        self._gate = gate
        self._saved = saved
        self._started = self._beginning = self._saving = False
        self._segment = self._oldest = 0
        self._segments: dict[int, int] = {}
        """Segment of the first frame of each contribution that may still be needed."""
        run.hold_seed = not disk.snapshots

    @property
    def position(self) -> int:
        """Of the last record of what has happened so far: if it is on disk, so is all of that."""
        if self._started:
            return self._disk.position + len(self._run.records)
        return len(self._run.members.all()) if self._beginning else 0

    def start(self, oldest_segment: int = 0) -> None:
        """Everything that was kept before has been read: records are kept from now on."""
        self._segment = self._disk.rotate()
        self._oldest = oldest_segment or self._segment
        self._started = True
        for member in self._run.members.all():
            self._disk.append(state.Record(member=keeping.member(member)))
        self._disk.append(state.Record(progress=self._run.progress()))

    def keep(self) -> None:
        """What the run leaves to be kept."""
        records, self._run.records = self._run.records, []
        if self._started:
            for record in records:
                self._disk.append(record)

    def keep_frame(self, ticket: Ticket, frame: bytes) -> None:
        """A frame of a contribution has come."""
        if self._started and ticket.header.purpose == pb.PURPOSE_CONTRIBUTION:
            self._segments.setdefault(ticket.assembly.serial, self._segment)
            self._disk.append(keeping.frame(ticket), frame)

    def when_durable(self, action: Action) -> None:
        """Once all that was kept so far is on disk; lost with the process."""
        if self._started:
            self._disk.when_synced(lambda: self._gate(action))
        else:
            action()

    def begin(self, then: Action) -> None:
        """The run has all of its first parameters: they are kept before anybody is told."""
        if self._beginning or not (self._run.can_begin and self._run.hold_seed):
            return
        self._beginning = True
        saved = Saved.whole(self._run, self._disk.segment + 1, 0)

        def end() -> None:
            self._disk.run_id = self._run.run_id
            self._disk.snapshots.append(saved)
            self.start()
            then()

        self._clock.after(self._disk.sync_seconds, lambda: self._gate(end))

    def snapshot(self, pause: Callable[[], float]) -> None:
        """Keep the run as it is, one fragment after the other, while it goes on."""
        if not self._started or self._saving:
            return
        self._saving = True
        known = [self._segments.get(serial, self._oldest) for serial in self._run.serials()]
        self._segment = self._disk.rotate()
        saved = Saved.begin(self._run, min([self._segment, *known]), self._segment, self._disk.position)
        left = [f.index for f in self._run.layout.fragments]

        def go_on() -> None:
            if left:
                saved.add(self._run, left.pop(0))
                self._clock.after(pause(), lambda: self._gate(go_on))
            else:
                self.when_durable(end)

        def end() -> None:
            self._saving = False
            self._disk.snapshots.append(saved)
            self._saved()

        go_on()
