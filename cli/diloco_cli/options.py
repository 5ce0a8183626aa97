"""click options made from the fields of a config dataclass: flags, environment variables and file keys alike."""

from __future__ import annotations

import dataclasses
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_OPTIONAL: dict[Any, type] = {"int | None": int, "float | None": float, "str | None": str}
"""Types of fields that need not have a value."""

FAILED = 1
WRONG_SETTING = 2
FAILED_START = 3
"""Exit codes: any other failure, a wrong command line or setting, a server that could not start."""


class OneLineErrors:
    """Mixin for click commands: a wrong command line is answered by one line, without the usage text."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            return super().main(*args, **kwargs)  # type: ignore[misc]
        except click.ClickException as error:
            text = error.format_message()
            asked_nothing = text.startswith("Usage:")  # a group without a command: click answers with its help
            click.echo(text if asked_nothing else f"Error: {text}", err=True)
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(130)


class Command(OneLineErrors, click.Command):
    """One command."""


class Group(OneLineErrors, click.Group):
    """Several commands."""


def config_options(config: type, prefix: str = "") -> Callable[[Decorated], Decorated]:
    """Add one option for each field of a dataclass made with `diloco_proto.options.option`.

    With `prefix` each is also that environment variable, whatever click would make of the command's name.
    """

    def decorate(command: Decorated) -> Decorated:
        for f in reversed(dataclasses.fields(config)):
            command = _option(f, prefix + f.name.upper() if prefix else None)(command)
        return command

    return decorate


def _option(f: dataclasses.Field[Any], variable: str | None) -> Callable[[Decorated], Decorated]:
    flag = "--" + f.name.replace("_", "-")
    common = {
        "help": f.metadata["help"],
        "default": f.default,
        "show_default": f.default is not None,
        "envvar": variable,
    }
    if isinstance(f.default, bool):
        return click.option(flag, is_flag=True, **common)
    if f.metadata["choices"]:
        return click.option(flag, type=click.Choice(f.metadata["choices"]), **common)
    if f.type in _OPTIONAL:
        return click.option(flag, type=_OPTIONAL[f.type], **common)
    if f.default is None or isinstance(f.default, Path):
        return click.option(flag, type=click.Path(path_type=Path), **common)
    return click.option(flag, type=type(f.default), **common)


def fields_of(config: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of `config`."""
    return {f.name: values[f.name] for f in dataclasses.fields(config)}


def load_config_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Keys of a TOML file become the defaults of the options; flags and environment variables win over them."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise click.BadParameter(f"{path}: {error}") from error
    known = {p.name for p in context.command.params if p.expose_value}
    for key in values:
        if key not in known:
            raise click.BadParameter(f"{path}: unknown key {key!r}")
    # As text, so that a value is judged as on the command line: an int option would take 2.5 for 2.
    context.default_map = {**(context.default_map or {}), **{key: str(value) for key, value in values.items()}}
    return path


def quiet_grpc() -> None:
    """Keep gRPC's own log lines off the terminal, unless the user asked for them. Before grpc is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@contextmanager
def one_line_errors(exit_code: int = FAILED) -> Iterator[None]:
    """A DilocoError ends the command with one line on stderr and `exit_code`."""
    from diloco_proto.errors import DilocoError  # not above: it imports grpc, before `quiet_grpc` can be called

    try:
        yield
    except DilocoError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(exit_code)
