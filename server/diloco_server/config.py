"""The settings of a run and of the daemon, each written once: as a dataclass field with its help.

Command-line flags, environment variables (DILOCO_…) and keys of the TOML file are made from these fields.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
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

from .logs import FORMATS, LEVELS
from .outer import OuterSettings

AUTO = "auto"

DELAYED = "delayed-nesterov"

NEED_FEEDBACK = (Format.INT2, Format.TERNARY)
"""Too coarse to do without the worker's residual, and not offered for updates."""

DOWNLINK = tuple(f.label for f in Format if f not in NEED_FEEDBACK)


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
        "nesterov",
        "Outer optimizer: SGD with Nesterov momentum, plain SGD, or `delayed-nesterov`: asynchronous, each "
        "contribution is a step of its own.",
        choices=("nesterov", "sgd", DELAYED),
    )
    outer_lr: float = option(0.7, "η: learning rate of the outer optimizer.")
    outer_momentum: float = option(0.9, "μ: momentum of the nesterov outer optimizers, in [0, 1).")
    delay_buffer: str | int = option(
        AUTO,
        "N: contributions to a fragment that make one Nesterov step with delayed-nesterov; `auto` is the number of "
        "live workers.",
    )
    uplink_codec: str = option(
        Format.INT4.label, "Format of the outer gradients.", choices=tuple(f.label for f in Format)
    )
    downlink_codec: str = option(Format.INT4.label, "Format of the updates.", choices=DOWNLINK)
    error_feedback: str = option(
        AUTO,
        "Workers add what quantization left out of a contribution to their next one. `auto`: for int2 and ternary, "
        "which need it.",
        choices=(AUTO, "on", "off"),
    )
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
    max_outer_grad_norm: float = option(
        10.0,
        "Contributions whose norm is more than so many times the running median are scaled down to it; 0: never.",
    )
    max_staleness: str | int = option(
        AUTO,
        "Versions that a contribution's base may lag behind with delayed-nesterov; `auto` is 4 times the live workers.",
    )
    max_away: int = option(32, "A worker that was away for more rounds than that adopts the global parameters.")
    dynamic_local_updates: bool = option(
        False, "DyLU: give a slower worker fewer inner steps a round, so that all are done at the same time."
    )
    stop_after_rounds: int = option(0, "Tell the workers to stop once every fragment has had so many rounds; 0: never.")
    stop_after_tokens: int = option(0, "Tell the workers to stop once so many tokens have been counted; 0: never.")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            self._check_type(f)
        self.schedule()
        self._check(0.0 <= self.mixing_alpha <= 1.0, "mixing_alpha", "between 0 and 1")
        self._check(math.isfinite(self.outer_lr) and self.outer_lr > 0, "outer_lr", "greater than 0")
        self._check(0.0 <= self.outer_momentum < 1.0, "outer_momentum", "at least 0 and less than 1")
        self._check(self.min_workers >= 1, "min_workers", "at least 1")
        self._check(1.0 <= self.lease_seconds < math.inf, "lease_seconds", "at least 1 second")
        self._check(_is_grace(self.grace_seconds), "grace_seconds", "a number of seconds, 0 or more, `inf` or `auto`")
        self._check(_is_auto_or(self.delay_buffer, 1), "delay_buffer", "a whole number, 1 or more, or `auto`")
        self._check(_is_auto_or(self.max_staleness, 0), "max_staleness", "a whole number, 0 or more, or `auto`")
        self._check(0.0 <= self.max_outer_grad_norm < math.inf, "max_outer_grad_norm", "0 or more")
        self._check(self.max_away >= 1, "max_away", "at least 1")
        self._check(self.stop_after_rounds >= 0, "stop_after_rounds", "0 or more")
        self._check(self.stop_after_tokens >= 0, "stop_after_tokens", "0 or more")
        if self.error_feedback == "off" and self.uplink in NEED_FEEDBACK:
            raise ConfigError(
                f"uplink_codec {self.uplink_codec} needs error feedback: leave error_feedback at `auto`, or take int3"
            )

    def _check(self, good: bool, name: str, rule: str) -> None:
        if not good:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

    def _check_type(self, f: dataclasses.Field[Any]) -> None:
        value = getattr(self, f.name)
        wanted = type(f.default)
        if f.default == AUTO and not f.metadata["choices"] and type(value) in (int, float):
            object.__setattr__(self, f.name, str(value))
        elif wanted is float and type(value) is int:
            object.__setattr__(self, f.name, float(value))
        elif type(value) is not wanted:
            raise ConfigError(f"{f.name} is {value!r}; it must be of type {wanted.__name__}")
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"{f.name} is {value!r}; choose one of {', '.join(choices)}")

    def schedule(self) -> Schedule:
        """That of a worker with the whole H. Raises ConfigError."""
        return Schedule(self.sync_every, self.num_fragments, self.overlap_steps)

    @property
    def grace(self) -> float | None:
        """Grace in seconds; None for `auto`."""
        return None if self.grace_seconds == AUTO else float(self.grace_seconds)

    @property
    def asynchronous(self) -> bool:
        """Every contribution is an outer step of its own, at once."""
        return self.outer_optimizer == DELAYED

    def buffered(self, live: int) -> int:
        """N of delayed Nesterov, with so many live workers."""
        return max(1, live) if self.delay_buffer == AUTO else int(self.delay_buffer)

    def staleness_limit(self, live: int) -> int:
        """Versions that a contribution's base may lag behind, with so many live workers; 0 for synchronous rounds."""
        if not self.asynchronous:
            return 0
        return 4 * max(1, live) if self.max_staleness == AUTO else int(self.max_staleness)

    @property
    def feedback(self) -> bool:
        """Whether workers keep a residual of what quantization left out."""
        return self.error_feedback == "on" or (self.error_feedback == AUTO and self.uplink in NEED_FEEDBACK)

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
            error_feedback=self.feedback,
        )

    def as_text(self) -> dict[str, str]:
        """Field -> value, as it would stand in a config file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in values.items()}


_ADVERTISED = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The settings of the daemon itself.

    Raises ConfigError for values that can never work, or contradict each other.
    """

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(50051, "Port to listen on; 0 picks a free one.")
    state_dir: Path | None = option(Path("diloco-state"), "Directory for the run's state, keys and tokens.")
    durability: str = option(
        "journal",
        "What survives a crash: `journal`: all that was acknowledged; `snapshots`: the last snapshot, and workers go "
        "back to it.",
        choices=("journal", "snapshots"),
    )
    snapshot_every: int = option(50, "Rounds from one snapshot to the next.")
    keep_snapshots: int = option(3, "Snapshots that are kept; --rollback reaches back to the oldest.")
    new: bool = option(False, "Begin a new run, even if the state directory holds one; that is moved to its old/.")
    rollback: int | None = option(None, "Go back to this version: undo all rounds since, and keep them in old/.")
    init: Path | None = option(None, "Safetensors file with the initial parameters; else the first worker's.")
    secure: bool = option(False, "TLS and tokens on loopback too; beyond loopback they are always on.")
    insecure: bool = option(False, "Listen beyond loopback without TLS and token. Anybody who reaches it can join.")
    advertise: str = option("", "HOST or HOST:PORT under which workers reach this server, for the join URL.")
    join_url_file: Path | None = option(
        None, "Write the join URL here as well: for workers that share this folder, and not the state directory."
    )
    tls_cert: Path | None = option(None, "Your own certificate (PEM, with its chain); else the server makes one.")
    tls_key: Path | None = option(None, "Its key (PEM, without a password).")
    client_ca: Path | None = option(None, "mTLS: clients must show a certificate signed by one of these (PEM).")
    port_file: Path | None = option(None, "Write the port here once the server listens.")
    drain_seconds: float = option(30.0, "After SIGTERM: time to finish what runs and end; then the server just exits.")
    metrics_port: int = option(0, "Serve metrics to Prometheus at http://METRICS_HOST:PORT/metrics; 0: do not.")
    metrics_host: str = option("127.0.0.1", "Address for the metrics. They ask for no token and are not encrypted.")
    log_format: str = option("text", "Lines for people, or one JSON object a line.", choices=FORMATS)
    log_level: str = option("info", "The least that is logged; `debug` has a line for every round.", choices=LEVELS)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be between 0 and 65535")
        if not 0 <= self.metrics_port <= 65535:
            raise ConfigError(f"metrics_port is {self.metrics_port}; it must be between 0 and 65535")
        if not 0 < self.drain_seconds < math.inf:
            raise ConfigError(f"drain_seconds is {self.drain_seconds}; it must be greater than 0")
        self._check_security()
        if self.snapshot_every < 1:
            raise ConfigError(f"snapshot_every is {self.snapshot_every}; it must be at least 1")
        if self.keep_snapshots < 1:
            raise ConfigError(f"keep_snapshots is {self.keep_snapshots}; it must be at least 1")
        if self.rollback is not None and (self.rollback < 0 or self.new or self.state_dir is None):
            raise ConfigError("rollback takes a version, 0 or more, of the run in the state directory; not with --new")
        if self.init is not None and not self.init.is_file():
            raise ConfigError(f"init is {self.init}, which is no file")
        for name in ("port_file", "join_url_file"):
            path = getattr(self, name)
            if path is not None and not path.parent.is_dir():
                raise ConfigError(f"{name} is {path}, but {path.parent} is no directory")

    def _check_security(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: one is given without the other")
        asked = [n for n in ("secure", "tls_cert", "client_ca") if getattr(self, n)]
        if self.insecure and asked:
            raise ConfigError(f"insecure turns TLS and tokens off, and {asked[0]} asks for them: leave one out")
        if self.advertise and not _ADVERTISED.fullmatch(self.advertise):
            raise ConfigError(f"advertise is {self.advertise!r}; write HOST or HOST:PORT, an IPv6 address in brackets")

    @property
    def guarded(self) -> bool:
        """TLS, and a token for every call."""
        if self.insecure:
            return False
        return self.secure or self.tls_cert is not None or self.client_ca is not None or not _is_loopback(self.host)


def _is_auto_or(value: str | int, least: int) -> bool:
    try:
        return value == AUTO or int(value) >= least
    except ValueError:
        return False


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
