"""Carries contributions up and updates down on background threads, while the training thread computes.

All that it knows is in its `Flights`, under one lock; only the training thread exchanges bases (`take`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from torch.profiler import record_function

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import CorruptFrame, Format, UnencodableValue, digest, pack_frames
from diloco_proto.errors import ConnectionClosed, DilocoError
from diloco_proto.manifest import Role

from .binding import Binding, host_buffer, non_finite
from .flights import Arrival, Base, Flight, Flights
from .messages import contribution_header
from .transport import PulledItem, Transport

log = logging.getLogger("diloco")


class Courier:
    """Two threads: one encodes and pushes, one pulls and decodes."""

    def __init__(
        self, transport: Transport, binding: Binding, uplink: Format, identity: Callable[[], pb.PushHeader]
    ) -> None:
        self._transport = transport
        self._binding = binding
        self._uplink = uplink
        self._identity = identity
        self._count = binding.layout.num_scheduled
        self._flights = Flights(self._count)
        self._changed = threading.Condition()
        self._connected = True
        self._held = False
        self._fatal: DilocoError | None = None
        self._uphill: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._downhill: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=f"diloco-{name}", daemon=True)
            for name, loop in (("push", self._push_loop), ("pull", self._pull_loop))
        ]

    def start(self, bases: list[Base]) -> None:
        """Begin, with the bases that the worker holds. Versions announced meanwhile are fetched."""
        with self._changed:
            self._flights.bases = bases
            self._fetch_wanted()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._uphill.put(None)
        self._downhill.put(None)

    # -- training thread --

    @property
    def bases(self) -> Sequence[Base]:
        """The global parameters that this worker holds, by fragment."""
        return self._flights.bases

    def push(self, flight: Flight) -> None:
        """Send a contribution off; the fragment must have none under way."""
        with self._changed:
            self._flights.launch(flight)
        self._uphill.put(flight)

    def flight(self, fragment: int) -> Flight | None:
        """The contribution under way."""
        return self._flights.flight(fragment)

    def take(self, fragment: int) -> Arrival | None:
        """What is ready to be merged: a newer base, unless a contribution's fate is still open."""
        with self._changed:
            self.raise_fatal()
            return self._flights.take(fragment)

    def wait(self, fragment: int) -> None:
        """Wait until `take` has something; not while the server is out of reach or too few workers train for a
        round to close: then the training goes on, and what was pushed is merged later."""
        with record_function("diloco::wait"), self._changed:
            while not self._flights.settled(fragment) and self._connected and not self._held:
                self.raise_fatal()
                self._changed.wait(1.0)

    def wait_until(self, condition: Callable[[], bool], patience: float) -> bool:
        """Wait for `condition`; False when the server was out of reach for `patience` seconds."""
        lost_at: float | None = None
        with self._changed:
            while not condition():
                self.raise_fatal()
                lost_at = None if self._connected else lost_at or time.monotonic()
                if lost_at is not None and time.monotonic() - lost_at > patience:
                    return False
                self._changed.wait(0.5)
        return True

    def staged(self) -> bool:
        """Every contribution under way has reached the server."""
        return self._flights.staged()

    def anything_ready(self) -> bool:
        return self._flights.anything_ready()

    def none_in_flight(self) -> bool:
        return self._flights.none_in_flight()

    def caught_up(self, versions: dict[int, int]) -> bool:
        """Base or arrival of every fragment is at least at its version."""
        return self._flights.caught_up(versions)

    def raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal.with_traceback(None) from None

    # -- session thread --

    def on_committed(self, event: pb.Committed) -> None:
        """A round is over: note this worker's fate in it and fetch the update."""
        with self._changed:
            self._held = False
            self._flights.on_committed(event)
            self._fetch_wanted()
            self._changed.notify_all()

    def on_versions(self, versions: list[pb.FragmentVersion]) -> None:
        """After a reconnection: fetch what was missed, and ask again for fates that were not heard."""
        with self._changed:
            self._connected = True
            for flight in self._flights.on_versions(versions):
                self._uphill.put(flight)
            self._fetch_wanted()
            self._changed.notify_all()

    def on_lost(self) -> None:
        with self._changed:
            self._connected = False
            self._changed.notify_all()

    def set_held(self, held: bool) -> None:
        """Whether rounds wait for more workers to join; the next one that closes ends it too."""
        with self._changed:
            self._held = held
            self._changed.notify_all()

    def notify(self) -> None:
        """Wake whoever waits: something outside has changed."""
        with self._changed:
            self._changed.notify_all()

    def fail(self, error: DilocoError) -> None:
        """Raise `error` on the training thread at its next turn."""
        with self._changed:
            self._fatal = self._fatal or error
            self._changed.notify_all()

    def _fetch_wanted(self) -> None:
        if self._flights.bases:
            for fragment in range(self._count):
                if self._flights.wanted(fragment) is not None:
                    self._downhill.put(fragment)

    # -- push thread --

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except DilocoError as error:
            self.fail(error)
        except Exception as error:
            if self._transport.closed.is_set():
                return
            log.exception("a background thread of diloco failed")
            failure = DilocoError(f"a background thread of diloco failed: {error!r}; please report this")
            failure.__cause__ = error
            self.fail(failure)

    def _push_loop(self) -> None:
        while (flight := self._uphill.get()) is not None:
            if flight.header is None:
                self._encode(flight)
            assert flight.header is not None
            with record_function("diloco::push"):
                outcome = self._transport.push(flight.header, flight.frames)
            with self._changed:
                self._flights.on_outcome(flight, outcome)
                self._fetch_wanted()
                self._changed.notify_all()

    def _encode(self, flight: Flight) -> None:
        with record_function("diloco::encode"):
            fragment = self._binding.layout.fragments[flight.fragment]
            fmt = Format.FP32 if fragment.role is Role.BUFFER else self._uplink
            assert flight.captured is not None
            delta = self._binding.delta(flight.fragment, flight.base.theta, flight.captured)
            flight.captured = None
            try:
                flight.frames = pack_frames(flight.encode(fmt, delta))
            except UnencodableValue as error:
                raise non_finite(fragment, error.index) from error
            flight.header = contribution_header(self._identity(), flight, fragment, fmt, flight.frames)
        wire = flight.header.ByteSize() + sum(pb.PushRequest(frame=f).ByteSize() for f in flight.frames)
        self._transport.counters.contribution(wire, fragment.parameters)

    # -- pull thread --

    def _pull_loop(self) -> None:
        while (fragment := self._downhill.get()) is not None:
            with self._changed:
                base = self._flights.wanted(fragment)
            if base is None:
                continue
            newer = self.fetch(fragment, base)
            with self._changed:
                self._flights.on_arrived(fragment, newer)
                self._changed.notify_all()

    def fetch(self, fragment: int, base: Base | None) -> Base:
        """The fragment's newest parameters: by updates on top of `base`, or its snapshot."""
        request = pb.PullRequest(run_id=self._identity().run_id, fragment=fragment, snapshot=base is None)
        if base is not None:
            request.since_version = base.version
        items = self._transport.pull(request)
        with record_function("diloco::decode"):
            newer = self._decode(fragment, base, items)
        if newer is not None:
            return newer
        if base is None:
            raise ConnectionClosed(f"the server's snapshot of fragment {fragment} does not match its own digest")
        log.warning("fragment %d differs from the server's after its update; fetching it afresh", fragment)
        return self.fetch(fragment, None)

    def _decode(self, fragment: int, base: Base | None, items: list[PulledItem]) -> Base | None:
        """The base that `items` lead to, or None when it is not the one the server has."""
        if not items:
            return base
        length = self._binding.layout.fragments[fragment].length
        theta = host_buffer(length, pinned=self._binding.pinned(fragment))
        if base is not None:
            np.copyto(theta, base.theta)
        for item in items:
            try:
                item.apply(theta)
            except CorruptFrame as error:
                log.warning("fragment %d: %s", fragment, error)
                return None
            if item.kind == pb.ITEM_UPDATE:
                self._transport.counters.update(item.nbytes, self._binding.layout.fragments[fragment].parameters)
        if digest(theta) != items[-1].digest:
            return None
        return Base(items[-1].version, theta)
