"""The settings of a run and of the daemon, each written once: as a dataclass field with its help.

Command-line flags, environment variables (DILOCO_…) and keys of the TOML file are made from these fields.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec.formats import Format
from diloco_proto.errors import ConfigError
from diloco_proto.manifest import Pattern
from diloco_proto.options import option
from diloco_proto.schedule import Schedule
from diloco_proto.wire import codec_to_pb

from .outer import OuterSettings

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The settings of one run. The server decides them and every worker gets them at join.

    Raises ConfigError, naming the field, for a value that can never work.
    """

    sync_every: int = option(100, "H: inner steps from one synchronisation of a fragment to its next.")
    num_fragments: int = option(4, "P: fragments the model is cut into, synchronised one after another.")
    fragment_pattern: str = option(
        Pattern.STRIDED.value,
        "How layers are dealt out to fragments.",
        choices=tuple(p.value for p in Pattern),
    )
    overlap_steps: int = option(2, "τ: inner steps from a fragment's push to its merge, hiding the network.")
    mixing_alpha: float = option(0.5, "α: share of the local parameters kept at a merge, in [0, 1].")
    outer_optimizer: str = option(
        "nesterov", "Outer optimizer: SGD with Nesterov momentum, or plain SGD.", choices=("nesterov", "sgd")
    )
    outer_lr: float = option(0.7, "η: learning rate of the outer optimizer.")
    outer_momentum: float = option(0.9, "μ: momentum of the nesterov outer optimizer, in [0, 1).")
    uplink_codec: str = option(
        Format.INT4.label, "Format of the outer gradients.", choices=tuple(f.label for f in Format)
    )
    downlink_codec: str = option(Format.INT4.label, "Format of the updates.", choices=tuple(f.label for f in Format))
    min_workers: int = option(1, "Workers that must have joined before the run opens, and floor of a round.")
    grace_seconds: str | float = option(
        AUTO,
        "How long a round waits for the rest once half of its workers have contributed: seconds, "
        "`inf` (strictly synchronous), or `auto` (as long again as recent rounds took to fill, at least 2 s).",
    )
    lease_seconds: float = option(15.0, "A worker silent for so long is taken for dead.")
    weighting: str = option(
        "tokens",
        "Weight of a contribution: the tokens (or steps) behind it, or all alike.",
        choices=("tokens", "uniform"),
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            self._check_type(f)
        Schedule(self.sync_every, self.num_fragments, self.overlap_steps)
        self._check(0.0 <= self.mixing_alpha <= 1.0, "mixing_alpha", "between 0 and 1")
        self._check(math.isfinite(self.outer_lr) and self.outer_lr > 0, "outer_lr", "greater than 0")
        self._check(0.0 <= self.outer_momentum < 1.0, "outer_momentum", "at least 0 and less than 1")
        self._check(self.min_workers >= 1, "min_workers", "at least 1")
        self._check(1.0 <= self.lease_seconds < math.inf, "lease_seconds", "at least 1 second")
        self._check(_is_grace(self.grace_seconds), "grace_seconds", "a number of seconds, 0 or more, `inf` or `auto`")

    def _check(self, good: bool, name: str, rule: str) -> None:
        if not good:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

    def _check_type(self, f: dataclasses.Field[Any]) -> None:
        value = getattr(self, f.name)
        wanted = type(f.default)
        if f.name == "grace_seconds" and type(value) in (int, float):
            object.__setattr__(self, f.name, str(value))
        elif wanted is float and type(value) is int:
            object.__setattr__(self, f.name, float(value))
        elif type(value) is not wanted:
            raise ConfigError(f"{f.name} is {value!r}; it must be of type {wanted.__name__}")
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"{f.name} is {value!r}; choose one of {', '.join(choices)}")

    @property
    def grace(self) -> float | None:
        """Grace in seconds; None for `auto`."""
        return None if self.grace_seconds == AUTO else float(self.grace_seconds)

    @property
    def uplink(self) -> Format:
        return Format.from_label(self.uplink_codec)

    @property
    def downlink(self) -> Format:
        return Format.from_label(self.downlink_codec)

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.fragment_pattern)

    def outer_settings(self) -> OuterSettings:
        return OuterSettings(
            optimizer=self.outer_optimizer,
            lr=self.outer_lr,
            momentum=self.outer_momentum,
            downlink=self.downlink,
        )

    def to_pb(self) -> pb.RunSettings:
        """What a worker has to know."""
        return pb.RunSettings(
            sync_every=self.sync_every,
            num_fragments=self.num_fragments,
            fragment_pattern=self.fragment_pattern,
            overlap_steps=self.overlap_steps,
            mixing_alpha=self.mixing_alpha,
            uplink_codec=codec_to_pb(self.uplink),
            downlink_codec=codec_to_pb(self.downlink),
        )

    def as_text(self) -> dict[str, str]:
        return {f.name: str(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The settings of the daemon itself.

    Raises ConfigError for an address beyond loopback without `insecure`.
    """

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(50051, "Port to listen on; 0 picks a free one.")
    init: Path | None = option(None, "Safetensors file with the initial parameters; else the first worker's.")
    insecure: bool = option(False, "Listen beyond loopback without TLS and token. Anybody who reaches it can join.")
    port_file: Path | None = option(None, "Write the port here once the server listens.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be between 0 and 65535")
        if not _is_loopback(self.host) and not self.insecure:
            raise ConfigError(
                f"refusing to listen on {self.host}: it is not a loopback address, and this version has neither "
                "TLS nor tokens. Use a tunnel (ssh -L 50051:127.0.0.1:50051 …), or --insecure on a private network"
            )
        if self.init is not None and not self.init.is_file():
            raise ConfigError(f"init is {self.init}, which is no file")
        if self.port_file is not None and not self.port_file.parent.is_dir():
            raise ConfigError(f"port_file is {self.port_file}, but {self.port_file.parent} is no directory")


def _is_grace(value: str | float) -> bool:
    try:
        return value == AUTO or float(value) >= 0
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
