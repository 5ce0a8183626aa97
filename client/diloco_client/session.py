"""A worker's membership: one thread that says hello, beats, hands on events, and comes back after a cut."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import PROTOCOL_VERSION
from diloco_proto.errors import DilocoError
from diloco_proto.manifest import Manifest
from diloco_proto.wire import manifest_to_pb

from .transport import RETRY_LATER, Transport

log = logging.getLogger("diloco")

SILENT_BEATS = 3.0
"""Heartbeats without an answer; then the session is taken up anew, before the lease of 5 of them runs out."""

LEAST_SILENCE = 5.0
"""Seconds. With a shorter lease a busy machine would look like a broken link."""


def stem(run_id: str) -> str:
    """A run id without its lineage: `STEM` at first, `STEM.N` after the n-th rollback."""
    return run_id.partition(".")[0]


class Membership(Protocol):
    """A worker's place in a run, as one of its processes has it."""

    worker_id: str
    generation: int
    run_id: str

    def start(self) -> None: ...
    def stay(self) -> None: ...
    def say(self, request: pb.SessionRequest) -> None: ...
    def close(self, reason: str, timeout: float = 5.0) -> None: ...


class Session:
    """Keeps the worker in the run until `close`.

    `on_event` gets every event but beats and the first Welcome of each connection, on this session's thread;
    `on_welcome` gets those. `former_run` is the run that a former process was in. `on_lost` is told when the
    connection breaks, and `on_fatal` gets an error that no new attempt can mend. `beat` makes a heartbeat.

    A run that has no parameters yet is forgotten when its server dies: a worker that waits for them says hello to
    whatever run there is. From `stay` on it wants the one that it is in.
    """

    def __init__(
        self,
        transport: Transport,
        worker_id: str,
        generation: int,
        manifest: Manifest,
        *,
        former_run: str = "",
        beat: Callable[[], pb.Heartbeat],
        on_welcome: Callable[[pb.Welcome], None],
        on_event: Callable[[pb.SessionEvent], None],
        on_lost: Callable[[], None],
        on_fatal: Callable[[DilocoError], None],
    ) -> None:
        self.worker_id = worker_id
        self.generation = generation
        self.run_id = former_run
        """Of the last welcome; before the first, of the former process."""
        self._stays = bool(former_run)
        self._transport = transport
        self._manifest = manifest
        self._beat = beat
        self._on_welcome = on_welcome
        self._on_event = on_event
        self._on_lost = on_lost
        self._on_fatal = on_fatal
        self._heartbeat_seconds = 1.0
        self._outgoing: queue.Queue[pb.SessionRequest | None] = queue.Queue()
        self._standing: pb.SessionRequest | None = None
        self._saying = threading.Lock()
        self._lost_at: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diloco-session", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stay(self) -> None:
        """The worker has taken the run's parameters: it belongs to no other run any more."""
        self._stays = True

    def say(self, request: pb.SessionRequest) -> None:
        """Send ready, finishing or finished; said again whenever the session is taken up anew."""
        with self._saying:
            self._standing = request
            self._outgoing.put(request)

    def _say_again(self) -> None:
        with self._saying:  # else what is said in this moment could be followed by what was said before it
            if self._standing is not None:
                self._outgoing.put(self._standing)

    def close(self, reason: str, timeout: float = 5.0) -> None:
        """Leave the run."""
        self._closing.set()
        if self._thread.is_alive():
            self._outgoing.put(pb.SessionRequest(heartbeat=self._beat()))
            self._outgoing.put(pb.SessionRequest(leave=pb.Leave(reason=reason)))
            self._outgoing.put(None)
            self._thread.join(timeout)

    def _run(self) -> None:
        attempt = 0
        while not self._closing.is_set():
            try:
                for event in self._transport.session(self._requests(), self._patience):
                    attempt = 0
                    self._handle(event)
                if self._closing.is_set():
                    return
                lost = "the server ended the session"
            except (ConnectionError, *RETRY_LATER) as error:
                lost = str(error)
            except DilocoError as error:
                self._on_fatal(error)
                return
            except Exception as error:
                if not self._closing.is_set():
                    log.exception("the session of diloco failed")
                    self._on_fatal(DilocoError(f"the session of diloco failed: {error!r}; please report this"))
                return
            if self._closing.is_set():
                return
            if attempt == 0:
                log.warning("lost the server at %s (%s); training goes on", self._transport.address, lost)
            self._lost_at = self._lost_at or time.monotonic()
            self._on_lost()
            if self._closing.wait(self._transport.retry.pause(attempt)):
                return
            attempt += 1

    def _handle(self, event: pb.SessionEvent) -> None:
        if event.HasField("welcome"):
            if self._lost_at is not None and self.run_id == event.welcome.run_id:
                away = time.monotonic() - self._lost_at
                log.warning("back in run %s at %s after %.0f s", self.run_id, self._transport.address, away)
            self._lost_at = None
            self.run_id = event.welcome.run_id
            self._heartbeat_seconds = event.welcome.heartbeat_seconds
            self._say_again()
            self._on_welcome(event.welcome)
        elif not event.HasField("beat"):
            self._on_event(event)

    def _patience(self) -> float:
        """How long the server, which answers every heartbeat, may be silent."""
        return max(SILENT_BEATS * self._heartbeat_seconds, LEAST_SILENCE)

    def _requests(self) -> Iterator[pb.SessionRequest]:
        """Hello, then what is to be said, with heartbeats in between. Ends with the connection."""
        outgoing: queue.Queue[pb.SessionRequest | None] = queue.Queue()
        self._outgoing, former = outgoing, self._outgoing
        former.put(None)  # the generator of a broken connection ends
        yield self._counted(
            pb.SessionRequest(
                hello=pb.Hello(
                    protocol=PROTOCOL_VERSION,
                    worker_id=self.worker_id,
                    generation=self.generation,
                    manifest=manifest_to_pb(self._manifest),
                    run_id=self.run_id if self._stays else "",
                )
            )
        )
        while True:
            try:
                request = outgoing.get(timeout=self._heartbeat_seconds)
            except queue.Empty:
                request = pb.SessionRequest(heartbeat=self._beat())
            if request is None:
                return
            yield self._counted(request)

    def _counted(self, request: pb.SessionRequest) -> pb.SessionRequest:
        self._transport.counters.up(request.ByteSize())
        return request
