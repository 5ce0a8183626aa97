"""Starts a command in whose Python processes the launcher waits for a first optimizer step."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import grpc

from diloco_client.connect import Connector
from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import ConfigError, ServerUnreachable, error_from_rpc

from .settings import LAUNCH_VARIABLE, MARK_VARIABLE, Launch

BOOTSTRAP = Path(__file__).parent / "bootstrap"

LOOK_SECONDS = 5.0
"""How long the server may take to answer before the command is started."""


def check_server(launch: Launch) -> bool:
    """Whether the server answers now; it may also come later. Raises what waiting will not mend, such as a token that
    it does not know: better now than after the script has loaded its data."""
    connector = Connector(
        launch.address,
        token=launch.options.token,
        ca_cert=launch.ca_cert,
        client_cert=launch.client_cert,
        client_key=launch.client_key,
    )
    try:
        connector.reach("launch", LOOK_SECONDS, lambda: None)
        connector.line("launch").stub.Status(pb.StatusRequest(), timeout=LOOK_SECONDS)
    except grpc.RpcError as error:
        named = error_from_rpc(error)
        if named is not None:
            raise named from error
        return False
    except (ServerUnreachable, ConnectionError):
        return False
    finally:
        connector.close()
    return True


def check_command(command: Sequence[str]) -> None:
    """Raises ConfigError for a Python that is told to ignore its environment: nothing could join from there."""
    if not re.fullmatch(r"python[\d.]*", Path(command[0]).name):
        return
    for argument in command[1:]:
        if not re.fullmatch(r"-[A-Za-z]+", argument) or argument in ("-c", "-m"):
            return
        if not argument.startswith(("-W", "-X")) and set("EIS") & set(argument):
            raise ConfigError(
                f"{command[0]} {argument} ignores the environment, by which the launcher gets into the script: start "
                "it without -E, -I and -S"
            )


def environment(launch: Launch, former: Mapping[str, str]) -> dict[str, str]:
    """For the command, which is to replace this process."""
    descriptor, mark = tempfile.mkstemp(prefix="diloco-launch-")
    with os.fdopen(descriptor, "w") as file:
        file.write(str(os.getpid()))
    paths = [str(BOOTSTRAP), *filter(None, [former.get("PYTHONPATH")])]
    return {
        **former,
        "PYTHONPATH": os.pathsep.join(paths),
        LAUNCH_VARIABLE: launch.text(),
        MARK_VARIABLE: mark,
    }


def execute(command: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Become the command: its terminal, signals and exit code are then its own. Raises OSError if it cannot be started,
    and leaves nothing behind."""
    try:
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and it would stay so in the command
            signal.signal(ignored, signal.SIG_DFL)
        os.execvpe(command[0], list(command), dict(variables))
    except OSError:
        os.unlink(variables[MARK_VARIABLE])
        raise
