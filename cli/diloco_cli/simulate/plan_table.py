"""The options of a plan, and how its outcome is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from diloco_server.config import RunConfig

from .plan import Plan, Planned, Share

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

SETTINGS = (
    "sync_every",
    "num_fragments",
    "overlap_steps",
    "grace_seconds",
    "outer_optimizer",
    "uplink_codec",
    "downlink_codec",
    "min_workers",
    "lease_seconds",
    "dynamic_local_updates",
)
"""Fields of RunConfig that matter to a plan."""

DAY = 86400.0
GB = 1e9


def plan_options(command: Decorated) -> Decorated:
    """Add the options of a plan."""
    for f in reversed(dataclasses.fields(RunConfig)):
        if f.name in SETTINGS:
            command = _setting(f)(command)
    inf = float("inf")
    for flag, default, text in reversed(
        (
            ("--workers", 4, "Plan: workers."),
            (
                "--step-seconds",
                "1",
                "Plan: seconds of an inner step, dealt out to the workers in turn: 0.5,0.5,1.",
            ),
            ("--parameters", 1e9, "Plan: parameters of the model."),
            ("--latency", 0.05, "Plan: seconds one way."),
            ("--mbit-up", inf, "Plan: of a worker's line."),
            ("--mbit-down", inf, "Plan: of a worker's line."),
            ("--commit-seconds", 0.0, "Plan: seconds an outer step takes."),
            ("--mtbf-hours", inf, "Plan: a worker dies after so many hours, on average."),
            ("--rejoin-minutes", 5.0, "Plan: and comes back so much later."),
        )
    ):
        command = click.option(flag, default=default, show_default=True, type=type(default), help=text)(command)
    return command


def _setting(f: dataclasses.Field[Any]) -> Callable[[Decorated], Decorated]:
    flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
    if isinstance(f.default, bool):
        return click.option(flag, is_flag=True, default=f.default, help=text)
    choices = f.metadata["choices"]
    kind: Any = click.Choice(choices) if choices else type(f.default)
    return click.option(flag, type=kind, default=f.default, show_default=True, help=text)


def show_plan(plan: Plan, planned: Planned, as_json: bool) -> None:
    """Print it."""
    if as_json:
        click.echo(json.dumps(as_dict(plan, planned)))
        return
    numbers = as_dict(plan, planned)
    console = Console()
    summary = Table(show_header=False)
    for name, text in (
        ("rounds an hour (every fragment)", f"{numbers['rounds_per_hour']:.2f}"),
        ("share of compute used, of time in the run", f"{numbers['compute_used']:.1%}"),
        ("… of paid time, joining included", f"{numbers['compute_used_of_paid']:.1%}"),
        ("… of all time, being down included", f"{numbers['compute_used_of_all']:.1%}"),
        ("share of contributions counted", f"{numbers['contributions_counted']:.1%}"),
        ("server: GB a day out, in", f"{numbers['server_gb_out_per_day']:.1f}, {numbers['server_gb_in_per_day']:.1f}"),
    ):
        summary.add_row(name, text)
    console.print(summary)
    table = Table(
        "worker", "s a step", "H", "steps", "used", "counted", "not", "deaths", "GB up a day", "GB down a day"
    )
    for worker in numbers["workers"]:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in worker.values()))
    console.print(table)


def as_dict(plan: Plan, planned: Planned) -> dict[str, Any]:
    """The numbers of a plan."""
    shares, days = planned.shares, planned.seconds / DAY
    computed = sum(s.computed for s in shares)
    counted, missed = sum(s.counted for s in shares), sum(s.not_counted for s in shares)
    return {
        "hours": plan.hours,
        "rounds_per_hour": planned.rounds / plan.hours,
        "compute_used": _ratio(computed, computed + sum(s.stalled for s in shares)),
        "compute_used_of_paid": _ratio(computed, sum(s.alive for s in shares)),
        "compute_used_of_all": _ratio(computed, planned.seconds * len(shares)),
        "contributions_counted": _ratio(counted, counted + missed),
        "server_gb_out_per_day": planned.server_up / GB / days,
        "server_gb_in_per_day": planned.server_down / GB / days,
        "workers": [_row(s, days) for s in shares],
    }


def _row(share: Share, days: float) -> dict[str, Any]:
    return {
        "worker": share.worker_id,
        "step_seconds": share.step_seconds,
        "sync_every": share.sync_every,
        "steps": share.steps,
        "compute_used": _ratio(share.computed, share.computed + share.stalled),
        "counted": share.counted,
        "not_counted": share.not_counted,
        "deaths": share.deaths,
        "gb_up_per_day": share.bytes_up / GB / days,
        "gb_down_per_day": share.bytes_down / GB / days,
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
