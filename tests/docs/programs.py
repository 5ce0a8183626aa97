"""Whether a command in a document would be understood: by our own parsers, or as a script, module or target of ours."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from documents import ROOT, Command

from diloco_cli.client import main as client
from diloco_cli.server import main as server
from diloco_cli.simulate.__main__ import main as simulate
from diloco_server import RunConfig, ServerConfig

FOREIGN = {
    *("accelerate", "apt-get", "cat", "cd", "chmod", "cp", "docker", "export", "git", "journalctl", "kill", "kubectl"),
    *("mkdir", "mv", "nc", "openssl", "scp", "sleep", "ss", "ssh", "systemctl", "tmux", "ufw", "useradd"),
}
"""Programs whose arguments are not ours to check."""

PLACEHOLDER = re.compile(r"…|^[A-Z][A-Z_:]*$|<.*>")
OURS = ("examples/", "benchmarks/", "tests/", "docker/")
"""Folders whose scripts must be there; another path is the reader's own."""


class NotUnderstood(AssertionError):
    """The reader would get an error."""


def check(command: Command) -> None:
    """Raises NotUnderstood."""
    words = [w for w in command.words[1:] if w != "…"]
    match command.program:
        case "diloco-server":
            parse_server(words)
        case "diloco-client":
            parse_client(words)
        case "python" | "python3":
            _python(words)
        case "torchrun":
            _script(_after_options(words, "--nproc-per-node", "--nproc_per_node", "--max-restarts", "--nnodes"))
        case "make":
            _make(words)
        case "pip" | "pip3":
            _pip(words)
        case program if program not in FOREIGN:
            raise NotUnderstood(f"no such program: {program}")


def parse_server(words: Sequence[str]) -> dict[str, Any]:
    """The options that are given. Raises NotUnderstood also for settings that can never work together."""
    given = _parse(server, words)
    values = {f.name: given[f.name] for f in fields(RunConfig) if f.name in given}
    try:
        RunConfig(**values)
        daemon = {f.name: given[f.name] for f in fields(ServerConfig) if f.name in given}
        # Files and folders of the reader's are not here.
        missing = ("init", "port_file", "join_url_file")
        ServerConfig(**{name: value for name, value in daemon.items() if name not in missing})
    except (ValueError, TypeError) as error:
        raise NotUnderstood(str(error)) from error
    return given


def parse_client(words: Sequence[str]) -> None:
    if not words or words[0] in ("--help", "--version"):
        return
    context = click.Context(client, info_name="diloco-client")
    command = client.get_command(context, words[0])
    if command is None:
        raise NotUnderstood(f"diloco-client has no {words[0]}")
    rest = list(words[1:])
    launched: list[str] = []
    if words[0] == "run" and "--" in rest:
        rest, launched = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
        if not launched:
            raise NotUnderstood("nothing is launched")
        check(Command("", tuple(launched)))
    _parse(command, [*rest, *(["--", *launched] if launched else [])])


def _parse(command: click.Command, words: Sequence[str]) -> dict[str, Any]:
    """Options by name, as click would have them; placeholders stay text."""
    context = click.Context(command, info_name=command.name)
    try:
        given, rest, _ = command.make_parser(context).parse_args(args=list(words))
        if rest:
            raise NotUnderstood(f"{command.name}: {rest} is too much")
        converted = {}
        for parameter in command.params:
            value = given.get(parameter.name or "")
            if value is None or not isinstance(value, str | bool) or parameter.name is None:
                continue
            if not isinstance(value, str) or not PLACEHOLDER.search(value):
                converted[parameter.name] = parameter.type_cast_value(context, value)
    except click.UsageError as error:
        raise NotUnderstood(error.format_message()) from error
    return converted


def _python(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        module, rest = words[1], words[2:]
        if module == "diloco_cli.simulate":
            _parse(simulate, rest)
        elif module == "venv":
            pass
        elif module == "pip":
            _pip(rest)
        elif module.startswith("diloco") and importlib.util.find_spec(module) is None:
            raise NotUnderstood(f"no module {module}")
    elif words and words[0] != "-c":
        _script(words)


def _script(words: list[str]) -> None:
    """A script of ours is there, and has these options."""
    if not words or not words[0].startswith(OURS):
        return
    path = ROOT / words[0]
    if not path.is_file():
        raise NotUnderstood(f"no file {words[0]}")
    source = path.read_text()
    for word in words[1:]:
        if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source:
            raise NotUnderstood(f"{words[0]} has no option {word}")


def _after_options(words: list[str], *with_value: str) -> list[str]:
    while words and words[0].startswith("-"):
        words = words[2:] if words[0] in with_value else words[1:]
    return words


def _make(words: Iterable[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for word in words:
        if "=" not in word and word not in targets:
            raise NotUnderstood(f"the Makefile has no target {word}")


def _pip(words: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        found = re.fullmatch(r"(?:\.|diloco)\[(.*)\]", word)
        unknown = set(found[1].split(",")) - set(project["optional-dependencies"]) if found else set()
        if unknown:
            raise NotUnderstood(f"the package has no extra {', '.join(unknown)}")


def all_options() -> set[str]:
    """Flags of all commands and scripts of ours."""
    context = click.Context(client, info_name="diloco-client")
    subcommands = [client.get_command(context, name) for name in client.list_commands(context)]
    found = {"--help", "--version"}
    for command in (server, simulate, *subcommands):
        assert command is not None
        found |= {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    for path in _sources("examples", "benchmarks"):
        found |= set(re.findall(r'"(--[a-z][a-z-]*)"', path.read_text()))
    return found


def all_variables() -> set[str]:
    """Environment variables that the code reads: by name, or as an option of the server."""
    found = {f"DILOCO_{p.name.upper()}" for p in server.params if p.name}
    for path in _sources("proto", "server", "client", "cli", "docker"):
        found |= set(re.findall(r"DILOCO_[A-Z][A-Z_]*[A-Z]", path.read_text()))
    return found


def _sources(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return [path for path in found if path.suffix in (".py", ".yml", ".Dockerfile", ".sh")]
