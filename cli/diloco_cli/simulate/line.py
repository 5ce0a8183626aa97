"""What lies between a worker and the server: delay, bandwidth, and cuts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .clock import Action, Clock, Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of a line."""

    latency: float = 0.0
    """Seconds, one way."""
    up: float = float("inf")
    """Bytes a second."""
    down: float = float("inf")

    def round_trip(self, size: float) -> float:
        """Seconds for `size` bytes both ways, alone on the line."""
        return 2 * self.latency + size / self.up + size / self.down


class Line:
    """One worker's line; it carries one connection at a time.

    A transfer begins when the former one in its direction is over. Arrivals go through the gates of the two processes.
    """

    def __init__(
        self,
        clock: Clock,
        speed: Speed,
        server: Callable[[], Gate] = Gate,
        worker: Gate | None = None,
        jitter: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.speed = speed
        self.jitter = jitter
        """Seconds more that the next message of a call takes. Those of a session stay in order."""
        self.clock = clock
        self.server = server
        """The gate of the server's process of this moment."""
        self.worker = worker or Gate()
        self.broken = False
        """No connection can be made."""
        self.up_free = 0.0
        self.down_free = 0.0

    def connect(self) -> Connection:
        self.up_free = self.down_free = self.clock.now
        return Connection(self)


class Connection:
    """From a connect to a cut. What is on its way down when it is cut does not arrive; what is on its way up may
    still arrive, later, if it had left before. It ends at one process of the server, and nothing reaches another."""

    def __init__(self, line: Line) -> None:
        self.alive = True
        self._line = line
        self._server = line.server()
        self._cut_at = 0.0
        self._lag: float | None = None

    def cut(self, lag: float | None = None) -> None:
        """`lag`: what has left the worker arrives so many seconds late; None: never."""
        if self.alive:
            self.alive = False
            self._cut_at, self._lag = self._line.clock.now, lag

    def up(self, size: float, arrive: Action) -> None:
        """Carry `size` bytes to the server."""
        line = self._line
        line.up_free = max(line.up_free, line.clock.now) + size / line.speed.up
        self._carry_up(line.up_free, arrive)

    def down(self, size: float, arrive: Action) -> None:
        """Carry `size` bytes to the worker."""
        line = self._line
        line.down_free = max(line.down_free, line.clock.now) + size / line.speed.down
        self._carry_down(line.down_free, arrive)

    def say(self, arrive: Action) -> None:
        """Carry a message of the session to the server."""
        self._carry_up(self._line.clock.now, arrive)

    def tell(self, arrive: Action) -> None:
        """Carry a message of the session to the worker."""
        self._carry_down(self._line.clock.now, arrive)

    def ask(self, arrive: Action) -> None:
        """Carry the beginning of a call to the server."""
        self._carry_up(self._line.clock.now, arrive, self._line.jitter())

    def answer(self, arrive: Action) -> None:
        """Carry the small answer to a call to the worker."""
        self._carry_down(self._line.clock.now, arrive, self._line.jitter())

    def _carry_up(self, sent: float, arrive: Action, more: float = 0.0) -> None:
        if not self.alive:
            return
        line = self._line

        def deliver() -> None:
            if self.alive:
                self._server(arrive)
            elif self._lag is not None and sent <= self._cut_at:
                line.clock.after(self._lag, lambda: self._server(arrive))

        line.clock.after(sent - line.clock.now + line.speed.latency + more, deliver)

    def _carry_down(self, sent: float, arrive: Action, more: float = 0.0) -> None:
        if not self.alive:
            return
        line = self._line

        def deliver() -> None:
            if self.alive:
                line.worker(lambda: arrive() if self.alive else None)

        line.clock.after(sent - line.clock.now + line.speed.latency + more, deliver)
