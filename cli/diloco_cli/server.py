"""diloco-server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .options import (
    FAILED_START,
    WRONG_SETTING,
    Command,
    config_options,
    fields_of,
    load_config_file,
    one_line_errors,
    quiet_grpc,
)

quiet_grpc()

from diloco_server import RunConfig, ServerConfig  # noqa: E402
from diloco_server.daemon import Daemon, run_forever  # noqa: E402
from diloco_server.logs import configure  # noqa: E402


@click.command(
    cls=Command,
    context_settings={
        "auto_envvar_prefix": "DILOCO",
        "show_default": True,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=load_config_file,
    help="TOML file with any of these options as keys (sync_every = 100, …).",
)
@config_options(ServerConfig)
@config_options(RunConfig)
@click.version_option(package_name="diloco")
def main(**values: Any) -> None:
    """Own the global parameters of one training run and their outer optimizer.

    Every option can also be set by an environment variable, DILOCO_ and its name (DILOCO_SYNC_EVERY=100), or
    by a key of the --config file. A flag wins over a variable, a variable over the file.
    """
    with one_line_errors(WRONG_SETTING):
        server = ServerConfig(**fields_of(ServerConfig, values))
        config = RunConfig(**fields_of(RunConfig, values))
    configure(server.log_format, server.log_level)
    with one_line_errors(FAILED_START):
        run_forever(config, server, _banner)


def _banner(daemon: Daemon) -> None:
    run = daemon.engine.run
    config = run.config
    click.echo(
        f"diloco-server is listening on {daemon.address} (run {run.run_id}: H={config.sync_every} "
        f"P={config.num_fragments} τ={config.overlap_steps} α={config.mixing_alpha:g}, {config.outer_optimizer} "
        f"η={config.outer_lr:g} μ={config.outer_momentum:g}, {config.uplink_codec} up, {config.downlink_codec} down)\n"
        f"on a worker:  {_how_to_join(daemon)}"
    )


def _how_to_join(daemon: Daemon) -> str:
    """The join URL is a secret: a terminal may show it, a log file or a container's output may not."""
    entrance = daemon.entrance
    if not entrance.guarded:
        note = " (INSECURE: no TLS, no token)" if entrance.insecure else ""
        return f'with diloco_client.join("{daemon.address}", model, optimizer) as outer: …{note}'
    if sys.stdout.isatty():
        return f"export DILOCO_URL='{daemon.join_url}'"
    where = "nowhere: --state-dir is missing" if entrance.url_file is None else f"in {entrance.url_file}"
    return f"set DILOCO_URL to the join URL, which is {where} (it is secret, and printed to terminals only)"


if __name__ == "__main__":
    main(prog_name="diloco-server")
