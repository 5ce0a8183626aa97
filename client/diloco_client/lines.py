"""Calls over the connections to one server: each watched, its bytes counted, its failures named."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from diloco_proto.speeds import Speeds

from .connect import Connector, Line
from .counters import Counters
from .network import Network, Throttle
from .retry import Stalled, translate
from .watch import Watch, Watchdog

SESSION = "session"

_SLICE = 1.0
"""Seconds. A call that waits for its turn under a limit of speed says so often that it has not come to a stop."""


def data_line(index: int) -> str:
    """Name of a connection for transfers."""
    return f"data-{index}"


class Lines:
    """The connections of one transport. One on which a call fails is given up for new calls: the next attempt resolves
    the server's name anew and connects. It is closed when its last call has ended."""

    def __init__(self, connector: Connector, network: Network) -> None:
        self.connector = connector
        self.network = network
        self.counters = Counters()
        self.up_speeds = Speeds()
        self.closed = threading.Event()
        self.watchdog = Watchdog()
        self._up = Throttle(network.upload_limit)
        self._down = Throttle(network.download_limit)
        self._users: Counter[Line] = Counter()
        self._lock = threading.Lock()

    def close(self) -> None:
        self.closed.set()
        self.connector.close()

    @contextmanager
    def call(self, name: str, start: Callable[[Any, Watch], Any], patience: float) -> Iterator[tuple[Any, Watch]]:
        """One streaming call on the line of that name: `start` makes it from the stub.

        It is cancelled at the end of the block, and when nothing has moved for `patience` seconds. Raises the typed
        error of the server; Stalled or another ConnectionError when the connection is to blame.
        """
        with self._using(name) as line:
            watch = self.watchdog.begin(patience)
            try:
                call = start(line.stub, watch)
            except ValueError as error:  # gRPC's word for a channel that was closed in this moment
                self.watchdog.end(watch)
                raise ConnectionError(f"the connection was closed: {error}") from error
            watch.guard(call.cancel)
            try:
                yield call, watch
            except grpc.RpcError as error:
                raise self._failure(line, watch, error) from error
            finally:
                self.watchdog.end(watch)
                call.cancel()

    def sent(self, size: int) -> None:
        self.counters.up(size)

    def received(self, size: int) -> None:
        self.counters.down(size)

    def before_sending(self, size: int, watch: Watch, stop: threading.Event) -> None:
        """Wait until so many bytes may go up; ends early with `stop`."""
        _wait(self._up.reserve(size), watch, stop)

    def after_receiving(self, size: int, watch: Watch) -> None:
        """Wait until more may come down: what is not read here is soon not sent there."""
        _wait(self._down.reserve(size), watch, self.closed)

    @contextmanager
    def _using(self, name: str) -> Iterator[Line]:
        line = self.connector.line(name)
        with self._lock:
            self._users[line] += 1
        try:
            yield line
        finally:
            with self._lock:
                self._users[line] -= 1
                unused = not self._users[line]
                if unused:
                    del self._users[line]
            if unused:
                self.connector.unused(line)

    def _failure(self, line: Line, watch: Watch, error: grpc.RpcError) -> Exception:
        failure = Stalled(watch.why) if watch.why else self.connector.failed(line, error) or translate(error)
        if type(failure) in (ConnectionError, Stalled):  # a server's own ConnectionClosed says nothing of the line
            self.connector.drop(line)
        return failure


def _wait(seconds: float, watch: Watch, stop: threading.Event) -> None:
    while seconds > 0:
        watch.moved()
        if stop.wait(min(seconds, _SLICE)):
            return
        seconds -= _SLICE
    watch.moved()
