"""The demo's result: its figures, the table, report.json and loss.png."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from diloco_client.demo.options import DemoOptions
from diloco_client.demo.progress import Progress, weighted_mean

FP32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a demo measured. Losses are on held-out files, in nats a byte."""

    parameters: int
    workers: int
    steps: int
    sync_every: int
    num_fragments: int
    overlap_steps: int
    mixing_alpha: float
    codec: str
    seed: int
    initial_loss: float
    """Of the parameters everybody starts from."""
    alone_loss: float
    """Of the lone worker after as many steps."""
    global_loss: float
    """Of θ after the last round."""
    bits_up: float
    """Wire bits a parameter a sync, of the worker with most; framing and scales included."""
    bits_down: float
    bytes_up: int
    """Of the worker that moved most in both directions together, everything from joining to leaving."""
    bytes_down: int
    data_parallel_bytes: int
    """What fp32 data-parallel training of the same steps would have moved, a worker."""
    reduction: float
    """How many times less a worker moved than that."""
    stall: float
    """Part of their training time that the workers waited for the server, the mean."""
    identical: bool
    """Whether θ on the server and the base of every worker agree bit for bit after the last round."""
    seconds: float
    """The whole demo, from start to report."""
    global_curve: dict[int, float]
    """Step -> validation loss of θ."""
    alone_curve: dict[int, float]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))


def data_parallel_bytes(parameters: int, steps: int) -> int:
    """What a worker of fp32 data-parallel training moves: each step its gradient up, and the mean down."""
    return 2 * FP32_BYTES * parameters * steps


def same_everywhere(server: Mapping[str, str], workers: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether every worker's digests of its fragments are the server's; fragment -> digest, all as text."""
    return bool(server) and all(dict(digests) == dict(server) for digests in workers.values())


def make_report(options: DemoOptions, progress: Progress, server_digests: Mapping[str, str], seconds: float) -> Report:
    """The figures of a demo whose processes are all done. `server_digests`: fragment -> digest of θ."""
    finals = [track.final for track in progress.workers.values()]
    worst = max(finals, key=lambda final: final["up"] + final["down"])
    reference = data_parallel_bytes(progress.parameters(), options.steps)
    return Report(
        parameters=progress.parameters(),
        workers=options.workers,
        steps=options.steps,
        sync_every=options.sync_every,
        num_fragments=options.num_fragments,
        overlap_steps=options.overlap_steps,
        mixing_alpha=options.mixing_alpha,
        codec=options.codec,
        seed=options.seed,
        initial_loss=progress.initial_loss(),
        alone_loss=progress.alone.final["loss"],
        global_loss=weighted_mean((final["loss"], final["windows"]) for final in finals),
        bits_up=max(final["bits_up"] for final in finals),
        bits_down=max(final["bits_down"] for final in finals),
        bytes_up=worst["up"],
        bytes_down=worst["down"],
        data_parallel_bytes=reference,
        reduction=reference / (worst["up"] + worst["down"]),
        stall=sum(track.stall_share for track in progress.workers.values()) / len(finals),
        identical=same_everywhere(
            server_digests, {name: track.final["digests"] for name, track in progress.workers.items()}
        ),
        seconds=seconds,
        global_curve=progress.global_curve(),
        alone_curve=progress.alone_curve(),
    )


def table(report: Report) -> Table:
    """The figures for people."""
    moved = f"{megabytes(report.bytes_up)} up, {megabytes(report.bytes_down)} down"
    title = f"{report.workers} workers, {report.steps} steps, {report.codec} both ways"
    out = Table(title=title, show_header=False)
    out.add_column()
    out.add_column(justify="right")
    rows = {
        "validation loss at the start": f"{report.initial_loss:.3f} nats a byte",
        "one worker alone": f"{report.alone_loss:.3f}",
        f"{report.workers} workers, global parameters": f"{report.global_loss:.3f}",
        "moved by the worker that moved most": moved,
        "fp32 data parallel, same steps": megabytes(report.data_parallel_bytes),
        "ratio": f"{report.reduction:.0f} times less",
        "bits a parameter and sync": f"{report.bits_up:.2f} up, {report.bits_down:.2f} down",
        "time stalled": f"{report.stall:.1%}",
        "server and workers bit-identical": "yes" if report.identical else "NO",
        "seconds": f"{report.seconds:.0f}",
    }
    for name, value in rows.items():
        out.add_row(name, value)
    return out


def megabytes(count: float) -> str:
    """Bytes as MB, 10^6."""
    return f"{count / 1e6:.1f} MB"


def save(report: Report, progress: Progress, out: Path) -> None:
    """Writes report.json and loss.png into `out`."""
    (out / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    draw(report, progress, out / "loss.png")


def draw(report: Report, progress: Progress, path: Path) -> None:
    """Loss against steps: training loss of each worker, validation loss of θ and of the lone worker."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed only here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for name, track in progress.workers.items():
        steps = range(1, len(track.losses) + 1)
        axes.plot(steps, track.losses, linewidth=0.8, alpha=0.6, label=f"{name}, training")
    for label, curve, style in (
        ("one worker alone", report.alone_curve, "s--"),
        ("global parameters", report.global_curve, "o-"),
    ):
        points = {0: report.initial_loss} | curve
        axes.plot(list(points), list(points.values()), style, color="black", label=f"{label}, validation")
    values = [loss for track in progress.workers.values() for loss in track.losses[len(track.losses) // 10 :]]
    axes.set_ylim(min([*values, report.global_loss]) - 0.05, max(values) + 0.05)
    axes.set_xlabel("inner steps of a worker")
    axes.set_ylabel("loss (nats a byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
