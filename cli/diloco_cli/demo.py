"""diloco-client demo."""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console

from diloco_client.demo.options import DemoOptions

from .options import WRONG_SETTING, config_options, one_line_errors


@click.command("demo")
@config_options(DemoOptions)
def demo_command(**values: Any) -> None:
    """Train a small byte-level GPT on this machine: one server, several workers, and one alone to compare."""
    try:
        from diloco_client.demo.report import table
        from diloco_client.demo.run import run_demo
    except ImportError as error:
        raise click.ClickException(
            f"the demo needs more packages ({error}): pip install '.[demo]' in diloco's folder"
        ) from error
    with one_line_errors(WRONG_SETTING):
        options = DemoOptions(**values)
    console = Console(stderr=options.json)
    with one_line_errors():
        report = run_demo(options, [sys.executable, "-m", "diloco_cli.server"], console)
    console.print(table(report))
    console.print(f"{options.out / 'report.json'} and {options.out / 'loss.png'} hold the details")
    if options.json:
        click.echo(report.to_json())
    if not report.identical:
        raise click.ClickException("the parameters of the server and of the workers differ")
