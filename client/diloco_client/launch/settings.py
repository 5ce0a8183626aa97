"""What `diloco-client run` hands to the processes that it starts: options, address and credentials, in one environment
variable. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Self

from diloco_client.network import Network
from diloco_proto.errors import ConfigError
from diloco_proto.options import option

LAUNCH_VARIABLE = "DILOCO_LAUNCH"
MARK_VARIABLE = "DILOCO_LAUNCH_MARK"
"""Names a file that holds the command's process id; the first worker to join removes it."""

STOPS = ("exit", "continue")
ISLANDS = ("auto", "world", "none")
LEVELS = ("debug", "info", "warning", "error")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LaunchOptions:
    """How a launched script takes part. Raises ConfigError for what can never work."""

    worker_id: str | None = option(None, "Names this worker; host name, process id and a random suffix if not given.")
    token: str | None = option(None, "Overrides the join URL's. Better DILOCO_TOKEN: `ps` shows arguments to all.")
    connect_timeout: float = option(120.0, "Seconds that the first step waits for the server to answer.")
    data_connections: int | None = option(None, "Connections that share each transfer (1).")
    upload_limit: float | None = option(None, "Bytes a second up (no limit).")
    download_limit: float | None = option(None, "Bytes a second down (no limit).")
    tokens_per_step: int | None = option(
        None, "Tokens of one inner step, by which contributions are weighed; where nobody says, inner steps count."
    )
    island: str = option(
        "auto",
        "Processes that are one worker: those that the model says, all of the process group, or each for itself.",
        choices=ISLANDS,
    )
    sigterm_seconds: float | None = option(
        None, "On SIGTERM push what is left and leave, within so many seconds; if not given, SIGTERM is left alone."
    )
    stop: str = option(
        "exit",
        "When the run has reached its end: end the script with exit code 0, or let it go on alone.",
        choices=STOPS,
    )
    together: bool = option(False, "At the end wait until every worker has flushed; for all workers, or none.")
    export: Path | None = option(None, "At the end write the global parameters to this safetensors file.")
    log_level: str = option("info", "The least that is logged, on stderr.", choices=LEVELS)

    def __post_init__(self) -> None:
        Network.chosen(
            data_connections=self.data_connections,
            upload_limit=self.upload_limit,
            download_limit=self.download_limit,
        )
        if self.connect_timeout <= 0:
            raise ConfigError(f"connect_timeout is {self.connect_timeout:g}; it must be more than 0 seconds")
        if self.sigterm_seconds is not None and self.sigterm_seconds <= 0:
            raise ConfigError(f"sigterm_seconds is {self.sigterm_seconds:g}; it must be more than 0")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ConfigError(f"tokens_per_step is {self.tokens_per_step}; it must be at least 1")
        if self.export is not None and not self.export.absolute().parent.is_dir():
            raise ConfigError(f"export: {self.export.absolute().parent} is not a directory")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """All of it. Paths are absolute: a script may change its directory."""

    address: str | None
    ca_cert: str | None
    client_cert: str | None
    client_key: str | None
    options: LaunchOptions

    def text(self) -> str:
        """For LAUNCH_VARIABLE. It may hold a token."""
        values = dataclasses.asdict(self)
        if self.options.export is not None:
            values["options"]["export"] = str(self.options.export.absolute())
        return json.dumps(values)

    @classmethod
    def of_environment(cls) -> Self:
        values = json.loads(os.environ[LAUNCH_VARIABLE])
        options = values.pop("options")
        if options["export"] is not None:
            options["export"] = Path(options["export"])
        return cls(**values, options=LaunchOptions(**options))
