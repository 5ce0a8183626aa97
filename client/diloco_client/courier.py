"""Carries contributions up and updates down on background threads, while the training thread computes.

A Flight is one contribution whose fate is not settled; a fragment has at most one. An Arrival is a newer base
of a fragment, waiting for the training thread to merge it. Bases are never changed in place: a newer one is a
new array, and only the training thread exchanges it (`take`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import (
    CorruptFrame,
    Encoded,
    Format,
    UnencodableValue,
    digest,
    encode_fragment,
    frame_checksum,
    pack_frames,
)
from diloco_proto.errors import ConnectionClosed, DilocoError
from diloco_proto.wire import codec_to_pb

from .binding import Binding, Captured, host_buffer, non_finite
from .transport import PulledItem, Transport

log = logging.getLogger("diloco")

_STAGED = (pb.OUTCOME_STAGED, pb.OUTCOME_ALREADY_HAVE, pb.OUTCOME_PART_HELD)


@dataclass(frozen=True, slots=True)
class Base:
    """Global parameters of one fragment at one version, float32[length] in host memory."""

    version: int
    theta: torch.Tensor


@dataclass(slots=True)
class Flight:
    """One contribution on its way: `steps` inner steps since the last counted one, taken up to `step`, to be
    merged at `due_step`."""

    fragment: int
    base: Base
    captured: Captured | None
    step: int
    due_step: int
    steps: int
    since_version: int
    encoded: Encoded | None = None
    header: pb.PushHeader | None = None
    frames: list[bytes] | None = None
    outcome: pb.OutcomeKind | None = None
    in_round: bool | None = None
    """Whether the round it was pushed for has counted it, by the event of its commit; None before that."""
    counted: bool | None = None
    """The fate; None while unknown."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A newer base to merge, and the flight that is settled by it, if there was one."""

    base: Base
    flight: Flight | None


