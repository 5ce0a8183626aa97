"""How a worker uses its network: connections, limits of speed, and how long nothing may move."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from diloco_proto.channel import MAX_DATA_CONNECTIONS
from diloco_proto.errors import ConfigError

VARIABLES = {
    "data_connections": "DILOCO_DATA_CONNECTIONS",
    "upload_limit": "DILOCO_UPLOAD_LIMIT",
    "download_limit": "DILOCO_DOWNLOAD_LIMIT",
}
"""Environment variables that stand in for what is not given."""

LEAST_LIMIT = 20_000
"""Bytes a second. A frame of 1 MiB takes the better part of a minute then; slower, the server would take the worker
for one that has stopped reading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """One worker's settings. Raises ConfigError for those that can never work."""

    data_connections: int = 1
    """Connections that share each transfer: more than one for links on which a single TCP stream is slow. The session
    has one of its own besides."""
    upload_limit: float = 0.0
    """Bytes a second over all of them; 0 for none. The session is never limited."""
    download_limit: float = 0.0
    progress_timeout: float = 30.0
    """Seconds in which something must move in a transfer; else it goes on over a new connection."""

    def __post_init__(self) -> None:
        if not 1 <= self.data_connections <= MAX_DATA_CONNECTIONS:
            raise ConfigError(
                f"data_connections is {self.data_connections}; it must be between 1 and {MAX_DATA_CONNECTIONS}"
            )
        for name in ("upload_limit", "download_limit"):
            value = getattr(self, name)
            if value and not LEAST_LIMIT <= value < math.inf:
                raise ConfigError(
                    f"{name} is {value:g} bytes a second; it must be 0 (no limit) or at least {LEAST_LIMIT}"
                )
        if not 0 < self.progress_timeout < math.inf:
            raise ConfigError(f"progress_timeout is {self.progress_timeout:g}; it must be more than 0 seconds")

    @classmethod
    def chosen(cls, **given: float | None) -> Self:
        """What is given; where it is None, the environment's. Raises ConfigError."""
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for name, variable in VARIABLES.items():
            text = os.environ.get(variable, "")
            if name not in values and text:
                try:
                    values[name] = int(text) if name == "data_connections" else float(text)
                except ValueError:
                    raise ConfigError(f"{variable} is {text!r}, which is no number") from None
        return cls(**values)


class Throttle:
    """Spreads bytes over time: at most `rate` a second, 0 for no limit. What is sent at once is paid for afterwards."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._free_at = 0.0
        self._lock = threading.Lock()

    def reserve(self, size: int) -> float:
        """Seconds to wait before so many bytes may go. Who asks first goes first."""
        if not self._rate:
            return 0.0
        with self._lock:
            now = self._clock()
            start = max(self._free_at, now)
            self._free_at = start + size / self._rate
        return start - now
