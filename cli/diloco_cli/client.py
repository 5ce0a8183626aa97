"""diloco-client. What a command needs is imported when it runs: health starts fast."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from .connection import connection_options, credentials, only_one
from .options import Group, one_line_errors, quiet_grpc

quiet_grpc()


class Commands(Group):
    """Those below, and two whose options alone take longer to import than `health` may take."""

    def list_commands(self, context: click.Context) -> list[str]:
        return ["demo", "run", *super().list_commands(context)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name == "demo":
            from .demo import demo_command

            return demo_command
        if name == "run":
            from .run import run_command

            return run_command
        return super().get_command(context, name)


@click.group(
    cls=Commands,
    context_settings={
        "auto_envvar_prefix": "DILOCO",
        "show_default": True,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
)
@click.version_option(package_name="diloco")
def main() -> None:
    """Join a run with an unmodified script, look at it, take its parameters, or see a whole one on this machine."""


@main.command("status")
@click.argument("address", required=False)
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Keep looking, every --interval seconds, until Ctrl-C.")
@click.option("--interval", default=2.0, type=click.FloatRange(min=0.1), help="Seconds between looks.")
@click.option("--timeout", default=10.0, type=click.FloatRange(min=0.1), help="Seconds to wait for an answer.")
@click.option("--rounds", default=0, type=click.IntRange(0, 64), help="Show the last so many rounds of each fragment.")
def status_command(
    address: str | None,
    server: str | None,
    as_json: bool,
    watch: bool,
    interval: float,
    timeout: float,
    rounds: int,
    **security: Any,
) -> None:
    """Workers, fragments, versions and rates of the run at ADDRESS.

    ADDRESS is HOST:PORT, a join URL, or file:PATH; better not the URL itself, for `ps` shows it and its token to all.
    """
    from rich.console import Console
    from rich.live import Live

    from diloco_client.observe import status

    from .tables import status_view

    where, known = only_one(server, address), credentials(security)
    with one_line_errors():
        if not watch:
            _show(status(where, timeout, rounds=rounds, **known), as_json)
        elif as_json:
            while True:
                click.echo(json.dumps(status(where, timeout, rounds=rounds, **known)))
                time.sleep(interval)
        else:
            with Live(console=Console(), auto_refresh=False) as live:
                while True:
                    live.update(status_view(status(where, timeout, rounds=rounds, **known)), refresh=True)
                    time.sleep(interval)


def _show(values: dict[str, Any], as_json: bool) -> None:
    from rich.console import Console

    from .tables import status_view

    if as_json:
        click.echo(json.dumps(values))
    else:
        Console().print(status_view(values))


@main.command("export")
@click.argument("places", nargs=-1, metavar="[ADDRESS] PATH")
@connection_options
@click.option("--timeout", default=30.0, type=click.FloatRange(min=0.1), help="Seconds to wait for an answer.")
@click.option("--snapshot", type=int, metavar="NUMBER", help="As they were at one of `diloco-client snapshots`.")
def export_command(
    places: tuple[str, ...], server: str | None, timeout: float, snapshot: int | None, **security: Any
) -> None:
    """Write the global parameters of the run at ADDRESS (as for `status`) to PATH, a safetensors file."""
    from safetensors import SafetensorError

    from diloco_client.observe import export
    from diloco_proto.errors import DilocoError

    if not 1 <= len(places) <= 2:
        raise click.UsageError("write: export [ADDRESS] PATH")
    path, where = Path(places[-1]), only_one(server, "".join(places[:-1]))
    with one_line_errors():
        if not path.parent.is_dir():
            raise click.BadParameter(f"{path.parent} is not a directory", param_hint="PATH")
        try:
            count = export(where, path, timeout, snapshot=snapshot, **credentials(security))
        except DilocoError:
            raise
        except (OSError, SafetensorError) as error:
            raise click.ClickException(f"cannot write {path}: {error}") from error
        click.echo(f"{path}: {count} tensors, {path.stat().st_size / 1e6:.1f} MB")


@main.command("snapshots")
@click.argument("address", required=False)
@connection_options
@click.option("--json", "as_json", is_flag=True, help="A JSON list instead of a table.")
@click.option("--timeout", default=10.0, type=click.FloatRange(min=0.1), help="Seconds to wait for an answer.")
def snapshots_command(address: str | None, server: str | None, as_json: bool, timeout: float, **security: Any) -> None:
    """List the snapshots that the server at ADDRESS keeps: for `export --snapshot` and the server's --rollback."""
    from rich.console import Console

    from diloco_client.observe import snapshots

    from .tables import snapshots_view

    with one_line_errors():
        found = snapshots(only_one(server, address), timeout, **credentials(security))
    if as_json:
        click.echo(json.dumps(found))
    elif found:
        Console().print(snapshots_view(found))
    else:
        click.echo("no snapshots are kept")


@main.command("health")
@click.argument("address", required=False)
@connection_options
@click.option("--timeout", default=5.0, type=click.FloatRange(min=0.1), help="Seconds to wait for an answer.")
def health_command(address: str | None, server: str | None, timeout: float, **security: Any) -> None:
    """Exit with 0 if the server at ADDRESS takes contributions, else with 1: for health checks of containers.

    It needs no token, and asks for `grpc.health.v1.Health`, as any gRPC probe does.
    """
    from diloco_client.health import Health, health

    with one_line_errors():
        found = health(only_one(server, address), timeout, **credentials(security))
    if found is not Health.SERVING:
        raise click.ClickException("the server is up, but it is shutting down or cannot write its state")
    click.echo("serving")


if __name__ == "__main__":
    main(prog_name="diloco-client")
