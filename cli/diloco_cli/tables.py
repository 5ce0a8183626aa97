"""Status as rich tables."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table


def status_view(values: dict[str, Any]) -> RenderableType:
    """Tables of workers, fragments and, if they were asked for, past rounds, under a few lines about the run."""
    config = values["config"]
    hours = max(values["uptime_seconds"], 1e-9) / 3600
    head = (
        f"run [bold]{values['run_id']}[/bold]  {values['state']}  up {_duration(values['uptime_seconds'])}  "
        f"{_count(values['parameters'])} parameters\n"
        f"{values['rounds']} rounds ({values['rounds'] / hours:.0f} an hour)  "
        f"in {_size(values['bytes_in'])}  out {_size(values['bytes_out'])}\n"
        f"H={config['sync_every']} P={config['num_fragments']} τ={config['overlap_steps']} "
        f"α={config['mixing_alpha']}  {config['outer_optimizer']} η={config['outer_lr']} "
        f"μ={config['outer_momentum']}  {config['uplink_codec']} up, {config['downlink_codec']} down"
    )
    if values["stopped"]:
        head += f"\nthe run has had {values['stopped']} and stops"
    tables = [_workers(values["workers"], config), _fragments(values["fragments"])]
    if any(f["rounds"] for f in values["fragments"]):
        tables.append(_rounds(values["fragments"]))
    return Group(head, *tables)


def _table(*left: str, right: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> Table:
    """A table that fits 80 columns: text to the left, numbers to the right, then more text."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for name in last:
        table.add_column(name, overflow="fold")
    return table


def _workers(workers: list[dict[str, Any]], config: dict[str, str]) -> Table:
    paced = config["dynamic_local_updates"] == "true"
    lossy = any(w["loss"] is not None for w in workers)
    numbers = ["seen", "step", "step/s", "stall", "up", "down", "counted", "not"]
    table = _table("worker", "state", right=(*numbers, *["H"] * paced, *["loss"] * lossy))
    for w in workers:
        more = [str(w["sync_every"])] * paced + ["" if w["loss"] is None else f"{w['loss']:.3f}"] * lossy
        seconds = w["train_seconds"]
        table.add_row(
            escape(w["worker_id"]),
            w["state"],
            _duration(w["seen_seconds"]),
            str(w["step"]),
            f"{w['steps'] / seconds:.2f}" if seconds else "",
            f"{w['stall_seconds'] / seconds:.1%}" if seconds else "",
            _size(w["bytes_up"]),
            _size(w["bytes_down"]),
            str(w["counted"]),
            str(w["not_counted"]),
            *more,
        )
    return table


def _fragments(fragments: list[dict[str, Any]]) -> Table:
    numbers = ("parameters", "version", "round", "update", "bits")
    table = _table("fragment", right=numbers, last=("contributed", "waiting for"))
    for f in fragments:
        trained = f["kind"] == "trained"
        table.add_row(
            str(f["index"]) if trained else f"{f['index']} ({f['kind']})",
            _count(f["parameters"]),
            str(f["version"]),
            _duration(f["round_seconds"]) if f["version"] else "",
            _size(f["update_bytes"]) if f["version"] else "",
            f"{8 * f['update_bytes'] / f['parameters']:.2f}" if f["version"] else "",
            escape(", ".join(f["contributed"])),
            escape(", ".join(f["waiting_for"])),
        )
    return table


def _rounds(fragments: list[dict[str, Any]]) -> Table:
    """Who was in each round, with its share of the mean, and who was missed."""
    table = _table("fragment", right=("version", "open"), last=("counted", "missed"))
    for f in fragments:
        for r in f["rounds"]:
            members = [f"{m['worker_id']} {m['weight']:.2f}{_scaled(m['scale'])}" for m in r["members"]]
            table.add_row(
                str(f["index"]),
                str(r["version"]),
                _duration(r["open_seconds"]),
                escape(", ".join(members)),
                escape(", ".join(r["missed"])),
            )
    return table


def _scaled(scale: float) -> str:
    return "" if scale == 1.0 else f" (scaled by {scale:.2g})"


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


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
