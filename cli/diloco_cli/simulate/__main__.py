"""python -m diloco_cli.simulate"""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from diloco_cli.options import WRONG_SETTING, Command, one_line_errors

from .plan import Plan, plan_run
from .plan_table import plan_options, show_plan
from .runs import Report, silence, simulate_all
from .world import simulate

BROKEN = 1
"""Exit code when a promise was broken."""


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--seed", type=int, default=0, show_default=True, help="The run to replay, or the first of --schedules.")
@click.option("--schedules", type=click.IntRange(1), default=1, show_default=True, help="So many runs with faults.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes for them.")
@click.option("--verbose", is_flag=True, help="Print what happens in the run of --seed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.option(
    "--hours", type=click.FloatRange(0, min_open=True), help="Plan: simulate so many hours of a run as set below."
)
@plan_options
def main(
    seed: int, schedules: int, jobs: int, verbose: bool, as_json: bool, hours: float | None, **values: Any
) -> None:
    """Simulate runs in virtual time: with faults, to check the promises of the design; or, with --hours, to plan one.

    A run with faults follows from its seed alone. One that breaks a promise is replayed by --seed.
    """
    if hours is not None:
        with one_line_errors(WRONG_SETTING):
            plan = Plan.from_options(hours, seed, values)
        with silence():
            figures = plan_run(plan)
        show_plan(plan, figures, as_json)
        return
    if schedules == 1:
        with silence():
            _replay(seed, verbose, as_json)
        return
    report = simulate_all(seed, schedules, jobs)
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        _show(report)
    if report.broken:
        sys.exit(BROKEN)


def _replay(seed: int, verbose: bool, as_json: bool) -> None:
    log: list[str] = []
    outcome = simulate(seed, log)
    if verbose:
        click.echo("\n".join(log))
    report = Report()
    report.add(outcome)
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        click.echo(
            f"seed {seed}: {outcome.events.total()} events, {outcome.faults.total()} of them faults, and "
            f"{outcome.commits} outer steps in {outcome.seconds:.1f} virtual seconds; trace {outcome.trace:08x}"
        )
        click.echo(str(outcome.broken) if outcome.broken else "no promise was broken")
    if outcome.broken:
        sys.exit(BROKEN)


def _show(report: Report) -> None:
    console = Console()
    console.print(
        f"{report.schedules} schedules, {report.events.total()} events (at least {report.fewest_events} each), "
        f"{report.commits} outer steps, {report.seconds / 3600:.1f} virtual hours"
    )
    table = Table("event", "count", "is")
    for kind, count in report.events.most_common():
        table.add_row(kind, str(count), "a fault" if kind in report.faults else "")
    console.print(table)
    for _, _, text in report.broken:
        console.print(text, markup=False, highlight=False)
    console.print(f"{len(report.broken)} broken promises")


if __name__ == "__main__":
    main(prog_name="python -m diloco_cli.simulate")
