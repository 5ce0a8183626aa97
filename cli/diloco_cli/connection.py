"""The options by which every client command finds its server, and is let in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from diloco_client.connect import Credentials

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, dir_okay=False)


def connection_options(command: Decorated) -> Decorated:
    """Add --server, --ca-cert, --client-cert and --client-key."""
    options = (
        click.option("--server", help="HOST:PORT, join URL or file:PATH; else DILOCO_URL or DILOCO_URL_FILE says it."),
        click.option("--ca-cert", type=_FILE, help="Authority (PEM) that signed the server's certificate."),
        click.option("--client-cert", type=_FILE, help="Certificate (PEM) to show to a server with --client-ca."),
        click.option("--client-key", type=_FILE, help="Its key (PEM)."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def credentials(values: dict[str, Any]) -> Credentials:
    """Of those options."""
    return {
        "ca_cert": values["ca_cert"],
        "client_cert": values["client_cert"],
        "client_key": values["client_key"],
    }


def only_one(server: str | None, address: str | None) -> str | None:
    """The server, which can be given as an option or as an argument."""
    if server and address:
        raise click.UsageError("the server is given twice: as an argument and by --server")
    return server or address
