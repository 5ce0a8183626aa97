"""Status as rich tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table


def status_view(values: dict[str, Any]) -> RenderableType:
    """Two tables, workers and fragments, under one line about the run."""
    config = values["config"]
    hours = max(values["uptime_seconds"], 1e-9) / 3600
    head = (
        f"run [bold]{values['run_id']}[/bold]  {values['state']}  up {_duration(values['uptime_seconds'])}  "
        f"{values['parameters'] / 1e6:.2f} M parameters  {values['rounds']} rounds ({values['rounds'] / hours:.0f}/h)  "
        f"in {_size(values['bytes_in'])}  out {_size(values['bytes_out'])}\n"
        f"H={config['sync_every']} P={config['num_fragments']} τ={config['overlap_steps']} α={config['mixing_alpha']}  "
        f"{config['outer_optimizer']} η={config['outer_lr']} μ={config['outer_momentum']}  "
        f"{config['uplink_codec']} up, {config['downlink_codec']} down"
    )
    return Group(head, _workers(values["workers"]), _fragments(values["fragments"]))


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = Table("worker", "state", title="workers", title_justify="left")
    for name in ("seen", "step", "steps/s", "stalled", "up", "down", "counted", "not"):
        table.add_column(name, justify="right")
    for w in workers:
        seconds = w["train_seconds"]
        table.add_row(
            w["worker_id"],
            w["state"],
            f"{_duration(w['seen_seconds'])} ago",
            str(w["step"]),
            f"{w['step'] / seconds:.2f}" if seconds else "",
            f"{w['stall_seconds'] / seconds:.1%}" if seconds else "",
            _size(w["bytes_up"]),
            _size(w["bytes_down"]),
            str(w["counted"]),
            str(w["not_counted"]),
        )
    return table


def _fragments(fragments: list[dict[str, Any]]) -> Table:
    table = Table(title="fragments", title_justify="left")
    for name in ("#", "parameters", "version", "last round", "update", "bits"):
        table.add_column(name, justify="right")
    table.add_column("contributed")
    table.add_column("waiting for")
    for f in fragments:
        trained = f["kind"] == "trained"
        table.add_row(
            str(f["index"]) if trained else f"{f['index']} ({f['kind']})",
            f"{f['parameters']:,}",
            str(f["version"]),
            _duration(f["round_seconds"]) if f["version"] else "",
            _size(f["update_bytes"]) if f["version"] else "",
            f"{8 * f['update_bytes'] / f['parameters']:.2f}" if f["version"] else "",
            ", ".join(f["contributed"]),
            ", ".join(f["waiting_for"]),
        )
    return table


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
