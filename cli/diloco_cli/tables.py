"""Status as rich tables."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table


def status_view(values: dict[str, Any]) -> RenderableType:
    """Tables of workers, fragments and, if they were asked for, past rounds, under a few lines about the run."""
    config, rates = values["config"], values["rates"]
    head = (
        f"run [bold]{values['run_id']}[/bold]  {values['state']}  up {_duration(values['uptime_seconds'])}  "
        f"{_count(values['parameters'])} parameters  {values['sessions']} sessions\n"
        f"{values['rounds']} rounds ({rates['rounds_per_hour']:.0f} an hour)  "
        f"{_count(values['tokens'])} tokens ({_count(rates['tokens_per_second'])}/s)\n"
        f"in {_size(values['bytes_in'])} ({_size(rates['bytes_in_per_second'])}/s)  "
        f"out {_size(values['bytes_out'])} ({_size(rates['bytes_out_per_second'])}/s, "
        f"{rates['bytes_out_per_day'] / 1e9:.2f} GB a day)\n"
        f"H={config['sync_every']} P={config['num_fragments']} τ={config['overlap_steps']} "
        f"α={config['mixing_alpha']}  {config['outer_optimizer']} η={config['outer_lr']} "
        f"μ={config['outer_momentum']}  {config['uplink_codec']} up, {config['downlink_codec']} down"
    )
    if values["stopped"]:
        head += f"\nthe run has had {values['stopped']} and stops"
    head += "".join(f"\n{line}" for line in (*_storage(values["storage"]), *_waits(values["fragments"])))
    tables = [_workers(values["workers"], config), _fragments(values["fragments"])]
    if any(f["rounds"] for f in values["fragments"]):
        tables.append(_rounds(values["fragments"]))
    return Group(head, *tables)


def snapshots_view(snapshots: list[dict[str, Any]]) -> Table:
    """Kept snapshots, oldest first."""
    table = _table("saved at", right=("number", "version"))
    for s in snapshots:
        saved = datetime.fromtimestamp(s["saved_at"]).astimezone()
        table.add_row(f"{saved:%Y-%m-%d %H:%M:%S}", str(s["number"]), str(s["version"]))
    return table


def _storage(storage: dict[str, Any] | None) -> Iterator[str]:
    """Where the run is kept and how much that is; nothing for one in memory only."""
    if storage is None:
        return
    journal = f"journal {_size(storage['journal_bytes'])}, " if storage["durability"] == "journal" else ""
    snapshots = "no snapshot yet"
    if storage["snapshots"]:
        snapshots = (
            f"{storage['snapshots']} snapshots {_size(storage['snapshot_bytes'])}, the last at round "
            f"{storage['snapshot_rounds']}, {_duration(storage['snapshot_age_seconds'])} ago"
        )
    yield f"kept in {escape(storage['directory'])}: {journal}{snapshots}; {_size(storage['free_bytes'])} free"
    if storage["trouble"]:
        yield f"[bold red]nothing is acknowledged: {escape(storage['trouble'])}[/bold red]"


def _waits(fragments: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each fragment whose contributions wait for somebody's."""
    for f in fragments:
        if not f["waits"]:
            continue
        names = escape(", ".join(w["worker_id"] for w in f["waits"]))
        line = f"fragment {f['index']} has waited {_duration(max(w['seconds'] for w in f['waits']))} for {names}"
        bounds = [(w["at_most"], w["bound"]) for w in f["waits"] if w["at_most"] is not None]
        if len(bounds) == len(f["waits"]):
            longest, bound = max(bounds)
            line += f", at most {_duration(longest)} more ({bound})"
        yield line


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


class _FirstThatFits:
    """Of several forms of the same, the first that is no wider than the terminal; else the last."""

    def __init__(self, *forms: RenderableType) -> None:
        self._forms = forms

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbound = options.update(width=1000)
        fitting = (f for f in self._forms if Measurement.get(console, unbound, f).maximum <= options.max_width)
        yield next(fitting, self._forms[-1])


def _workers(workers: list[dict[str, Any]], config: dict[str, str]) -> RenderableType:
    """How they train and what they bring: in one table, or in two where it would squeeze the names."""
    training, bringing = _training(workers, config), _bringing(workers)
    names = [escape(w["worker_id"]) for w in workers]

    def table(*halves: dict[str, list[str]]) -> Table:
        columns = {title: cells for half in halves for title, cells in half.items()}
        text = [title for title in columns if title == "state"]
        made = _table("worker", *text, right=tuple(columns)[len(text) :])
        for row in zip(names, *columns.values(), strict=True):
            made.add_row(*row)
        return made

    return _FirstThatFits(table(training, bringing), Group(table(training), table(bringing)))


def _training(workers: list[dict[str, Any]], config: dict[str, str]) -> dict[str, list[str]]:
    """Columns, by their titles."""
    columns = {
        "state": [w["state"] for w in workers],
        "seen": [_duration(w["seen_seconds"]) for w in workers],
        "step": [str(w["step"]) for w in workers],
        "step/s": [f"{w['steps'] / w['train_seconds']:.2f}" if w["train_seconds"] else "" for w in workers],
        "stall": [f"{w['stall_seconds'] / w['train_seconds']:.1%}" if w["train_seconds"] else "" for w in workers],
    }
    if config["dynamic_local_updates"] == "true":
        columns["H"] = [str(w["sync_every"]) for w in workers]
    if any(w["loss"] is not None for w in workers):
        columns["loss"] = ["" if w["loss"] is None else f"{w['loss']:.3f}" for w in workers]
    return columns


def _bringing(workers: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Columns, by their titles."""
    return {
        "up": [_size(w["bytes_up"]) for w in workers],
        "down": [_size(w["bytes_down"]) for w in workers],
        "counted": [str(w["counted"]) for w in workers],
        "not": [str(w["not_counted"]) for w in workers],
    }


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
