"""The live display of a running demo."""

from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from diloco_client.demo.options import DemoOptions
from diloco_client.demo.progress import Progress, Track


class Display:
    """A table that follows `progress` on a terminal; elsewhere one line for each point of the curves."""

    def __init__(self, console: Console, options: DemoOptions, progress: Progress) -> None:
        self._console = console
        self._options = options
        self._progress = progress
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)
        self._told = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, highlight=False)

    def update(self) -> None:
        """Where there is no live table: tells of new points of the curves."""
        if self._console.is_terminal:
            return
        ours, alone = self._progress.global_curve(), self._progress.alone_curve()
        both = [step for step in ours if step in alone]
        for step in both[self._told :]:
            self.say(f"step {step}: validation loss {ours[step]:.3f} global, {alone[step]:.3f} alone")
        self._told = len(both)

    def render(self) -> RenderableType:
        """The table as of now."""
        options, progress = self._options, self._progress
        table = Table(title=f"{options.workers} workers, {options.codec} both ways")
        table.add_column("")
        for heading in ("step", "training loss", "stall", "MB up", "MB down"):
            table.add_column(heading, justify="right")
        for name, track in progress.tracks.items():
            table.add_row(name, *_cells(track, options.steps))
        return Group(table, _curves(progress.global_curve(), progress.alone_curve()))


def _cells(track: Track, steps: int) -> list[str]:
    if not track.step:
        return [track.phase, "", "", "", ""]
    traffic = [f"{count / 1e6:.1f}" for count in (track.up, track.down)]
    return [f"{track.step}/{steps}", f"{track.loss:.3f}", f"{track.stall_share:.1%}", *traffic]


def _curves(ours: dict[int, float], alone: dict[int, float]) -> Table:
    """Validation losses so far, a column for each step at which they were taken."""
    table = Table("validation loss at step")
    rows = {"global parameters": ours, "one worker alone": alone}
    steps = sorted({*ours, *alone})
    for step in steps:
        table.add_column(str(step), justify="right")
    for name, curve in rows.items():
        table.add_row(name, *(f"{curve[step]:.3f}" if step in curve else "" for step in steps))
    return table
