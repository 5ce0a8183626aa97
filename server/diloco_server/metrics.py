"""What Prometheus is told: events as they happen, and the state of the engine whenever somebody scrapes.

Every name is in docs/operating.md, with its meaning.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    start_http_server,
)
from prometheus_client.metrics_core import Metric

from diloco_proto import outer_pb2 as pb

from .round import RoundRecord

SCRAPE_SECONDS = 5.0
"""A scrape fails when the event loop does not answer for so long; Prometheus then shows the server as down."""

SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0)
NORMS = tuple(float(f"{m}e{e}") for e in range(-4, 5) for m in (1, 3))

FATES = ("counted", "missed", "overflowed")

OUTCOMES = {kind: name.removeprefix("OUTCOME_").lower() for name, kind in pb.OutcomeKind.items() if kind}

METHODS = ("Session", "Push", "Pull", "Describe", "Status", "Check", "Watch")

OTHER = "other"
"""Label of a method that a caller has made up: labels must be bounded."""


class Registry(CollectorRegistry):
    """Without the `_created` series: one beside every counter, of no use in the text format."""

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class Metrics:
    """The counters of one server. Any thread may call the methods."""

    def __init__(self) -> None:
        self.registry = registry = Registry()
        ProcessCollector(registry=registry)
        self._rounds = Histogram("diloco_round_seconds", "From opening to commit.", registry=registry, buckets=LONG)
        self._fill = Histogram(
            "diloco_round_fill_seconds", "From first to last contribution.", registry=registry, buckets=LONG
        )
        self._grace = Histogram("diloco_round_grace_seconds", "From quorum to close.", registry=registry, buckets=LONG)
        self._commits = Histogram("diloco_commit_seconds", "The outer step.", registry=registry, buckets=SHORT)
        self._contributions = Counter("diloco_contributions", "By fate.", ["fate"], registry=registry)
        self._scaled = Counter("diloco_contributions_scaled", "Beyond max_outer_grad_norm.", registry=registry)
        self._norms = Histogram(
            "diloco_outer_gradient_norm", "L2 norms of counted contributions.", registry=registry, buckets=NORMS
        )
        self._pushes = Counter("diloco_pushes", "By what they were answered.", ["outcome"], registry=registry)
        self._fsyncs = Histogram("diloco_fsync_seconds", "Of the journal.", registry=registry, buckets=SHORT)
        self._snapshots = Histogram("diloco_snapshot_seconds", "To write one.", registry=registry, buckets=LONG)
        self._calls = Counter("diloco_calls", "Calls that have ended.", ["method", "code"], registry=registry)
        self._open = Gauge("diloco_open_calls", "Calls under way.", ["method"], registry=registry)
        self._refused = Counter("diloco_refused_calls", "By error.", ["error"], registry=registry)
        for fate in FATES:
            self._contributions.labels(fate)
        for outcome in OUTCOMES.values():
            self._pushes.labels(outcome)
        for method in METHODS:
            self._open.labels(method)

    def on_round(self, record: RoundRecord, commit_seconds: float, overflowed: Iterable[str] = ()) -> None:
        """A round is over; the contributions of the workers `overflowed` were in it, but their mean was not finite."""
        void = set(overflowed)
        self._rounds.observe(record.open_seconds)
        self._fill.observe(record.fill_seconds)
        self._grace.observe(record.grace_seconds)
        self._commits.observe(commit_seconds)
        self._contributions.labels("counted").inc(len(record.members))
        self._contributions.labels("missed").inc(len(set(record.missed) - void))
        self._contributions.labels("overflowed").inc(len(void))
        for member in record.members:
            self._norms.observe(member.norm)
            if member.scale < 1.0:
                self._scaled.inc()

    def on_push(self, outcome: pb.Outcome) -> None:
        """A push was answered."""
        self._pushes.labels(OUTCOMES.get(outcome.kind, OTHER)).inc()

    def on_fsync(self, seconds: float) -> None:
        """The journal was brought to disk."""
        self._fsyncs.observe(seconds)

    def on_snapshot(self, seconds: float) -> None:
        """A snapshot is complete."""
        self._snapshots.observe(seconds)

    def on_call(self, method: str) -> None:
        """A call has begun; `on_call_end` must follow."""
        self._open.labels(_known(method)).inc()

    def on_call_end(self, method: str, code: str, error: str = "") -> None:
        """A call has ended with a status and, if the server refused it, the class of a typed error."""
        self._open.labels(_known(method)).dec()
        self._calls.labels(_known(method), code).inc()
        if error:
            self._refused.labels(error).inc()

    def attach(self, read: Callable[[], list[Metric]], loop: asyncio.AbstractEventLoop) -> None:
        """Let every scrape also have what `read` gives, called on the event loop, where the engine lives."""
        self.registry.register(_OnLoop(read, loop))

    def text(self) -> str:
        """What a scrape gets. Not on the event loop, which it asks."""
        return generate_latest(self.registry).decode()


def _known(method: str) -> str:
    return method if method in METHODS else OTHER


class _OnLoop:
    """A collector for Prometheus whose work is done on an event loop."""

    def __init__(self, read: Callable[[], list[Metric]], loop: asyncio.AbstractEventLoop) -> None:
        self._read = read
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        """Raises TimeoutError when the loop does not answer."""
        answer: Future[list[Metric]] = Future()

        def on_loop() -> None:
            try:
                answer.set_result(self._read())
            except BaseException as error:
                answer.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(on_loop)
        except RuntimeError:  # the loop is closed: the server has stopped
            return []
        return answer.result(SCRAPE_SECONDS)


class Exporter:
    """An HTTP server for Prometheus, on a thread of its own: /metrics of one server.

    Raises OSError when it cannot listen. Port 0 picks a free one; `port` has the real one.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        self._server, self._thread = start_http_server(port, host, metrics.registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Takes up to half a second, and must not be called on the event loop that a scrape may be waiting for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
