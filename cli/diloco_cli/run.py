"""diloco-client run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from diloco_client.address import URL_FILE_VARIABLE
from diloco_client.launch.settings import Launch, LaunchOptions

from .connection import connection_options
from .options import WRONG_SETTING, config_options, fields_of, one_line_errors

CANNOT_START = 127
"""Exit code when there is no such command, as a shell has it."""


@click.command("run", context_settings={"allow_interspersed_args": False}, options_metavar="[OPTIONS] --")
@connection_options
@config_options(LaunchOptions, "DILOCO_")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARGS]...")
def run_command(
    server: str | None, command: tuple[str, ...], ca_cert: Path | None, client_cert: Path | None, **values: Any
) -> None:
    """Start a training script that knows nothing of diloco, and let it join a run.

    COMMAND is what would start it: python train.py …, python -m module …, torchrun …, accelerate launch …. Every
    process of it that steps a torch optimizer joins after its first inner step, and flushes when it ends well; its
    code, its arguments and its own checkpoints stay as they are.

    Those checkpoints hold this worker's local parameters. The global ones are written by --export, or by
    `diloco-client export` at any time. In the script itself, three lines do more: docs/launcher.md.
    """
    with one_line_errors():
        from diloco_client.launch.start import check_command, check_server, environment, execute

        with one_line_errors(WRONG_SETTING):
            options = LaunchOptions(**fields_of(LaunchOptions, values))
            check_command(command)
        launch = Launch(
            address=_absolute_address(server),
            ca_cert=_absolute(ca_cert),
            client_cert=_absolute(client_cert),
            client_key=_absolute(values["client_key"]),
            options=options,
        )
        if not check_server(launch):
            click.echo("diloco: the server does not answer yet; the script starts, and waits for it to join", err=True)
    try:
        execute(command, environment(launch, os.environ))
    except OSError as error:
        click.echo(f"Error: cannot start {command[0]}: {error.strerror}", err=True)
        sys.exit(CANNOT_START)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _absolute_address(server: str | None) -> str | None:
    """The address, with the file that holds it where it is: scripts change their directory."""
    if server is None and URL_FILE_VARIABLE in os.environ:
        os.environ[URL_FILE_VARIABLE] = str(Path(os.environ[URL_FILE_VARIABLE]).absolute())
    if server is None or not server.startswith("file:"):
        return server
    return f"file:{Path(server.removeprefix('file://').removeprefix('file:')).absolute()}"
