"""What the workers of a run are to be told: events of their sessions, in order, until the engine takes them away."""

from __future__ import annotations

from collections.abc import Iterable

from diloco_proto import outer_pb2 as pb

from . import admission
from .config import RunConfig
from .members import BEAT_SHARE, Member, Members
from .model import Committed, Model


class News:
    """Each method tells one worker, or all that live, one thing."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._events: list[tuple[str, pb.SessionEvent]] = []

    def take(self) -> list[tuple[str, pb.SessionEvent]]:
        """(worker id, event) of all that was not taken yet."""
        events, self._events = self._events, []
        return events

    def clear(self) -> None:
        self._events.clear()

    def welcome(self, member: Member, run_id: str, config: RunConfig, model: Model, *, seeded: bool) -> None:
        welcome = pb.Welcome(
            run_id=run_id,
            settings=config.to_pb(),
            layout_fingerprint=model.layout.fingerprint,
            seeded=seeded,
            heartbeat_seconds=config.lease_seconds * BEAT_SHARE,
            versions=model.parameters.versions() if seeded else [],
            standings=admission.standings(model, member.worker_id),
        )
        self._tell(member, pb.SessionEvent(welcome=welcome))

    def seed_wanted(self, member: Member) -> None:
        self._tell(member, pb.SessionEvent(seed_wanted=pb.SeedWanted()))

    def seeded(self, versions: Iterable[pb.FragmentVersion]) -> None:
        self._tell_all(pb.SessionEvent(seeded=pb.Seeded(versions=versions)))

    def opened(self, member: Member, start_step: int) -> None:
        self._tell(member, pb.SessionEvent(opened=pb.Opened(start_step=start_step)))

    def waiting(self, members: Iterable[Member], ready: int, needed: int) -> None:
        """That no round closes until more have joined."""
        for member in members:
            self._tell(member, pb.SessionEvent(waiting=pb.Waiting(ready=ready, needed=needed)))

    def pace(self, member: Member) -> None:
        self._tell(member, pb.SessionEvent(pace=pb.Pace(sync_every=member.sync_every)))

    def shard(self, member: Member) -> None:
        self._tell(member, pb.SessionEvent(shard=pb.Shard(index=member.shard, count=self._members.shards)))

    def shards(self) -> None:
        """There are more than before."""
        for member in self._members.live():
            self.shard(member)

    def stop(self, member: Member, reason: str) -> None:
        self._tell(member, pb.SessionEvent(stop=pb.Stop(reason=reason)))

    def stop_all(self, reason: str) -> None:
        self._tell_all(pb.SessionEvent(stop=pb.Stop(reason=reason)))

    def committed(self, committed: Committed, *, asynchronous: bool) -> None:
        """That a round is over, each with its fate."""
        for member in self._members.live():
            self._tell(member, pb.SessionEvent(committed=committed.event(member.worker_id, asynchronous)))

    def all_finished(self, member: Member, versions: Iterable[pb.FragmentVersion]) -> None:
        self._tell(member, pb.SessionEvent(all_finished=pb.AllFinished(versions=versions, flush=member.flush or 0)))

    def _tell_all(self, event: pb.SessionEvent) -> None:
        for member in self._members.live():
            self._tell(member, event)

    def _tell(self, member: Member, event: pb.SessionEvent) -> None:
        self._events.append((member.worker_id, event))
