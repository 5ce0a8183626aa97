"""Whom rounds wait for, and for how long (promise 4)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from diloco_proto import outer_pb2 as pb
from diloco_server.config import RunConfig
from diloco_server.members import MemberState
from diloco_server.run import Run

from .broken import BrokenPromise
from .clock import Clock

SLACK = 1e-6
"""Seconds."""


@dataclass(slots=True)
class Seen:
    """When something was last known of a worker, and how long the server had stood still by then."""

    at: float
    excused: float


@dataclass(slots=True)
class Open:
    """What is known of a fragment's open round."""

    version: int
    at_first: set[str]
    """Who was expected when it opened; if that was nobody, whoever came before the first contribution."""
    position: int = 0
    """Of the disk, when it opened."""
    nobody: bool = False
    expected: set[str] = field(default_factory=set)
    """At the last look."""
    quorum_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    opened_at: float = 0.0


@dataclass(slots=True)
class Patience:
    """Watches the open rounds of a run."""

    config: RunConfig
    run: Run
    clock: Clock
    _opened: bool = False
    _excused: float = 0.0
    _heard: dict[str, Seen] = field(default_factory=dict)
    _moved: dict[str, Seen] = field(default_factory=dict)
    _cut: dict[str, Seen] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)
    _ended: dict[str, int] = field(default_factory=dict)
    """Worker -> position on disk of its word."""
    _open: dict[int, Open] = field(default_factory=dict)
    _fill_times: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    _open_times: deque[float] = field(default_factory=lambda: deque(maxlen=16))

    # -- what is heard --

    def attached(self, worker_id: str, new_process: bool) -> None:
        self._heard[worker_id] = self._now()
        self._cut.pop(worker_id, None)
        if new_process or worker_id not in self._moved:
            self._moved[worker_id] = self._now()
            self._steps[worker_id] = 0
            self._ended.pop(worker_id, None)

    def cut(self, worker_id: str) -> None:
        self._cut[worker_id] = self._now()

    def heard(self, worker_id: str, request: pb.SessionRequest, position: int) -> None:
        body = request.WhichOneof("body")
        if body == "heartbeat":
            self._heard[worker_id] = self._now()
            if request.heartbeat.step > self._steps[worker_id]:
                self.moved(worker_id)
            self._steps[worker_id] = request.heartbeat.step
        elif body == "ready":
            self._ended.pop(worker_id, None)
            self.moved(worker_id)
        elif body in ("finishing", "finished"):
            self._ended.setdefault(worker_id, position)

    def moved(self, worker_id: str) -> None:
        """Its training goes on."""
        self._moved[worker_id] = self._now()

    def stood_still(self, seconds: float) -> None:
        self._excused += seconds + 0.2 * self.config.lease_seconds

    def staged(self, fragment: int) -> None:
        known = self._open.get(fragment)
        if known is not None:
            known.last_at = self.clock.now
            known.first_at = known.last_at if known.first_at is None else known.first_at

    def committed(self, fragment: int, counted: list[str]) -> None:
        """Its round is over."""
        known, current = self._open.pop(fragment), self.run.rounds.round(fragment)
        assert current is not None
        for worker_id in counted:
            self.moved(worker_id)
        if not current.expected - current.contributions.keys() and known.first_at is not None:
            assert known.last_at is not None
            self._fill_times.append(known.last_at - known.first_at)
        self._open_times.append(self.clock.now - known.opened_at)

    def restarted(self, run: Run, kept: int, position: int, *, afresh: bool) -> None:
        """The server is back, with what was on disk up to `kept`: every lease begins anew. `position`: see check.
        `afresh`: the run went back to an earlier state."""
        before, self.run, now = self._open, run, self._now()
        self._open, self._cut = {}, {}
        self._fill_times.clear()
        self._open_times.clear()
        self._ended = {worker_id: at for worker_id, at in self._ended.items() if at <= kept}
        members = run.members.all()
        self._heard = {m.worker_id: now for m in members}
        self._moved = dict(self._heard)
        self._steps = {m.worker_id: m.last.step for m in members}
        self._opened = run.opened
        for fragment in range(run.layout.num_scheduled if run.opened else 0):
            known = before.get(fragment)
            same = known is not None and known.position <= kept and not afresh
            self._reopen(fragment, known if same else None, position)
            if afresh:
                current = run.rounds.round(fragment)
                assert current is not None
                self._open[fragment].nobody = current.nobody  # it opened once, long ago

    def _reopen(self, fragment: int, before: Open | None, position: int) -> None:
        """A round after a restart. `before`: as it was, unless it has opened only now."""
        current, now = self.run.rounds.round(fragment), self.clock.now
        assert current is not None
        known = self._open[fragment] = Open(current.version, set(current.expected), opened_at=now)
        known.nobody, known.position = not current.expected, position
        if current.contributions:
            known.first_at = known.last_at = now
        if before is not None and before.version == current.version and not self.config.asynchronous:
            known.nobody, known.position = before.nobody, before.position
            self._check_same(fragment, before, joined_late=not before.nobody or known.first_at is not None)

    def _check_same(self, fragment: int, before: Open, joined_late: bool) -> None:
        """The round waits for the same workers as before. `joined_late`: not for whoever has come since."""
        current = self.run.rounds.round(fragment)
        assert current is not None
        ready = {m.worker_id for m in self.run.members.in_state(MemberState.READY)}
        forgotten, joined = before.expected & ready - current.expected, current.expected - before.at_first
        if forgotten:
            text = "after a restart a round no longer waits for it, as it did before"
            self._broken(fragment, min(forgotten), text)
        if joined and joined_late:
            text = "it joined after the round had opened, and after a restart the round waits for it"
            self._broken(fragment, min(joined), text)

    # -- the promise --

    def check(self, position: int) -> None:
        """The server has dealt with all that happened so far; its disk is at this position."""
        if not self.run.opened:
            return
        if not self._opened:
            self._opened = True
            for worker_id in self._moved:
                self.moved(worker_id)
        for fragment in range(self.run.layout.num_scheduled):
            self._check_round(fragment, position)

    def _check_round(self, fragment: int, position: int) -> None:
        current = self.run.rounds.round(fragment)
        assert current is not None
        known = self._open.get(fragment)
        if known is None:
            known = self._open[fragment] = Open(current.version, set(current.expected), opened_at=self.clock.now)
            known.nobody, known.position = not current.expected, position
            self._check_expected(fragment, current.expected)
        known.expected = set(current.expected)
        if self.config.asynchronous:
            return
        joined = current.expected - known.at_first
        if known.nobody and known.first_at is None:
            self._check_expected(fragment, joined)
            known.at_first |= joined
        elif joined:
            self._broken(fragment, min(joined), "it joined after the round had opened, and the round waits for it")
        missing = current.expected - current.contributions.keys()
        for worker_id in missing:
            self._check_awaited(fragment, worker_id)
        self._check_closes(fragment, known, len(missing))

    def _check_expected(self, fragment: int, expected: set[str]) -> None:
        for worker_id in expected:
            member = self.run.members.known(worker_id)
            if member is None or member.state is not MemberState.READY:
                self._broken(fragment, worker_id, "a new round waits for a worker that is not ready")

    def _check_awaited(self, fragment: int, worker_id: str) -> None:
        lease = self.config.lease_seconds
        if worker_id in self._ended:
            self._broken(fragment, worker_id, "a round waits for a worker that has finished")
        if self._since(self._heard[worker_id]) > lease + SLACK:
            self._broken(fragment, worker_id, "a round waits for a worker whose lease has run out")
        cut = self._cut.get(worker_id)
        if cut is not None and self._since(cut) > lease / 3 + SLACK:
            self._broken(fragment, worker_id, "a round waits for a worker that was cut off and has not come back")
        if self._open_times and not self.run.rounds.holds(worker_id):
            patience = max(3 * median(self._open_times), lease)
            if self._since(self._moved[worker_id]) > patience + SLACK:
                self._broken(fragment, worker_id, "a round waits for a worker whose training hangs")

    def _check_closes(self, fragment: int, known: Open, missing: int) -> None:
        """A round closes at once when it may."""
        current, floor = self.run.rounds.round(fragment), self._floor()
        assert current is not None
        count = len(current.contributions)
        if known.quorum_at is None and count >= max(floor, -(-len(current.expected) // 2)):
            known.quorum_at = self.clock.now
        if current.closing or count < floor:
            return
        if missing == 0:
            self._broken(fragment, "", "everybody has contributed, and the round stays open")
        if known.quorum_at is not None and self.clock.now > known.quorum_at + self._grace() + SLACK:
            self._broken(fragment, "", "quorum and grace are over, and the round stays open")

    def _floor(self) -> int:
        """Contributions without which no round closes."""
        live = self.run.members.live()
        if live and all(m.state in (MemberState.FINISHING, MemberState.FINISHED) for m in live):
            return 1
        return max(1, self.config.min_workers - len(self._ended))

    def _grace(self) -> float:
        if self.config.grace is not None:
            return self.config.grace
        return max(2.0, median(self._fill_times)) if self._fill_times else 2.0

    def _now(self) -> Seen:
        return Seen(self.clock.now, self._excused)

    def _since(self, seen: Seen) -> float:
        """Seconds since then, without those in which the server stood still."""
        return self.clock.now - seen.at - (self._excused - seen.excused)

    def _broken(self, fragment: int, worker_id: str, text: str) -> None:
        raise BrokenPromise(4, text, worker_id=worker_id, fragment=fragment)
