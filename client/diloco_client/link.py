"""A worker's link to its run: joins it, seeds or adopts the global parameters, and holds the threads together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Encoded, Format, digest, pack_frames, warm_up
from diloco_proto.errors import DilocoError, InvalidContribution, ManifestMismatch, ServerUnreachable
from diloco_proto.manifest import Layout, Pattern, build_layout

from .binding import Binding
from .courier import Courier
from .flights import Base
from .messages import seed_header
from .session import Session
from .transport import Transport

log = logging.getLogger("diloco")


@dataclass(frozen=True, slots=True)
class Shard:
    """A worker's share of the data: `index` of `count`."""

    index: int
    count: int


class Link:
    """One worker in one run. `join` blocks until the run is open; afterwards `courier` carries the fragments."""

    def __init__(
        self, transport: Transport, binding: Binding, worker_id: str, beat: Callable[[], pb.Heartbeat]
    ) -> None:
        self._transport = transport
        self._binding = binding
        self._session = Session(
            transport,
            worker_id,
            time.time_ns(),
            binding.manifest,
            beat=beat,
            on_welcome=self._on_welcome,
            on_event=self._on_event,
            on_lost=self._on_lost,
            on_fatal=self._on_fatal,
        )
        self._changed = threading.Condition()
        self._welcome: pb.Welcome | None = None
        self._versions: dict[int, pb.FragmentVersion] | None = None
        self._seed_wanted = False
        self._start_step: int | None = None
        self._fatal: DilocoError | None = None
        self._final: dict[int, int] | None = None
        self._flushes = 0
        self._courier: Courier | None = None
        self.pace: int | None = None
        """H that the server wishes of this worker; None for the run's."""
        self.shard = Shard(0, 1)
        self.stopped = ""
        """Why the run has ended; empty while it has not."""

    @property
    def courier(self) -> Courier:
        assert self._courier is not None
        return self._courier

    @property
    def settings(self) -> pb.RunSettings:
        assert self._welcome is not None
        return self._welcome.settings

    @property
    def run_id(self) -> str:
        return self._session.run_id

    @property
    def worker_id(self) -> str:
        return self._session.worker_id

    @property
    def layout(self) -> Layout:
        return self._binding.layout

    def join(self, connect_timeout: float) -> int:
        """Join the run; returns the inner step from which this worker counts. Blocks until the run is open.

        Afterwards the model's parameters are the global ones. Raises ServerUnreachable, ManifestMismatch or
        another DilocoError.
        """
        self._transport.wait_until_up(connect_timeout, self._say_waiting)
        self._session.start()
        self._await(lambda: self._courier is not None, connect_timeout)
        warm_up({Format(self.settings.uplink_codec), Format(self.settings.downlink_codec), Format.FP32})
        seeds = self._seed_if_asked()
        bases = [self._base(index, seeds) for index in range(len(self.layout.fragments))]
        for index, base in enumerate(bases):
            self._binding.adopt(index, base.theta)
        self.courier.start(bases[: self.layout.num_scheduled])
        self._session.say(pb.SessionRequest(ready=pb.Ready()))
        self._await(lambda: self._start_step is not None)
        assert self._start_step is not None
        return self._start_step

    def ready(self) -> None:
        """The worker trains again after it had finished."""
        self._session.say(pb.SessionRequest(ready=pb.Ready()))

    def finishing(self) -> None:
        self._session.say(pb.SessionRequest(finishing=pb.Finishing()))

    def finished(self) -> None:
        """Wait for the others from now on; `everyone_finished` says when they have come."""
        self._final = None
        self._flushes += 1
        self._session.say(pb.SessionRequest(finished=pb.Finished(flush=self._flushes)))

    def everyone_finished(self) -> bool:
        """Every live worker has finished and this one holds, or has arriving, the final version of each fragment."""
        return self._final is not None and self.courier.caught_up(self._final)

    def close(self, reason: str) -> None:
        self._session.close(reason)
        if self._courier is not None:
            self._courier.close()
        self._transport.close()

    # -- joining --

    def _seed_if_asked(self) -> list[Base]:
        """Wait until the run has parameters, giving it this worker's when the server asks for them.

        It may ask again, when the first attempt came to nothing. Returns what was given last.
        """
        seeds: list[Base] = []
        while self._versions is None:
            self._await(lambda: self._versions is not None or self._seed_wanted)
            if self._seed_wanted and self._versions is None:
                self._seed_wanted = False
                try:
                    seeds = self._seed()
                except InvalidContribution as error:
                    log.warning("this worker's seed is no longer wanted: %s", error)
        return seeds

    def _seed(self) -> list[Base]:
        """Make this worker's parameters version 0 of the run."""
        bases = []
        log.info("seeding run %s with this worker's parameters", self.run_id)
        for fragment in self.layout.fragments:
            theta = self._binding.seed_values(fragment.index)
            frames = pack_frames(Encoded(Format.FP32, theta.view("uint8")[:0], theta.view("uint8")))
            self._transport.push(seed_header(self._identity(), fragment, frames), frames)
            bases.append(Base(0, theta))
        return bases

    def _base(self, index: int, seeds: list[Base]) -> Base:
        """The fragment's global parameters: what this worker seeded, if nothing has changed, else fetched."""
        assert self._versions is not None
        now = self._versions[index]
        if seeds and now.version == 0 and digest(seeds[index].theta) == now.digest:
            return seeds[index]
        return self.courier.fetch(index, None)

    def _identity(self) -> pb.PushHeader:
        return pb.PushHeader(run_id=self.run_id, worker_id=self._session.worker_id, generation=self._session.generation)

    def _say_waiting(self) -> None:
        log.warning("waiting for a diloco-server at %s", self._transport.address)

    def _await(self, condition: Callable[[], bool], timeout: float | None = None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not condition():
                if self._fatal is not None:
                    raise self._fatal.with_traceback(None) from None
                if deadline is not None and time.monotonic() > deadline:
                    raise ServerUnreachable(
                        f"{self._transport.address} accepted a connection, but no diloco-server answered within "
                        f"{timeout:.0f} s"
                    )
                self._changed.wait(0.5)

    # -- session thread --

    def _on_welcome(self, welcome: pb.Welcome) -> None:
        with self._changed:
            if self._courier is None:
                try:
                    self._set_up(welcome)
                except DilocoError as error:
                    self._fatal = error
            self._welcome = welcome
            if welcome.seeded:
                self._versions = {v.fragment: v for v in welcome.versions}
            self._changed.notify_all()
        if self._courier is not None:
            self._courier.on_versions(list(welcome.versions))

    def _set_up(self, welcome: pb.Welcome) -> None:
        settings = welcome.settings
        layout = build_layout(self._binding.manifest, settings.num_fragments, Pattern(settings.fragment_pattern))
        if layout.fingerprint != welcome.layout_fingerprint:
            raise ManifestMismatch(
                "server and worker cut the same model into different fragments: install the same version of diloco "
                "on both"
            )
        self._binding.attach(layout)
        self._courier = Courier(self._transport, self._binding, Format(settings.uplink_codec), self._identity)

    def _on_event(self, event: pb.SessionEvent) -> None:
        if event.HasField("committed"):
            self.courier.on_committed(event.committed)
            return
        with self._changed:
            match event.WhichOneof("body"):
                case "seed_wanted":
                    self._seed_wanted = True
                case "seeded":
                    self._versions = {v.fragment: v for v in event.seeded.versions}
                case "opened":
                    if self._start_step is None:
                        self._start_step = event.opened.start_step
                    self.courier.set_held(False)
                case "waiting":
                    if event.waiting.ready < event.waiting.needed:
                        log.warning(
                            "%d of %d workers are here; no round closes until the others have joined",
                            event.waiting.ready,
                            event.waiting.needed,
                        )
                    self.courier.set_held(True)
                case "all_finished":
                    self.courier.on_versions(list(event.all_finished.versions))
                    scheduled = event.all_finished.versions[: self.layout.num_scheduled]
                    self._final = {v.fragment: v.version for v in scheduled}
                case "pace":
                    self.pace = event.pace.sync_every
                case "shard":
                    self.shard = Shard(event.shard.index, event.shard.count)
                case "stop":
                    log.warning("the run has reached its end: %s", event.stop.reason)
                    self.stopped = event.stop.reason
                case "draining":
                    log.warning("the server is shutting down: %s", event.draining.reason)
            self._changed.notify_all()
        if self._courier is not None:
            self._courier.notify()

    def _on_lost(self) -> None:
        if self._courier is not None:
            self._courier.on_lost()

    def _on_fatal(self, error: DilocoError) -> None:
        with self._changed:
            self._fatal = error
            self._changed.notify_all()
        if self._courier is not None:
            self._courier.fail(error)
