"""diloco-client: demo, status, export."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from safetensors import SafetensorError

from .options import WRONG_SETTING, Group, config_options, one_line_errors, quiet_grpc

quiet_grpc()

from diloco_client.demo.options import DemoOptions  # noqa: E402
from diloco_client.observe import export, status  # noqa: E402
from diloco_proto.errors import DilocoError  # noqa: E402

from .tables import status_view  # noqa: E402


@click.group(
    cls=Group,
    context_settings={
        "auto_envvar_prefix": "DILOCO",
        "show_default": True,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
)
@click.version_option(package_name="diloco")
def main() -> None:
    """Look at a run, take its parameters, or see a whole one on this machine."""


@main.command("demo")
@config_options(DemoOptions)
def demo_command(**values: Any) -> None:
    """Train a small byte-level GPT on this machine: one server, several workers, and one alone to compare."""
    try:
        from diloco_client.demo.report import table
        from diloco_client.demo.run import run_demo
    except ImportError as error:
        raise click.ClickException(f"the demo needs more packages ({error}): pip install 'diloco[demo]'") from error
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


@main.command("status")
@click.argument("address")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Keep looking, every --interval seconds, until Ctrl-C.")
@click.option("--interval", default=2.0, type=click.FloatRange(min=0.1), help="Seconds between looks.")
@click.option("--timeout", default=10.0, type=click.FloatRange(min=0.1), help="Seconds to wait for an answer.")
@click.option("--rounds", default=0, type=click.IntRange(0, 64), help="Show the last so many rounds of each fragment.")
def status_command(address: str, as_json: bool, watch: bool, interval: float, timeout: float, rounds: int) -> None:
    """Workers, fragments, versions and rates of the run at ADDRESS (HOST:PORT)."""
    with one_line_errors():
        if not watch:
            _show(status(address, timeout, rounds=rounds), as_json)
        elif as_json:
            while True:
                click.echo(json.dumps(status(address, timeout, rounds=rounds)))
                time.sleep(interval)
        else:
            with Live(console=Console(), auto_refresh=False) as live:
                while True:
                    live.update(status_view(status(address, timeout, rounds=rounds)), refresh=True)
                    time.sleep(interval)


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(values))
    else:
        Console().print(status_view(values))


@main.command("export")
@click.argument("address")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--timeout", default=30.0, type=click.FloatRange(min=0.1), help="Seconds to wait for an answer.")
def export_command(address: str, path: Path, timeout: float) -> None:
    """Write the global parameters of the run at ADDRESS to PATH, a safetensors file."""
    with one_line_errors():
        if not path.parent.is_dir():
            raise click.BadParameter(f"{path.parent} is not a directory", param_hint="PATH")
        try:
            count = export(address, path, timeout)
        except DilocoError:
            raise
        except (OSError, SafetensorError) as error:
            raise click.ClickException(f"cannot write {path}: {error}") from error
        click.echo(f"{path}: {count} tensors, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(prog_name="diloco-client")
