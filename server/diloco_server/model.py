"""What a run holds of its model: fragments with their global parameters, rounds, and pushes on their way in. Pure."""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import Executor
from dataclasses import dataclass

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import UnsupportedModel
from diloco_proto.manifest import Manifest, Role, build_layout

from .checkpoint import InitialParameters
from .config import RunConfig
from .footprint import check_fits
from .parameters import Parameters, Seed, Update
from .pushes import Pushes, Ticket
from .round import Close, Contribution, RoundRecord, Stage
from .rounds import Rounds
from .seeding import Seeding
from .weights import Weights

log = logging.getLogger("diloco.server")

_OUTCOME = {
    Stage.STAGED: pb.OUTCOME_STAGED,
    Stage.ALREADY_HAVE: pb.OUTCOME_ALREADY_HAVE,
    Stage.COUNTED: pb.OUTCOME_COUNTED,
    Stage.CLOSED: pb.OUTCOME_CLOSED,
    Stage.CONFLICT: pb.OUTCOME_CONFLICT,
}


@dataclass(frozen=True, slots=True)
class Committed:
    """A close whose outer step was computed, to be published."""

    close: Close
    """With the contributions that were counted: none, if they overflow together."""
    update: Update
    staged: tuple[Contribution, ...]

    @property
    def void(self) -> bool:
        """The contributions overflow together, and none was counted."""
        return not self.close.contributions

    def event(self, worker_id: str, asynchronous: bool) -> pb.Committed:
        """What a worker is told of it. A synchronous round settles whatever was, or still will be, pushed against its
        base; an asynchronous one settles the one contribution that it is made of."""
        base, fate = self.close.base_version, pb.FATE_NOT_COUNTED
        own = next((c.key.base_version for c in self.staged if c.key.worker_id == worker_id), None)
        if asynchronous:
            base, fate = (0, pb.FATE_UNSPECIFIED) if own is None else (own, fate)
        if any(c.key.worker_id == worker_id for c in self.close.contributions):
            fate = pb.FATE_COUNTED
        return pb.Committed(
            fragment=self.close.fragment,
            version=self.update.version,
            fate=fate,
            digest=self.update.digest,
            base_version=base,
        )


