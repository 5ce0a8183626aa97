"""The table, the findings and the plot of the comparison."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from .findings import FINDINGS
from .runs import Result

COMMAND = "python benchmarks/parity.py"
REFERENCE = "streaming"
"""The case that the others are compared with: fp32 both ways, all workers equal, nothing lost."""


_INTRODUCTION = """\
Byte-level GPT of 0.47 M parameters from scratch on the standard library's source, {tokens:,} tokens in every run
({steps} inner steps of four workers). Unless the name says otherwise: 4 workers, H=50, P=4, τ=2, α=0.5, η=0.7, μ=0.9,
fp32 both ways. Validation loss of θ in nats a byte, compared with `streaming` of the same seeds."""


def mean_losses(results: list[Result]) -> dict[str, float]:
    """Case -> validation loss, mean of its seeds."""
    names = dict.fromkeys(r["name"] for r in results)
    return {name: mean(r["loss"] for r in results if r["name"] == name) for name in names}


def against_reference(results: list[Result], name: str) -> float:
    """Relative difference of a case's loss from the reference's, mean over the seeds that both have."""
    reference = {r["seed"]: r["loss"] for r in results if r["name"] == REFERENCE}
    return mean(r["loss"] / reference[r["seed"]] - 1 for r in results if r["name"] == name and r["seed"] in reference)


def write_report(results: list[Result], folder: Path) -> None:
    """parity.md and parity.png."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = mean_losses(results)
    steps = results[0]["settings"]["steps"]
    lines = [
        "# Loss at equal tokens",
        "",
        f"`{COMMAND}` makes this page, the plot and `benchmarks/results/parity.json`.",
        "",
        _INTRODUCTION.format(tokens=results[0]["tokens"], steps=steps),
        "",
        "![validation loss](parity.png)",
        "",
        "| run | seeds | loss | against streaming | bits up + down | MB up | MB down |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, loss in losses.items():
        same = [r for r in results if r["name"] == name]
        bits = f"{same[0]['bits_up']:.2f} + {same[0]['bits_down']:.2f}" if "bits_up" in same[0] else ""
        up, down = (mean(r[key] for r in same) / 1e6 for key in ("bytes_up", "bytes_down"))
        difference = f"{100 * against_reference(results, name):+.2f} %"
        lines.append(f"| {name} | {len(same)} | {loss:.4f} | {difference} | {bits} | {up:.1f} | {down:.1f} |")
    lines += ["", "## Do the papers' findings hold here?", "", "| finding | here | holds |", "|---|---|---|"]
    for finding in FINDINGS:
        if all(name in losses for name in finding.needs):
            here, holds = finding.judge({name: against_reference(results, name) for name in losses})
            lines.append(f"| {finding.text} | {here} | {'yes' if holds else 'no'} |")
    (folder / "parity.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(results, folder / "parity.png")


def _plot(results: list[Result], path: Path) -> None:
    names = list(mean_losses(results))
    figure = Figure(figsize=(8, 0.26 * len(names) + 1))
    axes = figure.add_subplot()
    for row, name in enumerate(names):
        each = [r["loss"] for r in results if r["name"] == name]
        axes.plot(each, [row] * len(each), "o", color="#2a6f97", markersize=4, alpha=0.7)
    axes.axvline(mean_losses(results)[REFERENCE], color="#bbbbbb", linewidth=1, zorder=0)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss, nats a byte (one dot a seed)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
