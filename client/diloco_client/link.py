"""A worker's link to its run: joins it, seeds or adopts the global parameters, and holds the threads together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format, digest, warm_up
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import (
    DilocoError,
    InvalidContribution,
    ManifestMismatch,
    RolledBack,
    RunMismatch,
    ServerUnreachable,
)
from diloco_proto.manifest import Layout, Pattern, build_layout

from .binding import Binding
from .courier import Courier
from .first import First
from .flights import Base
from .session import Membership, Session, stem
from .trainer import Idle, Shard, Trainer
from .transport import Transport

T = TypeVar("T")

log = logging.getLogger("diloco")


class Link:
    """One worker in one run. `join` blocks until the run is open; afterwards `courier` carries the fragments.

    `former_run` is that of the process whose saved state this one takes up.
    """

    def __init__(
        self, transport: Transport, binding: Binding, worker_id: str, generation: int, former_run: str = ""
    ) -> None:
        self.log = log
        """For what concerns the whole worker."""
        self._transport = transport
        self._binding = binding
        self._former_run = former_run
        self._session = self._new_session(worker_id, generation)
        self.trainer: Trainer = Idle()
        """What trains here."""
        self._changed = threading.Condition()
        self._welcome: pb.Welcome | None = None
        self._versions: dict[int, pb.FragmentVersion] | None = None
        self._seed_wanted = False
        self._connected = False
        self._entered = False
        self._start_step: int | None = None
        self._fatal: DilocoError | None = None
        self._final: dict[int, int] | None = None
        self._flushes = 0
        self._courier: Courier | None = None
        self.standings: dict[int, pb.Standing] = {}
        """What the run had of this worker's former processes when this one joined, by fragment."""
        self.replaced: dict[int, Floats] = {}
        """The local values that joining replaced by the global ones, by fragment; until `forget_replaced`."""
        self.pace: int | None = None
        """H that the server wishes of this worker; None for the run's."""
        self.shard = Shard(0, 1)
        self.stopped = ""
        """Why the run has ended; empty while it has not."""

    def _new_session(self, worker_id: str, generation: int) -> Membership:
        return Session(
            self._transport,
            worker_id,
            generation,
            self._binding.manifest,
            former_run=self._former_run,
            beat=lambda: self.trainer.beat(),
            on_welcome=self._on_welcome,
            on_event=self._on_event,
            on_lost=self._on_lost,
            on_fatal=self._on_fatal,
        )

    @property
    def transport(self) -> Transport:
        return self._transport

    @property
    def binding(self) -> Binding:
        return self._binding

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
    def generation(self) -> int:
        return self._session.generation

    @property
    def layout(self) -> Layout:
        return self._binding.layout

    def join(self, connect_timeout: float) -> int:
        """Join the run; returns the inner step from which this worker counts. Blocks until the run is open.

        Afterwards the model's parameters are the global ones, unless a former process is taken up: then they are
        left alone. Raises ServerUnreachable, ManifestMismatch or another DilocoError.
        """
        self.do(lambda: self._reach(connect_timeout))
        self._session.start()
        self._await(lambda: self._welcome is not None, connect_timeout)
        bases = None
        while bases is None:
            bases = self._enter()
        for index, base in enumerate(bases):
            if index >= self.layout.num_scheduled:
                self._binding.adopt(index, base.theta)
            elif not self._former_run:
                self._replace(index, base)
        self._session.say(pb.SessionRequest(ready=pb.Ready()))
        self._await(lambda: self._start_step is not None)
        assert self._start_step is not None
        return self._start_step

    # -- what the training thread asks, of the whole worker --

    def sync(self, step: int) -> None:
        """After inner step `step`, before the training goes on. Raises what has gone wrong meanwhile."""
        self.courier.raise_fatal()

    def report(self, tokens: int | None, loss: float | None) -> None:
        """Of an inner step."""
        self.trainer.note(tokens, loss)

    @property
    def rank_shard(self) -> Shard:
        """This process's share of the data."""
        return self.shard

    @property
    def notice_left(self) -> float | None:
        """Seconds left until this machine is taken away; None while there was no notice."""
        return self.trainer.notice_left

    def anywhere(self, here: bool) -> bool:
        """Whether something is so for any of the worker's processes."""
        return here

    def of_first(self, value: T) -> T:
        """What the first of the worker's processes has, of what JSON can say."""
        return value

    def odd_one(self, value: Any) -> int | None:
        """The first of the worker's processes that has another value than the first of all, if there is one."""
        return None

    def digest(self, fragment: int, base: Base) -> int:
        """Of the whole fragment, as the worker's processes hold it."""
        return digest(base.theta)

    def label(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of this process as it is saved beside those of the worker's other processes."""
        return state

    def unlabel(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of what was saved, the state of this process."""
        return state

    def do(self, work: Callable[[], T]) -> T:
        """The result of what waits for the network or may fail, once all of the worker's processes have done it."""
        return work()

    def ready(self) -> None:
        """The worker trains again after it had finished."""
        self._session.say(pb.SessionRequest(ready=pb.Ready()))

    def finishing(self) -> None:
        self._session.say(pb.SessionRequest(finishing=pb.Finishing()))

    def finished(self) -> None:
        """Wait for the others from now on; `everyone_finished` says when they have come."""
        with self._changed:
            self._final = None
            self._flushes += 1
        self._session.say(pb.SessionRequest(finished=pb.Finished(flush=self._flushes)))

    def everyone_finished(self) -> bool:
        """Every live worker has finished and this one holds, or has arriving, the final version of each fragment."""
        return self._final is not None and self.courier.caught_up(self._final)

    def close(self, reason: str) -> None:
        self._session.close(reason)
        self._transport.close()
        if self._courier is not None:
            self._courier.close()

    # -- joining --

    def _reach(self, timeout: float) -> None:
        address = self._transport.address
        self._transport.wait_until_up(timeout, lambda: log.warning("waiting for a diloco-server at %s", address))

    def _enter(self) -> list[Base] | None:
        """Take part in the run of the last welcome, with the bases that are returned.

        None if there is another by now: it was rolled back, or it had no parameters yet when its server was started
        anew, and is forgotten.
        """
        courier = self._set_up()
        warm_up({Format(self.settings.uplink_codec), Format(self.settings.downlink_codec), Format.FP32})
        try:
            bases = self._first_bases(courier, self._new_first(courier))
        except (RolledBack, RunMismatch):
            self._await(lambda: self._left(courier))
            return None
        with self._changed:
            if self._left(courier) or not courier.start(bases[: self.layout.num_scheduled], courier.run_id):
                return None
            self._session.stay()
            self._entered = True
        return bases

    def _set_up(self) -> Courier:
        """Cut the model as the run does. Raises ManifestMismatch if that does not come out the same."""
        with self._changed:
            welcome = self._welcome
            assert welcome is not None
            settings = welcome.settings
            layout = build_layout(self._binding.manifest, settings.num_fragments, Pattern(settings.fragment_pattern))
            if layout.fingerprint != welcome.layout_fingerprint:
                both = "install the same version of diloco on both"
                raise ManifestMismatch(f"server and worker cut the same model into different fragments: {both}")
            self._binding.attach(layout)
            courier = self._courier = self._new_courier(Format(settings.uplink_codec))
            courier.on_welcome(welcome.run_id, list(welcome.versions))
            if not self._connected:
                courier.on_lost()
            return courier

    def _new_courier(self, uplink: Format) -> Courier:
        return Courier(self._transport, self._binding, uplink, self._identity)

    def _left(self, courier: Courier) -> bool:
        """The run is another one than when `courier` was set up."""
        return self._welcome is None or self._welcome.run_id != courier.run_id

    def _new_first(self, courier: Courier) -> First:
        return First(self._transport, self._binding, courier, self._identity, self.do)

    def _first_bases(self, courier: Courier, first: First) -> list[Base]:
        """Once the run has parameters; this worker gives it its own when the server asks for them, which it may do
        again, when the first attempt came to nothing. Raises RunMismatch if there is another run by now."""
        seeds: list[Base] = []
        while True:
            self._await(lambda: self._versions is not None or self._seed_wanted or self._left(courier))
            with self._changed:
                if self._left(courier):
                    raise RunMismatch("the run is another one now")
                if self._versions is not None:
                    break
                self._seed_wanted = False
            try:
                seeds = first.seed()
            except InvalidContribution as error:
                log.warning("this worker's seed is no longer wanted: %s", error)
        known = (self._versions or {}).get
        return [first.base(p, known(p), seeds[p] if seeds else None) for p in range(len(self.layout.fragments))]

    def _replace(self, index: int, base: Base) -> None:
        """Adopt the global values. The local ones are kept where they differ: a saved state may be theirs."""
        local = self._binding.capture(index).wait()
        if self.anywhere(digest(local) != digest(base.theta)):
            self.replaced[index] = local.copy()
        self._binding.adopt(index, base.theta)

    def forget_replaced(self) -> None:
        """The training has begun: what the model held before is of no use any more."""
        self.replaced.clear()

    def _identity(self) -> pb.PushHeader:
        return pb.PushHeader(run_id=self.run_id, worker_id=self._session.worker_id, generation=self._session.generation)

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
            former, self._welcome = self._welcome, welcome
            self._connected = True
            if former is None or former.run_id != welcome.run_id:
                self.standings = {s.fragment: s for s in welcome.standings}
                self._versions, self._seed_wanted, self._final = None, False, None
            if welcome.seeded:
                self._versions = {v.fragment: v for v in welcome.versions}
            if former is not None and stem(former.run_id) != stem(welcome.run_id):
                self._on_another_run(former.run_id, welcome.run_id)
            elif self._courier is not None and (self._entered or not self._left(self._courier)):
                self._courier.on_welcome(welcome.run_id, list(welcome.versions))
            self._changed.notify_all()

    def _on_another_run(self, former: str, now: str) -> None:
        """The server was started anew, and this worker had said hello to whatever run there is."""
        if not self._entered:
            self.log.warning("run %s had no parameters yet and is no more; joining run %s instead", former, now)
            return
        self._fatal = RunMismatch(
            f"the server at {self._transport.address} was started anew while this worker joined run {former}, and runs "
            f"{now}: start the worker again to join that"
        )
        self.courier.fail(self._fatal)

    def _on_event(self, event: pb.SessionEvent) -> None:
        if event.HasField("committed"):
            if self._courier is not None:  # else the versions are fetched later than this one was made
                self._courier.on_committed(event.committed)
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
                    self._hold(False)
                case "waiting":
                    if event.waiting.ready < event.waiting.needed:
                        text = "%d of %d workers are here; no round closes until the others have joined"
                        self.log.warning(text, event.waiting.ready, event.waiting.needed)
                    self._hold(True)
                case "all_finished":
                    self._on_all_finished(event.all_finished)
                case "pace":
                    self.pace = event.pace.sync_every
                case "shard":
                    self.shard = Shard(event.shard.index, event.shard.count)
                case "stop":
                    self.log.warning("the run has reached its end: %s", event.stop.reason)
                    self.stopped = event.stop.reason
                case "draining":
                    log.debug("the server drains: %s", event.draining.reason)  # the session says so when it is lost
            self._changed.notify_all()
        if self._courier is not None:
            self._courier.notify()

    def _hold(self, held: bool) -> None:
        if self._courier is not None:
            self._courier.set_held(held)

    def _on_all_finished(self, event: pb.AllFinished) -> None:
        if event.flush != self._flushes or not self._entered:
            return  # of an earlier flush: the answer to what a reconnection had repeated
        self.courier.on_versions(list(event.versions))
        self._final = {v.fragment: v.version for v in event.versions[: self.layout.num_scheduled]}

    def _on_lost(self) -> None:
        with self._changed:
            self._connected = False
            if self._courier is not None:
                self._courier.on_lost()

    def _on_fatal(self, error: DilocoError) -> None:
        with self._changed:
            self._fatal = error
            self._changed.notify_all()
        if self._courier is not None:
            self._courier.fail(error)
