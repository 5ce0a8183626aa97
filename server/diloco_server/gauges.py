"""The state of an engine as Prometheus metrics, made afresh at every scrape. Runs on the event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import PROTOCOL_VERSION
from diloco_proto.manifest import Role

from .engine import Engine
from .members import Member, MemberState
from .status import STATES, software, state

GONE_SECONDS = 3600.0
"""So long a worker that is gone keeps its series."""

WORKER_GAUGES: tuple[tuple[str, str, Callable[[Member], float | None]], ...] = (
    ("diloco_worker_step", "Inner steps, in the run's count.", lambda m: m.last.step),
    ("diloco_worker_sync_every", "Its H.", lambda m: m.sync_every),
    ("diloco_worker_loss", "As it last reported.", lambda m: m.last.loss if m.last.HasField("loss") else None),
    (
        "diloco_worker_step_seconds",
        "Of one inner step while it computes.",
        lambda m: 1 / m.speed.steps_per_second if m.speed.steps_per_second else None,
    ),
)

WORKER_COUNTERS: tuple[tuple[str, str, Callable[[Member], float]], ...] = (
    ("diloco_worker_steps", "Inner steps of this process.", lambda m: m.last.steps),
    ("diloco_worker_tokens", "That it has reported.", lambda m: m.last.tokens),
    ("diloco_worker_train_seconds", "Since it began to train.", lambda m: m.last.train_seconds),
    ("diloco_worker_stall_seconds", "In which its training waited.", lambda m: m.last.stall_seconds),
    ("diloco_worker_sent_bytes", "By the worker.", lambda m: m.last.bytes_up),
    ("diloco_worker_received_bytes", "By the worker.", lambda m: m.last.bytes_down),
    ("diloco_worker_counted", "Contributions.", lambda m: m.counted),
    ("diloco_worker_not_counted", "Contributions.", lambda m: m.not_counted),
)


def engine_metrics(engine: Engine) -> list[Metric]:
    """All that can be read off the engine."""
    metrics = [*_run(engine), *_workers(engine), *_fragments(engine)]
    stored = engine.storage() if engine.storage is not None else None
    if stored is not None:
        metrics += _storage(stored)
    return metrics


def _run(engine: Engine) -> Iterable[Metric]:
    run = engine.run
    yield _labelled("diloco_info", "Always 1.", {"version": software(), "protocol": str(PROTOCOL_VERSION)}, 1)
    yield _labelled("diloco_run_info", "Always 1.", {"run_id": run.run_id}, 1)
    now = state(engine)
    states = GaugeMetricFamily("diloco_run_state", "1 for the state that the run is in.", labels=["state"])
    for name in STATES:
        states.add_metric([name], float(name == now))
    yield states
    yield GaugeMetricFamily("diloco_uptime_seconds", "Of the server.", engine.clock() - engine.started_at)
    yield GaugeMetricFamily("diloco_sessions", "Open ones.", engine.sessions)
    yield GaugeMetricFamily("diloco_parameters", "Trained.", _parameters(engine))
    yield CounterMetricFamily("diloco_rounds", "Committed, over all fragments.", run.rounds_committed)
    yield CounterMetricFamily("diloco_tokens", "Behind what was counted.", run.tokens)
    yield CounterMetricFamily("diloco_received_bytes", "Of contributions and seeds.", engine.bytes_in)
    yield CounterMetricFamily("diloco_sent_bytes", "Of updates and snapshots.", engine.bytes_out)


def _parameters(engine: Engine) -> int:
    return sum(f.parameters for f in engine.run.layout.trained) if engine.run.manifest else 0


def _labelled(name: str, help_text: str, labels: dict[str, str], value: float) -> Metric:
    metric = GaugeMetricFamily(name, help_text, labels=list(labels))
    metric.add_metric(list(labels.values()), value)
    return metric


def _workers(engine: Engine) -> Iterable[Metric]:
    now, members = engine.clock(), engine.run.members
    counts = GaugeMetricFamily("diloco_workers", "By state.", labels=["state"])
    for kind in MemberState:
        counts.add_metric([kind.value], len(members.in_state(kind)))
    yield counts
    shown = [m for m in members.all() if m.live or now - m.seen < GONE_SECONDS]
    seen = GaugeMetricFamily("diloco_worker_seen_seconds", "Since it was last heard of.", labels=["worker"])
    up = GaugeMetricFamily("diloco_worker_live", "1, or 0 once it is gone.", labels=["worker"])
    for member in shown:
        seen.add_metric([member.worker_id], now - member.seen)
        up.add_metric([member.worker_id], float(member.live))
    yield from (seen, up)
    for name, text, read in WORKER_GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=["worker"])
        for member in shown:
            value = read(member)
            if value is not None:
                gauge.add_metric([member.worker_id], value)
        yield gauge
    for name, text, count in WORKER_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=["worker"])
        for member in shown:
            counter.add_metric([member.worker_id], count(member))
        yield counter


def _fragments(engine: Engine) -> Iterable[Metric]:
    run, now = engine.run, engine.clock()
    versions = GaugeMetricFamily("diloco_fragment_version", "Outer steps that it has had.", labels=["fragment"])
    sizes = GaugeMetricFamily("diloco_fragment_update_bytes", "Of its last update.", labels=["fragment"])
    open_for = GaugeMetricFamily("diloco_round_open_seconds", "Of the open round.", labels=["fragment"])
    members = GaugeMetricFamily("diloco_round_contributions", "In the open round.", labels=["fragment"])
    missing = GaugeMetricFamily("diloco_round_missing", "Workers that it waits for.", labels=["fragment"])
    norms = GaugeMetricFamily("diloco_round_norm", "Mean norm in the last round.", labels=["fragment"])
    for fragment in run.layout.fragments if run.manifest else ():
        if fragment.role is Role.FROZEN:
            continue
        label = [str(fragment.index)]
        versions.add_metric(label, run.parameters.version(fragment.index))
        sizes.add_metric(label, run.parameters.last_update_bytes(fragment.index))
        current = run.rounds.round(fragment.index)
        if current is not None:
            open_for.add_metric(label, now - current.opened_at)
            members.add_metric(label, len(current.contributions))
            missing.add_metric(label, len(current.missing))
        records = run.rounds.records[fragment.index]
        if records and records[-1].members:
            last = records[-1].members
            norms.add_metric(label, sum(m.norm for m in last) / len(last))
    yield from (versions, sizes, open_for, members, missing, norms)


def _storage(storage: pb.Storage) -> Iterable[Metric]:
    yield GaugeMetricFamily("diloco_journal_bytes", "On disk.", storage.journal_bytes)
    yield GaugeMetricFamily("diloco_journal_segments", "On disk.", storage.journal_segments)
    yield CounterMetricFamily("diloco_journal_written_bytes", "Since the start.", storage.journal_written)
    yield GaugeMetricFamily("diloco_snapshots", "Kept.", storage.snapshots)
    yield GaugeMetricFamily("diloco_snapshot_bytes", "Of all that are kept.", storage.snapshot_bytes)
    yield GaugeMetricFamily("diloco_snapshot_rounds", "Rounds at the newest.", storage.snapshot_rounds)
    yield GaugeMetricFamily("diloco_snapshot_age_seconds", "Of the newest.", storage.snapshot_age_seconds)
    yield GaugeMetricFamily("diloco_disk_free_bytes", "Where the state is.", storage.free_bytes)
    yield GaugeMetricFamily("diloco_storage_trouble", "1 while nothing can be written.", float(bool(storage.trouble)))
