"""The link of one rank of an island to its run. The leader has the session; what that brings is taken in by all ranks
at their meetings, so that a rank's Link is at any step what every other's is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format, digest
from diloco_proto.errors import ServerUnreachable, StateMismatch

from ..captured import Captured
from ..courier import CLOSE_SECONDS, Courier
from ..fetching import SNAPSHOT_TRIES, unfit_snapshot
from ..first import First
from ..flights import Base
from ..link import Link
from ..session import Membership, Session
from ..trainer import Shard
from ..transport import Transport
from .binding import IslandBinding
from .council import Council, Word, events_of
from .courier import NOTHING, IslandCourier
from .ledger import Fetched, Verdict, judge
from .ranks import Island

T = TypeVar("T")

log = logging.getLogger("diloco")


class NoSession:
    """What a rank has that does not lead: the name of its worker."""

    def __init__(self, worker_id: str, generation: int, former_run: str) -> None:
        self.worker_id = worker_id
        self.generation = generation
        self.run_id = former_run

    def start(self) -> None: ...
    def stay(self) -> None: ...
    def say(self, request: pb.SessionRequest) -> None: ...
    def close(self, reason: str, timeout: float = 5.0) -> None: ...


class IslandLink(Link):
    """Of one rank. Worker id and generation are the same on all."""

    def __init__(
        self,
        island: Island,
        transport: Transport,
        binding: IslandBinding,
        worker_id: str,
        generation: int,
        former_run: str = "",
    ) -> None:
        self._island = island
        self._council = Council(island)
        self._reports: list[tuple[int | None, float | None]] = []
        self._told_moved = [0, 0]
        self._moved = [[0, 0]] * island.size
        """Bytes up and down, by rank; of the leader none, who counts its own."""
        self._ends_at: float | None = None
        """When this machine, or another of the island, is taken away, by the council's clock."""
        self._doing: threading.Thread | None = None
        super().__init__(transport, binding, worker_id, generation, former_run)
        self.log = self._council.log
        self._council.seat(self)

    def _new_session(self, worker_id: str, generation: int) -> Membership:
        if not self._island.leads:
            return NoSession(worker_id, generation, self._former_run)
        event = self._council.event
        return Session(
            self._transport,
            worker_id,
            generation,
            self._binding.manifest,
            former_run=self._former_run,
            beat=self._beat,
            on_welcome=lambda welcome: event("welcome", welcome.SerializeToString()),
            on_event=lambda message: event("event", message.SerializeToString()),
            on_lost=lambda: event("lost"),
            on_fatal=self._council.fail,
        )

    def _beat(self) -> pb.Heartbeat:
        """With the bytes of all ranks."""
        beat = self.trainer.beat()
        beat.bytes_up += sum(up for up, _ in self._moved)
        beat.bytes_down += sum(down for _, down in self._moved)
        return beat

    def _new_courier(self, uplink: Format) -> Courier:
        if self._courier is not None:
            self._courier.close()
        self._council.unseat(self)
        courier = IslandCourier(self._transport, self._binding, uplink, self._identity, self._council)
        self._council.seat(self)  # after the courier: what transfers have come to is of before these events
        return courier

    @property
    def run_id(self) -> str:
        """Of the last welcome that all ranks have heard of."""
        return self._welcome.run_id if self._welcome is not None else self._former_run

    def close(self, reason: str) -> None:
        super().close(reason)
        if self._doing is not None:
            self._doing.join(CLOSE_SECONDS)
        self._island.close()

    # -- what the training thread asks --

    def join(self, connect_timeout: float) -> int:
        return super().join(self.of_first(connect_timeout))

    def sync(self, step: int) -> None:
        self._island.step = step
        self._council.meet("step")

    def report(self, tokens: int | None, loss: float | None) -> None:
        self._reports.append((tokens, loss))

    @property
    def rank_shard(self) -> Shard:
        island, shard = self._island, self.shard
        # Not index·R + rank: beside islands of other sizes that would be a piece of their shares.
        return Shard(shard.index + shard.count * island.rank, shard.count * island.size)

    @property
    def notice_left(self) -> float | None:
        return None if self._ends_at is None else max(0.0, self._ends_at - self._council.clock)

    def anywhere(self, here: bool) -> bool:
        return any(self._island.share(here))

    def of_first(self, value: T) -> T:
        first: T = self._island.share(value)[0]
        return first

    def odd_one(self, value: Any) -> int | None:
        return self._island.odd_one(value)

    def digest(self, fragment: int, base: Base) -> int:
        first = self._binding.spans[fragment].first_block
        return int(sum(self._island.share(digest(base.theta, first))) % (1 << 64))

    def label(self, state: dict[str, Any]) -> dict[str, Any]:
        """Under a name of its own: torch.distributed.checkpoint takes what several ranks save under one name for the
        same."""
        return {f"rank{self._island.rank}": {"ranks": self._island.size, **state}}

    def unlabel(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return unlabelled(state, self._island)

    def do(self, work: Callable[[], T]) -> T:
        """The ranks meet while it is done, on a thread of its own, by each of them; none goes on before all have it.
        Raises what it raises on one of them, on all."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self._binding.use_device()
                results.append(work())
            except BaseException as error:
                errors.append(error)
            self._council.news()

        thread = self._doing = threading.Thread(target=run, name="diloco-do", daemon=True)
        thread.start()
        while self._council.meet("work", busy=thread.is_alive()):
            self._council.rest()
        self._island.agree(errors[0] if errors else None)
        return results[0]

    # -- meetings --

    def say(self) -> dict[str, Any]:
        word: dict[str, Any] = {}
        if self._reports:
            tokens = [t for t, _ in self._reports if t is not None]
            losses = [x for _, x in self._reports if x is not None]
            word["report"] = (sum(tokens) if tokens else None, losses[-1] if losses else None)
            self._reports.clear()
        counters = self._transport.counters
        moved = [counters.bytes_up, counters.bytes_down]
        if moved != self._told_moved and not self._island.leads:
            self._told_moved = word["moved"] = moved
        left = self.trainer.notice_left
        if left is not None and self._ends_at is None:
            word["notice"] = left
        return word

    def hear(self, words: Sequence[Word]) -> None:
        reports = [word["report"] for word in words if "report" in word]
        if reports:
            tokens = [t for t, _ in reports if t is not None]
            losses = [x for _, x in reports if x is not None]
            self.trainer.note(sum(tokens) if tokens else None, sum(losses) / len(losses) if losses else None)
        notices = [word["notice"] for word in words if "notice" in word]
        if notices and self._ends_at is None:
            self._ends_at = self._council.clock + min(notices)
        self._moved = [word.get("moved", former) for word, former in zip(words, self._moved, strict=True)]
        for kind, body in events_of(words):
            if kind == "welcome":
                self._on_welcome(pb.Welcome.FromString(body))
            elif kind == "event":
                self._on_event(pb.SessionEvent.FromString(body))
            else:
                self._on_lost()

    # -- joining --

    def _reach(self, timeout: float) -> None:
        if self._island.speaks:
            super()._reach(timeout)

    def _await(self, condition: Callable[[], bool], timeout: float | None = None) -> None:
        began = self._council.clock

        def late() -> bool:
            return self._fatal is not None or (timeout is not None and self._council.clock - began > timeout)

        if self._council.wait(condition, late):
            return
        if self._fatal is not None:
            raise self._fatal.with_traceback(None) from None
        raise ServerUnreachable(
            f"{self._transport.address} accepted a connection, but no diloco-server answered within {timeout:.0f} s"
        )

    def _new_first(self, courier: Courier) -> First:
        return IslandFirst(self._island, self._transport, self._binding, courier, self._identity, self.do)


class IslandFirst(First):
    """Each rank seeds and fetches its own part; together they look whether it is what the server has."""

    def __init__(self, island: Island, *others: Any) -> None:
        super().__init__(*others)
        self._island = island

    def _seed(self, run_id: str, fragment: int, local: Captured) -> Base:
        if not self._binding.spans[fragment].num_blocks:
            return Base(0, NOTHING)
        return super()._seed(run_id, fragment, local)

    def _is(self, base: Base, fragment: int, whole: int) -> bool:
        parts = self._parts(Base(base.version, base.theta, whole), fragment)
        return judge(parts) is Verdict.SOUND

    def _fetch(self, fragment: int) -> Base:
        tries, newest = 0, 0
        base: Base | None = None
        while tries < SNAPSHOT_TRIES:
            if base is None or base.version < newest:  # else only the others have to come up
                base = self._do(partial(self._fetch_part, fragment))
            else:
                self._do(lambda: None)
            parts = self._parts(base, fragment)
            verdict, newest = judge(parts), max(part.version for part in parts)
            if verdict is Verdict.SOUND:
                return Base(newest, base.theta, parts[0].announced)
            if verdict is Verdict.DAMAGED:
                base, tries = None, tries + 1
        raise unfit_snapshot(fragment)

    def _fetch_part(self, fragment: int) -> Base:
        if not self._binding.spans[fragment].num_blocks:
            return Base(0, NOTHING)
        return super()._fetch(fragment)

    def _parts(self, base: Base, fragment: int) -> list[Fetched]:
        """What the owners have of a fragment."""
        span = self._binding.spans[fragment]
        said = self._island.share((base.version, digest(base.theta, span.first_block), base.announced))
        return [Fetched(*said[rank]) for rank in sorted(self._island.owners(span.fragment.num_blocks))]


def unlabelled(state: Mapping[str, Any], island: Island) -> Mapping[str, Any]:
    """Of what the ranks of an island have saved, the state of this one. Raises StateMismatch."""
    mine = state.get(f"rank{island.rank}")
    if not isinstance(mine, Mapping):
        raise StateMismatch(
            f"this state has nothing of rank {island.rank}: it is of a worker of one process, or of an island of fewer "
            f"ranks than {island.size}. Start as many ranks as saved it, or join without it"
        )
    if mine.get("ranks") != island.size:
        raise StateMismatch(
            f"this state is of an island of {mine.get('ranks')} ranks and this one has {island.size}: each rank has "
            "saved its own part. Start as many ranks as saved it, or join without it"
        )
    return mine
