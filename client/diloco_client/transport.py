"""gRPC to one server: pushes, pulls and unary calls, with the only retries there are.

Synchronous grpc, called from the client's own threads. Failures of the connection are retried with full
jitter; errors that the server names (`DilocoError`) are raised at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import grpc

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Packed
from diloco_proto.errors import DilocoError, ServerUnreachable
from diloco_proto.wire import error_from_rpc

from .connect import Connector
from .counters import Counters
from .landing import PulledItem, StripesDiffer, Target
from .lines import SESSION, Lines, data_line
from .network import Network
from .pulling import PullStripe, join_stripes, split_pull
from .pushing import PushStripe, most_telling, split_push
from .retry import RETRY_LATER, Retry

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

log = logging.getLogger("diloco")

FAILING_SECONDS = 5.0
"""So long the attempts of a transfer may fail before the server counts as out of reach: what breaks off is mostly taken
up again at once."""

__all__ = ["RETRY_LATER", "Counters", "Retry", "Transport"]


class Stripe(Protocol[T_co]):
    """One stream of a transfer, over all its attempts."""

    progress: int
    """Frames that its attempts have moved so far; the pauses between attempts begin anew with each."""

    def attempt(self) -> T_co: ...


class Transport:
    """The connections to one server: one for the session, one or more for transfers."""

    def __init__(
        self, server: Connector | str | None, retry: Retry | None = None, network: Network | None = None
    ) -> None:
        self._connector = server if isinstance(server, Connector) else Connector(server)
        self.retry = retry or Retry()
        self.network = network or Network()
        self._lines = Lines(self._connector, self.network)
        self._failing: dict[object, float] = {}
        """Transfers whose last attempts came to nothing for lack of a connection: since when."""

    @property
    def address(self) -> str:
        """HOST:PORT, to be shown."""
        return self._connector.target

    @property
    def counters(self) -> Counters:
        return self._lines.counters

    @property
    def out_of_reach(self) -> bool:
        """A transfer has had no connection for more than FAILING_SECONDS."""
        since = min(tuple(self._failing.values()), default=None)
        return since is not None and time.monotonic() - since > FAILING_SECONDS

    @property
    def up_speed(self) -> float | None:
        """Bytes a second of the fastest of the last long pushes; None while there was none."""
        return self._lines.up_speeds.slowest  # of one link

    @property
    def closed(self) -> threading.Event:
        return self._lines.closed

    def close(self) -> None:
        self._lines.close()

    def wait_until_up(self, timeout: float, on_waiting: Callable[[], None]) -> None:
        """Return once the server answers; `on_waiting` is called when that takes more than a moment.

        Raises ServerUnreachable after `timeout` seconds; at once PinMismatch, CertificateError or TLSMismatch.
        """
        self._connector.reach(SESSION, timeout, on_waiting)

    def session(
        self, requests: Iterator[pb.SessionRequest], patience: Callable[[], float] | None = None
    ) -> Iterator[pb.SessionEvent]:
        """One attempt at a session. Raises the typed error, or ConnectionError when the connection broke or the server
        was silent for longer than `patience()` says after each event."""
        first = self.network.progress_timeout
        with self._lines.call(SESSION, lambda stub, _: stub.Session(requests), first) as (call, watch):
            for event in call:
                watch.moved()
                self.counters.down(event.ByteSize())
                yield event
                watch.moved()
                if patience is not None:
                    watch.patience = patience()

    def push(self, header: pb.PushHeader, frames: Sequence[Packed | bytes]) -> pb.Outcome:
        """Push until the server says what became of it. Blocks; raises typed errors that no retry can mend."""
        if min(self.network.data_connections, len(frames)) > 1:
            shares = split_push(header, frames, self.network.data_connections)
            stripes = [PushStripe(self._lines, data_line(i), *share) for i, share in enumerate(shares)]
            outcome = most_telling(self._side_by_side(stripes))
            if outcome.kind != pb.OUTCOME_PART_HELD:
                return outcome
            # Every stripe is held as a part and none completed the whole: there are parts from elsewhere, or the
            # server has started anew in between. To announce all of it once more sends what it lacks.
        return self._retrying(PushStripe(self._lines, data_line(0), header, frames))

    def pull(self, request: pb.PullRequest, target: Target, patience: float | None = None) -> list[PulledItem]:
        """The updates since a version, or a snapshot, applied in `target`. A broken transfer goes on at the frame where
        it broke.

        Raises ServerUnreachable when it still fails after `patience` seconds; None is for ever. Raises CorruptFrame
        unless every item is whole and of legal frames.
        """
        if self.network.data_connections > 1:
            shares = split_pull(request, self.network.data_connections)
            stripes = [PullStripe(self._lines, data_line(i), share, target) for i, share in enumerate(shares)]
            try:
                return join_stripes(self._side_by_side(stripes, patience), target)
            except StripesDiffer as difference:
                log.info("the connections of one pull do not fit together: %s; it is made again over one", difference)
        items = self._retrying(PullStripe(self._lines, data_line(0), request, target), patience)
        return join_stripes([items], target)

    def describe(self, timeout: float) -> pb.RunDescription:
        """Raises ServerUnreachable when nothing answers within `timeout` seconds."""
        description: pb.RunDescription = self._unary("Describe", pb.DescribeRequest(), timeout)
        return description

    def status(self, timeout: float, rounds: int = 0) -> pb.RunStatus:
        """Raises ServerUnreachable when nothing answers within `timeout` seconds."""
        status: pb.RunStatus = self._unary("Status", pb.StatusRequest(rounds=rounds), timeout)
        return status

    def _unary(self, method: str, request: object, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        self._connector.reach(data_line(0), timeout, lambda: None)
        line = self._connector.line(data_line(0))
        try:
            left = max(0.1, deadline - time.monotonic())
            return getattr(line.stub, method)(request, timeout=left, wait_for_ready=True)
        except grpc.RpcError as error:
            named = error_from_rpc(error)
            if named is not None:
                raise named from error
            raise ServerUnreachable(f"no diloco-server answered at {self.address} within {timeout:.0f} s") from error

    def _retrying(self, stripe: Stripe[T], patience: float | None = None) -> T:
        try:
            return self._attempts(stripe, patience)
        finally:
            self._failing.pop(stripe, None)

    def _attempts(self, stripe: Stripe[T], patience: float | None) -> T:
        count, began, progress = 0, time.monotonic(), 0
        while True:
            try:
                return stripe.attempt()
            except (ConnectionError, *RETRY_LATER) as error:
                if stripe.progress > progress or isinstance(error, DilocoError):  # the server was there
                    self._failing.pop(stripe, None)
                else:
                    self._failing.setdefault(stripe, time.monotonic())
                if stripe.progress > progress:
                    count, progress = 0, stripe.progress
                level = logging.INFO if count == 0 else logging.DEBUG
                log.log(level, "a transfer to or from %s broke off and is tried again: %s", self.address, error)
                if patience is not None and time.monotonic() - began > patience:
                    raise ServerUnreachable(f"{self.address} has not answered for {patience:.0f} s: {error}") from error
                if self.closed.wait(self.retry.pause(count)):
                    raise
                count += 1

    def _side_by_side(self, stripes: Sequence[Stripe[T]], patience: float | None = None) -> list[T]:
        """Each on a thread of its own. Raises what the first of them raises that cannot be mended, once all have
        ended."""
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def run(index: int) -> None:
            try:
                results[index] = self._retrying(stripes[index], patience)
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(index,), name=f"diloco-stripe-{index}", daemon=True)
            for index in range(1, len(stripes))
        ]
        for thread in threads:
            thread.start()
        run(0)
        for thread in threads:
            thread.join()
        if errors:
            try:
                raise errors[0]
            finally:
                errors.clear()  # else error and frame hold one another, and with them what was to be moved
        return [results[index] for index in range(len(stripes))]
