"""Carries contributions up and updates down on background threads, while the training thread computes.

All that it knows is in its `Flights`, under one lock. Only the training thread exchanges bases (`take`) and begins
contributions (`push`), so what it has read of these holds until it changes them itself; but for a rollback of the run,
which may end every contribution at any moment and is noticed by `take`.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from torch.profiler import record_function

from diloco_proto import outer_pb2 as pb
from diloco_proto.buffers import Buffers
from diloco_proto.codec import Encoded, Format, UnencodableValue, pack, worth_level
from diloco_proto.errors import DilocoError, NonFiniteParameter, RolledBack
from diloco_proto.frame_messages import frame_message_bytes
from diloco_proto.manifest import Role

from .binding import Binding
from .captured import InPlace
from .fetching import Fetcher
from .flights import Arrival, Base, Flight, Flights
from .messages import contribution_header
from .transport import Transport

log = logging.getLogger("diloco")

CLOSE_SECONDS = 5.0
"""So long `close` waits for the transfers to end, which were cut."""

KEPT_BUFFERS = 2
"""For what is encoded next and what that leaves out."""


class Courier:
    """Two threads: one pushes, and encodes what was copied to be encoded, one pulls and decodes."""

    def __init__(
        self, transport: Transport, binding: Binding, uplink: Format, identity: Callable[[], pb.PushHeader]
    ) -> None:
        self._transport = transport
        self._binding = binding
        self._fetcher = Fetcher(transport, binding, self._credible)
        self._uplink = uplink
        self._identity = identity
        self._log = log
        """For what concerns the whole worker."""
        self._count = binding.layout.num_scheduled
        self._flights = Flights(self._count)
        self._memory = Buffers(KEPT_BUFFERS)
        self._changed = threading.Condition()
        self._encoding = threading.Lock()
        self._run_id = ""
        self._connected = True
        self._held = False
        self._fatal: DilocoError | None = None
        self.hurried: Callable[[], bool] = lambda: False
        """Whether the training thread must not be kept waiting for fates any more."""
        self._uphill: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._downhill: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._queued: set[int] = set()
        """Fragments that wait for the pull thread."""
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=f"diloco-{name}", daemon=True)
            for name, loop in (("push", self._push_loop), ("pull", self._pull_loop))
        ]

    def start(self, bases: list[Base], run_id: str) -> bool:
        """Begin, with the bases that the worker holds. Versions announced meanwhile are fetched.

        False if they are of another run than that of the last welcome: it was rolled back while they were fetched.
        """
        with self._changed:
            if run_id != self._run_id:
                return False
            self._flights.bases = bases
            self._fetch_wanted()
        for thread in self._threads:
            thread.start()
        return True

    def close(self) -> None:
        """Call it once the transport is closed."""
        self._uphill.put(None)
        self._downhill.put(None)
        self.notify()
        for thread in self._threads:
            if thread.is_alive():  # one that is within gRPC when the interpreter ends takes the process down with it
                thread.join(CLOSE_SECONDS)

    # -- training thread --

    @property
    def bases(self) -> Sequence[Base]:
        """The global parameters that this worker holds, by fragment."""
        with self._changed:
            return tuple(self._flights.bases)

    @property
    def run_id(self) -> str:
        """Of the last welcome; empty before the first."""
        with self._changed:
            return self._run_id

    def newest(self, fragment: int) -> Base:
        """The newest base that is here, merged or not."""
        with self._changed:
            return self._flights.newest(fragment)

    def push(self, flight: Flight) -> None:
        """Send a contribution off; the fragment must have none under way. What was captured in place is encoded now."""
        with self._changed:
            if not self._flights.launch(flight):
                return
        # Nobody else touches a flight that was not sent.
        if isinstance(flight.captured, InPlace):
            try:
                with record_function("diloco::capture"):
                    self._encode(flight)
            except NonFiniteParameter as error:
                self.fail(error)
                return
        with self._changed:
            if self._flights.holds(flight):
                self._send(flight)

    def flight(self, fragment: int) -> Flight | None:
        """The contribution under way."""
        with self._changed:
            return self._flights.flight(fragment)

    def encode_all(self) -> None:
        """Encode every contribution under way, here and now. Waits for no network. Raises NonFiniteParameter."""
        for fragment in range(self._count):
            flight = self.flight(fragment)
            if flight is not None:
                self._prepare(flight)

    def to_save(self, fragment: int) -> tuple[Base | None, Flight | None]:
        """Base and contribution under way, as they are in this moment; the contribution a copy, which `encode_all` has
        encoded. The base is None if it is outdated."""
        with self._changed:
            flight = self._flights.flight(fragment)
            base = None if self._flights.outdated(fragment) else self._flights.bases[fragment]
            return base, None if flight is None else dataclasses.replace(flight)

    def restore(self, fragment: int, base: Base, flight: Flight | None) -> None:
        """Go on with the base and the contribution of a former process; what is newer by now has arrived."""
        with self._changed:
            self._flights.restore(fragment, base, flight)
            if flight is not None and flight.counted is None:
                self._send(flight)
            self._fetch_wanted()

    def take(self, fragment: int) -> Arrival | None:
        """What is ready to be merged: a newer base, unless a contribution's fate is still open."""
        with self._changed:
            self.raise_fatal()
            return self._flights.take(fragment)

    def wait(self, fragment: int) -> None:
        """Wait until `take` has something; not while the server is out of reach or too few workers train for the
        fragment's round to close: then the training goes on, and what was pushed is merged later."""
        with record_function("diloco::wait"), self._changed:
            while self._flights.awaited(fragment, held=self._held) and not (self._out_of_reach or self.hurried()):
                self.raise_fatal()
                self._changed.wait(1.0)

    def wait_until(self, condition: Callable[[], bool], patience: float, limit: float | None = None) -> bool:
        """Wait for `condition`; False when the server was out of reach for `patience` seconds, or after `limit`."""
        lost_at: float | None = None
        began = time.monotonic()
        with self._changed:
            while not condition():
                self.raise_fatal()
                now = time.monotonic()
                lost_at = (lost_at or now) if self._out_of_reach else None
                if (lost_at is not None and now - lost_at > patience) or (limit is not None and now - began > limit):
                    return False
                self._changed.wait(0.5)
        return True

    def staged(self) -> bool:
        """Every contribution under way has reached the server."""
        with self._changed:
            return self._flights.staged()

    def anything_ready(self) -> bool:
        with self._changed:
            return self._flights.anything_ready()

    def none_in_flight(self) -> bool:
        with self._changed:
            return self._flights.none_in_flight()

    def caught_up(self, versions: dict[int, int]) -> bool:
        """Base or arrival of every fragment is at least at its version."""
        with self._changed:
            return self._flights.caught_up(versions)

    def raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal.with_traceback(None) from None

    @property
    def _out_of_reach(self) -> bool:
        """The session is lost, or what this process transfers does not get through."""
        return not self._connected or self._transport.out_of_reach

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
                self._send(flight)
            self._fetch_wanted()
            self._changed.notify_all()

    def on_welcome(self, run_id: str, versions: list[pb.FragmentVersion]) -> None:
        """The session has begun, at first or anew; the run may be another one than before: rolled back."""
        with self._changed:
            former, self._run_id = self._run_id, run_id
            if former and run_id != former:
                self._log.warning(
                    "the run was rolled back and is %s now: what this worker had under way is dropped; it trains on "
                    "and takes the global parameters as soon as they have come",
                    run_id,
                )
                self._flights.rolled_back(versions)
        self.on_versions(versions)

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

    def _send(self, flight: Flight) -> None:
        """Let it be pushed, for the first time or once more."""
        self._uphill.put(flight)

    def _fetch_wanted(self) -> None:
        if self._flights.bases:
            for fragment in range(self._count):
                if fragment not in self._queued and self._to_fetch(fragment)[0]:
                    self._queued.add(fragment)
                    self._downhill.put(fragment)

    def _to_fetch(self, fragment: int) -> tuple[bool, Base | None]:
        """Whether there is something to fetch, and on top of what; None for a snapshot."""
        base = self._flights.wanted(fragment)
        return base is not None or self._flights.lacks_base(fragment), base

    # -- push thread --

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            self._binding.use_device()
            loop()
        except DilocoError as error:
            self._broken(error)
        except Exception as error:
            if self._transport.closed.is_set():
                return
            log.exception("a background thread of diloco failed")
            failure = DilocoError(f"a background thread of diloco failed: {error!r}; please report this")
            failure.__cause__ = error
            self._broken(failure)

    def _broken(self, error: DilocoError) -> None:
        """A background thread has ended with this error."""
        self.fail(error)

    def _push_loop(self) -> None:
        while (flight := self._uphill.get()) is not None:
            self._push(flight)
            del flight  # while the next one is waited for, its memory may serve for that

    def _push(self, flight: Flight) -> None:
        self._prepare(flight)
        assert flight.header is not None
        with self._changed:
            if not self._flights.holds(flight):
                return
            run_id = flight.header.run_id = self._run_id
        try:
            with record_function("diloco::push"):
                outcome = self._transport.push(flight.header, flight.frames)
        except RolledBack:
            self._await_welcome_after(run_id)
            return
        with self._changed:
            if self._flights.holds(flight):
                self._pushed(flight, outcome)
            self._changed.notify_all()

    def _pushed(self, flight: Flight, outcome: pb.Outcome) -> None:
        """The server has answered a push."""
        if self._flights.on_outcome(flight, outcome):
            self._send(flight)
        self._fetch_wanted()

    def _await_welcome_after(self, run_id: str) -> None:
        """The server has said that this run was rolled back; its welcome, with what is now, comes by the session."""
        with self._changed:
            while self._run_id == run_id and not self._transport.closed.is_set():
                self._changed.wait(0.5)

    def _prepare(self, flight: Flight) -> None:
        """Encode a contribution unless that has been done. Raises NonFiniteParameter, as often as it is called."""
        with self._encoding:
            if flight.unfit is not None:
                raise flight.unfit.with_traceback(None)
            if flight.header is None:
                self._pack(flight)

    def _pack(self, flight: Flight) -> None:
        span, fmt = self._binding.spans[flight.fragment], self._format(flight)
        if not flight.frames:
            with record_function("diloco::encode"):
                encoded = flight.encoded or self._encode(flight)
                flight.frames = pack(encoded, span.first_block, worth_level(fmt, self._transport.up_speed))
        header = contribution_header(self._identity(), flight, span, fmt, flight.frames)
        wire = header.ByteSize() + sum(frame_message_bytes(len(f)) for f in flight.frames)
        self._transport.counters.contribution(wire, span.parameters)
        flight.header = header

    def _encode(self, flight: Flight) -> Encoded:
        binding, fragment, fmt = self._binding, flight.fragment, self._format(flight)
        memory = self._memory.encoded(fmt, binding.spans[fragment].num_blocks)
        left_out = self._memory.floats(binding.spans[fragment].length) if flight.feedback else None
        try:
            encoded = flight.encode(fmt, binding.rounded(fragment, flight.base.theta), memory, left_out)
        except UnencodableValue as error:
            flight.unfit = binding.non_finite(fragment, error.index)
            raise flight.unfit from error
        flight.captured = None
        return encoded

    def _format(self, flight: Flight) -> Format:
        role = self._binding.spans[flight.fragment].fragment.role
        return Format.FP32 if role is Role.BUFFER else self._uplink

    # -- pull thread --

    def _pull_loop(self) -> None:
        while (fragment := self._downhill.get()) is not None:
            with self._changed:
                run_id = self._run_id
                self._queued.discard(fragment)
                needed, base = self._to_fetch(fragment)
                if not needed:
                    continue
            try:
                newer = self.fetch(fragment, base, run_id)
            except RolledBack:
                self._await_welcome_after(run_id)
                continue
            self._fetched(fragment, newer, run_id)

    def _fetched(self, fragment: int, newer: Base, run_id: str) -> None:
        """What a pull has brought is here, of that run."""
        with self._changed:
            if self._run_id == run_id:
                self._flights.on_arrived(fragment, newer)
            self._changed.notify_all()

    def fetch(self, fragment: int, base: Base | None, run_id: str) -> Base:
        """The fragment's newest parameters: by updates on top of `base`, or its snapshot. Raises RolledBack."""
        return self._fetcher.fetch(fragment, base, run_id)

    def _credible(self, newer: Base, found: int) -> bool:
        """Whether it is what the server has, as far as this process can tell by its digest."""
        return found == newer.announced