class Courier:
    """Two threads: one encodes and pushes, one pulls and decodes."""

    def __init__(
        self, transport: Transport, binding: Binding, uplink: Format, identity: Callable[[], pb.PushHeader]
    ) -> None:
        self._transport = transport
        self._binding = binding
        self._uplink = uplink
        self._identity = identity
        count = binding.layout.num_trained
        self.bases: list[Base] = []
        self._flights: list[Flight | None] = [None] * count
        self._arrived: list[Base | None] = [None] * count
        self._announced = [0] * count
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
            self.bases = bases
            for fragment, base in enumerate(bases):
                if self._announced[fragment] > base.version:
                    self._downhill.put(fragment)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._uphill.put(None)
        self._downhill.put(None)

    # -- training thread --

    def push(self, flight: Flight) -> None:
        """Send a contribution off; the fragment must have none under way."""
        assert self._flights[flight.fragment] is None
        self._flights[flight.fragment] = flight
        self._uphill.put(flight)

    def flight(self, fragment: int) -> Flight | None:
        """The contribution under way."""
        return self._flights[fragment]

    def take(self, fragment: int) -> Arrival | None:
        """What is ready to be merged: a newer base, unless a contribution's fate is still open."""
        with self._changed:
            return self._take(fragment)

    def wait(self, fragment: int) -> None:
        """Wait until `take` has something; not while the server is out of reach or too few workers train for a
        round to close: then the training goes on, and what was pushed is merged later."""
        with record_function("diloco::wait"), self._changed:
            while not self._settled(fragment) and self._connected and not self._held:
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
        return all(f is None or f.outcome is not None for f in self._flights)

    def anything_ready(self) -> bool:
        return any(self._settled(p) for p in range(len(self._flights)))

    def none_in_flight(self) -> bool:
        return all(f is None for f in self._flights)

    def caught_up(self, versions: dict[int, int]) -> bool:
        """Base or arrival of every fragment is at least at its version."""
        return all((self._arrived[p] or self.bases[p]).version >= v for p, v in versions.items())

    def raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal.with_traceback(None) from None

    def _settled(self, fragment: int) -> bool:
        flight, arrived = self._flights[fragment], self._arrived[fragment]
        if flight is None or arrived is None:
            return arrived is not None
        return flight.counted is not None and arrived.version > flight.base.version

    def _take(self, fragment: int) -> Arrival | None:
        self.raise_fatal()
        if not self._settled(fragment):
            return None
        base, flight = self._arrived[fragment], self._flights[fragment]
        assert base is not None
        self._arrived[fragment] = self._flights[fragment] = None
        self.bases[fragment] = base
        return Arrival(base, flight)

    # -- session thread --

    def on_committed(self, event: pb.Committed) -> None:
        """A round is over: note this worker's fate in it and fetch the update."""
        with self._changed:
            self._held = False
            flight = self._flights[event.fragment]
            if flight is not None and event.version == flight.base.version + 1:
                flight.in_round = event.fate == pb.FATE_COUNTED
            self._settle_fate(event.fragment)
            self._announce(event.fragment, event.version)

    def on_versions(self, versions: list[pb.FragmentVersion]) -> None:
        """After a reconnection: fetch what was missed, and ask again for fates that were not heard."""
        with self._changed:
            self._connected = True
            for entry in versions:
                if entry.fragment >= len(self._flights):
                    continue
                self._announce(entry.fragment, entry.version)
                flight = self._flights[entry.fragment]
                if flight and flight.outcome in _STAGED and flight.counted is None:
                    flight.outcome = None
                    self._uphill.put(flight)
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

    def _announce(self, fragment: int, version: int) -> None:
        if version > self._announced[fragment]:
            self._announced[fragment] = version
            if self.bases:
                self._downhill.put(fragment)

    def _settle_fate(self, fragment: int) -> None:
        """A flight's fate: by its outcome if that says so, else by the event of the round it was staged for."""
        flight = self._flights[fragment]
        if flight is None or flight.outcome is None or flight.counted is not None:
            return
        if flight.outcome == pb.OUTCOME_COUNTED:
            flight.counted = True
        elif flight.outcome in (pb.OUTCOME_CLOSED, pb.OUTCOME_CONFLICT):
            flight.counted = False
        else:
            flight.counted = flight.in_round
        self._changed.notify_all()

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
            if flight.frames is None:
                self._encode(flight)
            assert flight.header is not None
            assert flight.frames is not None
            with record_function("diloco::push"):
                outcome = self._transport.push(flight.header, flight.frames)
            with self._changed:
                flight.outcome = outcome.kind
                self._settle_fate(flight.fragment)
                self._announce(flight.fragment, outcome.version)
                self._changed.notify_all()

    def _encode(self, flight: Flight) -> None:
        with record_function("diloco::encode"):
            fragment = self._binding.layout.fragments[flight.fragment]
            assert flight.captured is not None
            delta = self._binding.delta(flight.fragment, flight.base.theta, flight.captured)
            flight.captured = None
            try:
                flight.encoded = encode_fragment(self._uplink, delta)
            except UnencodableValue as error:
                raise non_finite(fragment, error.index) from error
            flight.frames = pack_frames(flight.encoded)
            header = self._identity()
            header.purpose = pb.PURPOSE_CONTRIBUTION
            header.fragment = flight.fragment
            header.base_version = flight.base.version
            header.codec = codec_to_pb(self._uplink)
            header.parts.add(first_block=0, num_blocks=fragment.num_blocks)
            header.frame_digests.extend(frame_checksum(f) for f in flight.frames)
            header.tokens = header.steps = flight.steps
            header.since_version = flight.since_version
            flight.header = header
        wire = header.ByteSize() + sum(pb.PushRequest(frame=f).ByteSize() for f in flight.frames)
        self._transport.counters.contribution(wire, fragment.parameters)

    # -- pull thread --

    def _pull_loop(self) -> None:
        while (fragment := self._downhill.get()) is not None:
            with self._changed:
                base = self._arrived[fragment] or self.bases[fragment]
                wanted = self._announced[fragment]
            if base.version >= wanted:
                continue
            newer = self.fetch(fragment, base)
            with self._changed:
                self._arrived[fragment] = newer
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
            theta.copy_(base.theta)
        values = theta.numpy()
        for item in items:
            try:
                item.apply(values)
            except CorruptFrame as error:
                log.warning("fragment %d: %s", fragment, error)
                return None
            if item.kind == pb.ITEM_UPDATE:
                self._transport.counters.update(item.nbytes, self._binding.layout.fragments[fragment].parameters)
        if digest(values) != items[-1].digest:
            return None
        return Base(items[-1].version, theta)
