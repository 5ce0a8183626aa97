"""A worker's link in virtual time: its session, and what carries contributions up and updates down.

Around the real Flights; what session, link, courier and transport do with threads and retries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from diloco_client.flights import Arrival, Base, Flight, Flights
from diloco_client.landing import Target
from diloco_client.messages import contribution_header, seed_push
from diloco_client.pushing import most_telling
from diloco_client.spans import Span
from diloco_client.transport import RETRY_LATER
from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import PROTOCOL_VERSION
from diloco_proto.codec import Format, pack_frames
from diloco_proto.errors import DilocoError, RolledBack
from diloco_proto.manifest import Layout, Pattern, Role, build_layout
from diloco_proto.wire import manifest_to_pb
from diloco_server.pushes import Ticket

from .clock import Action, Clock, Gate
from .line import Connection, Line
from .parcels import Brought, Parcel, Traffic, land, parcels_of
from .server import Answer, Peer, VirtualServer
from .toy import Trainer

RETRY_SECONDS = 0.25


class VirtualLink:
    """One worker's link. `changed` is called whenever there may be news; `beat` makes a heartbeat.

    `parts` is in how many streams a contribution travels, as from the ranks of an island.
    """

    def __init__(
        self,
        clock: Clock,
        server: VirtualServer,
        line: Line,
        gate: Gate,
        trainer: Trainer,
        worker_id: str,
        generation: int,
        *,
        changed: Action,
        failed: Action,
        beat: Callable[[], pb.Heartbeat],
        parts: int = 1,
        wire_scale: float = 1.0,
    ) -> None:
        self.worker_id = worker_id
        self.generation = generation
        self.trainer = trainer
        self.line = line
        self.failure: DilocoError | None = None
        self.flights: Flights | None = None
        self.settings = pb.RunSettings()
        self.heartbeat_seconds = 1.0
        self.snapshots: dict[int, Base] = {}
        self.start_step: int | None = None
        self.held = False
        self.pace: int | None = None
        self.stopped = ""
        self.final: dict[int, int] | None = None
        self.traffic = Traffic()
        self.ended = False
        """It wants no connection any more."""
        self.parcels: list[list[Parcel]] = []
        """Of each fragment, what its last contribution travels in."""
        self._clock = clock
        self._server = server
        self._watch = server.watch
        self._gate = gate
        self._changed = changed
        self._failed = failed
        self._beat = beat
        self._parts = parts
        self._wire_scale = wire_scale
        self.run_id = ""
        """As the last welcome said."""
        self._connection: Connection | None = None
        self._peer: Peer | None = None
        self._standing: pb.SessionRequest | None = None
        self._layout: Layout | None = None
        self._pulling: set[int] = set()
        self._sending: dict[int, Flight] = {}

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def layout(self) -> Layout:
        assert self._layout is not None
        return self._layout

    @property
    def its_flights(self) -> Flights:
        assert self.flights is not None
        return self.flights

    # -- its session --

    def connect(self) -> None:
        """Say hello, at first or after a cut."""
        if self.connected or self.line.broken or self.ended or self.failure or not self._server.up:
            return
        hello = pb.Hello(
            protocol=PROTOCOL_VERSION,
            worker_id=self.worker_id,
            generation=self.generation,
            manifest=manifest_to_pb(self.trainer.manifest),
            run_id=self.run_id,
        )
        connection = self._connection = self.line.connect()
        peer = self._peer = Peer(connection, self.hear, self.end_session)

        def arrive() -> None:
            try:
                peer.member = self._server.attach(hello, peer)
            except DilocoError as error:
                connection.tell(lambda error=error: self.end_session(error))  # type: ignore[misc]

        connection.say(arrive)

    def lose(self, *, noticed: bool, lag: float | None = None) -> None:
        """The connection is cut; `noticed` if the server sees it break. `lag`: see Connection.cut."""
        if self._connection is None:
            return
        self._connection.cut(lag)
        peer, self._peer, self._connection = self._peer, None, None
        self._pulling.clear()
        self._sending.clear()
        if noticed and peer is not None:
            self._server.gate(lambda: self._server.detach(peer))
        self._changed()

    def reset(self, seconds: float) -> None:
        """The process at the other end has died: in so many seconds the connection breaks."""
        connection = self._connection
        if connection is not None:
            self._later(seconds, lambda: self._on_reset(connection))

    def _on_reset(self, connection: Connection) -> None:
        if self._connection is connection:
            self.lose(noticed=False)
            self._later(RETRY_SECONDS, self.connect)

    def come_back(self, seconds: float) -> None:
        """The server is up again: the next attempt to reach it is in so many seconds."""
        self._later(seconds, self.connect)

    def say(self, request: pb.SessionRequest) -> None:
        """Said again whenever the session is taken up anew."""
        self._standing = request
        self.send(request)

    def send(self, request: pb.SessionRequest) -> None:
        peer, connection = self._peer, self._connection
        if peer is None or connection is None:
            return

        def arrive() -> None:
            if peer.member is None:
                return
            try:
                self._server.hear(peer, request)
            except DilocoError as error:
                connection.tell(lambda error=error: self.end_session(error))  # type: ignore[misc]

        connection.say(arrive)

    def end_session(self, error: DilocoError) -> None:
        """The server has ended the session with this error."""
        if isinstance(error, RETRY_LATER):
            self.lose(noticed=True)
            self._later(RETRY_SECONDS, self.connect)
        else:
            self._fail(error)

    def _fail(self, error: DilocoError) -> None:
        self.failure = error
        self._watch.failed_with(self)
        self.lose(noticed=True)
        self._failed()

    def _later(self, seconds: float, action: Action) -> None:
        self._clock.after(seconds, lambda: self._gate(action))

    def hear(self, event: pb.SessionEvent) -> None:
        """An event of the session."""
        body = event.WhichOneof("body") or ""
        self._watch.count(body)
        match body:
            case "welcome":
                self._on_welcome(event.welcome)
            case "seed_wanted":
                self._seed()
            case "seeded":
                self._fetch_snapshots()
            case "opened":
                self.held = False
                if self.start_step is None:
                    self.start_step = event.opened.start_step
            case "waiting":
                self.held = True
            case "committed":
                self.held = False
                self.its_flights.on_committed(event.committed)
                self._fetch_wanted()
            case "all_finished":
                scheduled = event.all_finished.versions[: self.layout.num_scheduled]
                self.final = {v.fragment: v.version for v in scheduled}
                self._resume(event.all_finished.versions)
            case "pace":
                self.pace = event.pace.sync_every
            case "stop":
                self.stopped = event.stop.reason
        self._changed()

    def _on_welcome(self, welcome: pb.Welcome) -> None:
        former, self.run_id = self.run_id, welcome.run_id
        self.heartbeat_seconds = welcome.heartbeat_seconds
        if self.flights is None:
            settings = self.settings = welcome.settings
            layout = self._layout = build_layout(
                self.trainer.manifest, settings.num_fragments, Pattern(settings.fragment_pattern)
            )
            assert layout.fingerprint == welcome.layout_fingerprint
            self.trainer.attach(layout)
            self.flights = Flights(layout.num_scheduled)
            self.parcels = [[] for _ in range(layout.num_scheduled)]
        if self._standing is not None:
            self.send(self._standing)
        if former and former != welcome.run_id:
            self._rolled_back(welcome.versions)
        if welcome.seeded:
            self._fetch_snapshots()
            self._resume(welcome.versions)

    def _rolled_back(self, versions: Sequence[pb.FragmentVersion]) -> None:
        """The run is another one now: as Link and Courier do."""
        self.final = None
        self.snapshots.clear()
        self._sending.clear()
        self._pulling.clear()
        self.its_flights.rolled_back(versions)

    # -- joining --

    def _seed(self) -> None:
        for fragment in self.layout.fragments:
            theta = self.trainer.seed_values(fragment.index)
            header, packed = seed_push(self._identity(), Span.whole(fragment), theta)
            self._upload((header, [bytes(frame) for frame in packed]), lambda outcome: None)

    def _fetch_snapshots(self) -> None:
        if not self.its_flights.bases:
            for fragment in self.layout.fragments:
                if fragment.index not in self.snapshots:
                    self._pull(fragment.index, None)

    def begin(self) -> None:
        """All snapshots are here and adopted: take part."""
        self.its_flights.bases = [self.snapshots[p] for p in range(self.layout.num_scheduled)]
        self._fetch_wanted()
        self.say(pb.SessionRequest(ready=pb.Ready()))

    @property
    def has_snapshots(self) -> bool:
        return self._layout is not None and len(self.snapshots) == len(self._layout.fragments)

    # -- what it carries --

    def _resume(self, versions: Sequence[pb.FragmentVersion]) -> None:
        """Ask again for fates that were perhaps not heard, and fetch what was missed."""
        flights = self.its_flights
        if not flights.bases:
            return
        again = flights.on_versions(versions)
        for fragment in range(self.layout.num_scheduled):
            flight = flights.flight(fragment)
            if flight is not None and (flight in again or flight.outcome is None):
                self._send_flight(flight)
        self._fetch_wanted()

    @property
    def bases(self) -> Sequence[Base]:
        return self.its_flights.bases

    def flight(self, fragment: int) -> Flight | None:
        return self.its_flights.flight(fragment)

    def take(self, fragment: int) -> Arrival | None:
        old = self.bases[fragment]
        arrival = self.its_flights.take(fragment)
        if arrival is not None:
            self._watch.took(self, fragment, old, arrival)
        return arrival

    def push(self, flight: Flight) -> None:
        if not self.its_flights.launch(flight):
            return
        fragment = self.layout.fragments[flight.fragment]
        fmt = Format.FP32 if fragment.role is Role.BUFFER else Format(self.settings.uplink_codec)
        encoded = flight.encode(fmt, self.trainer.rounded(fragment.index, flight.base.theta))
        flight.frames = pack_frames(encoded)
        flight.header = contribution_header(self._identity(), flight, Span.whole(fragment), fmt, flight.frames)
        self.parcels[fragment.index] = parcels_of(flight.header, encoded, min(self._parts, fragment.num_blocks))
        self._watch.pushed(self, flight, [header for header, _ in self.parcels[fragment.index]])
        self._send_flight(flight)

    def _send_flight(self, flight: Flight) -> None:
        parcels = self.parcels[flight.fragment]
        if self._sending.get(flight.fragment) is flight or not self.connected:
            return
        self._sending[flight.fragment] = flight
        outcomes: list[pb.Outcome] = []

        def answered(outcome: pb.Outcome) -> None:
            outcomes.append(outcome)
            if len(outcomes) < len(parcels):
                return
            if self._sending.get(flight.fragment) is flight:
                del self._sending[flight.fragment]
            if self.its_flights.flight(flight.fragment) is flight:
                if self.its_flights.on_outcome(flight, most_telling(outcomes)):
                    self._send_flight(flight)
                self._fetch_wanted()
                self._changed()

        for parcel in parcels:
            self._upload(parcel, answered)

    def _upload(self, parcel: Parcel, answered: Answer) -> None:
        connection = self._connection
        if connection is None:
            return
        header, frames = parcel

        def refused(error: DilocoError) -> None:
            if isinstance(error, RETRY_LATER):
                self._later(RETRY_SECONDS, lambda: self._upload(parcel, answered) if connection.alive else None)
            elif not isinstance(error, RolledBack):  # the welcome that is on its way says what is now
                self._fail(error)

        def begin() -> None:
            try:
                ticket = self._server.begin_push(header, answer)
            except DilocoError as error:
                connection.answer(lambda error=error: refused(error))  # type: ignore[misc]
                return
            if ticket is not None:
                self.traffic.push(header, frames, self.layout.fragments[header.fragment].parameters)
                size = sum(map(len, frames)) * self._wire_scale
                connection.up(size, lambda: finish(ticket))

        def finish(ticket: Ticket) -> None:
            try:
                self._server.finish_push(ticket, frames, answer)
            except DilocoError as error:
                connection.answer(lambda error=error: refused(error))  # type: ignore[misc]

        def answer(outcome: pb.Outcome) -> None:
            connection.answer(lambda: self._on_answer(answered, outcome))

        connection.ask(begin)

    def _on_answer(self, answered: Answer, outcome: pb.Outcome) -> None:
        self._watch.count("answer")
        answered(outcome)

    def _fetch_wanted(self) -> None:
        if self.its_flights.bases:
            for fragment in range(self.layout.num_scheduled):
                base = self.its_flights.wanted(fragment)
                if base is not None or self.its_flights.lacks_base(fragment):
                    self._pull(fragment, base)

    def _pull(self, fragment: int, base: Base | None) -> None:
        connection = self._connection
        if fragment in self._pulling or connection is None:
            return
        self._pulling.add(fragment)
        request = pb.PullRequest(run_id=self.run_id, fragment=fragment, snapshot=base is None)
        if base is not None:
            request.since_version = base.version

        def arrive() -> None:
            try:
                brought = self._server.pull(request)
            except RolledBack:
                return  # the welcome that is on its way says what is now
            size = self.traffic.pull(brought, self.layout.fragments[fragment].parameters)
            connection.down(size * self._wire_scale, lambda: self._on_pulled(request, base, brought))

        connection.ask(arrive)

    def _on_pulled(self, request: pb.PullRequest, base: Base | None, brought: list[Brought]) -> None:
        self._watch.count("pulled")
        if request.run_id != self.run_id:
            return
        fragment = request.fragment
        self._pulling.discard(fragment)
        theta = np.empty(self.layout.fragments[fragment].length, np.float32)
        landed = land(brought, Target(None if base is None else base.theta, theta))
        if landed:
            newer = Base(landed[-1].version, theta)
            self._watch.arrived(self, fragment, newer)
            assert landed[-1].found == landed[-1].digest, "a worker's parameters differ from the server's"
            if self.its_flights.bases:
                self.its_flights.on_arrived(fragment, newer)
            else:
                self.snapshots[fragment] = newer
        self._fetch_wanted()
        self._changed()

    def _identity(self) -> pb.PushHeader:
        return pb.PushHeader(run_id=self.run_id, worker_id=self.worker_id, generation=self.generation)