class Model:
    """What exists once the first worker has brought its manifest.

    Raises ManifestMismatch or NonFiniteParameter if the run begins from a file that does not fit.
    """

    def __init__(self, config: RunConfig, manifest: Manifest, init: InitialParameters | None) -> None:
        self._config = config
        self.manifest = manifest
        self.layout = build_layout(manifest, config.num_fragments, config.pattern)
        self.parameters = Parameters(self.layout, config.outer_settings())
        self.seeding = Seeding(self.layout, self.parameters)
        if init is not None:
            self.seeding.from_file(init, manifest, self.layout)
        self.rounds = Rounds(
            [self._weights(fragment.role) for fragment in self.layout.scheduled],
            min_workers=config.min_workers,
            grace=config.grace,
            asynchronous=config.asynchronous,
        )
        self.pushes = Pushes(self.layout, config.uplink)
        self._tokens = [0] * self.layout.num_scheduled

    @classmethod
    def fitting(cls, config: RunConfig, manifest: Manifest, init: InitialParameters | None) -> Model:
        """Also raises UnsupportedModel for one that this machine's memory cannot hold."""
        needed = 12 * sum(t.numel for t in manifest.tensors)
        try:
            check_fits(needed)
            return cls(config, manifest, init)
        except MemoryError as error:
            gib = min(needed, 1 << 99) / (1 << 30)
            raise UnsupportedModel(f"this server has not the {gib:.3g} GiB of memory that the model needs") from error

    def _weights(self, role: Role) -> Weights:
        limit = self._config.max_outer_grad_norm if role is Role.TRAINED else 0.0
        return Weights(uniform=self._config.weighting == "uniform", max_norm=limit)

    @property
    def tokens(self) -> int:
        """Tokens behind what every fragment has counted."""
        return min(self._tokens[: self.layout.num_trained])

    def tokens_of(self, fragment: int) -> int:
        """Tokens behind what the fragment has counted."""
        return self._tokens[fragment]

    def restore_tokens(self, fragment: int, tokens: int) -> None:
        self._tokens[fragment] = tokens

    def serials(self) -> set[int]:
        """Of the contributions whose frames may still be needed."""
        return self.pushes.serials() | {c.serial for c in self.rounds.waiting()}

    @property
    def complete_rounds(self) -> int:
        """Rounds that every trained fragment has had."""
        return min(self.parameters.version(p) for p in range(self.layout.num_trained))

    @property
    def outer_steps(self) -> int:
        """Of all fragments together."""
        return sum(self.parameters.version(f.index) for f in self.layout.scheduled)

    def end(self) -> str:
        """What the run has had, once that is all it was to have; else empty."""
        config, rounds = self._config, self.complete_rounds
        if 0 < config.stop_after_rounds <= rounds:
            return f"{rounds} rounds"
        if 0 < config.stop_after_tokens <= self.tokens:
            return f"{self.tokens} tokens"
        return ""

    def begin_push(self, header: pb.PushHeader, live: int) -> Ticket | pb.Outcome:
        """What a push announces: a Ticket to receive it, or its Outcome when nothing need be sent.

        `live` is the number of live workers. Raises InvalidContribution.
        """
        seed = header.purpose == pb.PURPOSE_SEED
        if seed and (self.seeding.done or not self.seeding.is_seeder(header.worker_id, header.generation)):
            return pb.Outcome(kind=pb.OUTCOME_ALREADY_HAVE, detail="this worker's seed is not needed")
        announced = self.pushes.read(header)
        if not seed:
            known = self.rounds.seen_before(announced.key, announced.frames)
            if known in (None, Stage.CLOSED) and self._too_long_away(header, live):
                return pb.Outcome(kind=pb.OUTCOME_RESYNC, version=self.parameters.version(header.fragment))
            if known is not None:
                return self._outcome(known, announced.fragment.index)
        return self.pushes.claim(announced)

    def _too_long_away(self, header: pb.PushHeader, live: int) -> bool:
        """The oldest of the steps dates from more than `max_away` rounds ago; asynchronously, each live worker makes
        a version a round."""
        versions = self.parameters.version(header.fragment) - header.since_version
        return versions > self._config.max_away * (max(1, live) if self._config.asynchronous else 1)

    def finish_push(self, ticket: Ticket, now: float, prepared: Seed | float | None) -> pb.Outcome:
        """All frames of the stream are in; `prepared` is `ticket.prepare()`, if it was called beforehand.

        Raises NonFiniteParameter.
        """
        header, key, assembly = ticket.header, ticket.announced.key, ticket.assembly
        if not self.pushes.holds(ticket):
            # Another stream completed it, or began anew with other bytes.
            if header.purpose == pb.PURPOSE_SEED:
                return pb.Outcome(kind=pb.OUTCOME_ALREADY_HAVE)
            known = self.rounds.seen_before(key, ticket.announced.frames)
            return self._outcome(known or Stage.CONFLICT, key.fragment)
        if not assembly.complete:
            return pb.Outcome(kind=pb.OUTCOME_PART_HELD, version=header.base_version)
        self.pushes.take(ticket)
        if prepared is None:
            prepared = ticket.prepare()
        if isinstance(prepared, Seed):
            self.seeding.take(key.fragment, prepared)
            if self.seeding.done:
                self.pushes.clear()
            return pb.Outcome(kind=pb.OUTCOME_SEEDED)
        assert prepared is not None
        contribution = Contribution(
            key=key,
            frames=assembly.frames,
            payload=assembly.encoded(),
            tokens=assembly.work.tokens,
            steps=assembly.work.steps,
            since_version=assembly.work.since_version,
            norm=prepared,
            arrived=now,
            serial=assembly.serial,
        )
        return self._outcome(self.rounds.stage(contribution, now), key.fragment)

    def _outcome(self, stage: Stage, fragment: int) -> pb.Outcome:
        return pb.Outcome(kind=_OUTCOME[stage], version=self.parameters.version(fragment))

    def commit(self, close: Close, threads: Executor | None = None) -> Committed:
        """The outer step of a close. Heavy; touches only its own fragment's parameters, so any thread may run it."""
        staged = close.contributions
        payloads = [c.payload for c in staged]
        update, counted = self.parameters.commit(
            close.fragment, payloads, close.weights, threads, scales=close.scales, delay=close.delay
        )
        if not counted:
            log.error(
                "fragment %d: the contributions of %s overflow together; none was counted",
                close.fragment,
                ", ".join(c.key.worker_id for c in staged),
            )
            close = dataclasses.replace(close, contributions=(), weights=(), scales=())
        return Committed(close, update, staged)

    def publish(self, committed: Committed, now: float) -> RoundRecord:
        """The new version is out; the caller opens the next round."""
        close = committed.close
        self.parameters.publish(close.fragment, committed.update)
        record = self.rounds.committed(close, now)
        self.pushes.drop_older(close.fragment, committed.update.version - self.rounds.staleness_limit)
        self._tokens[close.fragment] += sum(m.tokens for m in record.members)
        for member in (m for m in record.members if m.scale < 1.0):
            log.warning(
                "worker %r, fragment %d: its outer gradient has norm %.3g, more than %g times the usual, and was "
                "scaled down by %.3g; look at its data and its learning rate",
                member.worker_id,
                close.fragment,
                member.norm,
                self._config.max_outer_grad_norm,
                1 / member.scale,
            )
        return record
