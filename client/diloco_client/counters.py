"""What has gone over the wire."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Payload bytes on the wire, messages included, both directions; parameters moved, for bits a parameter."""

    bytes_up: int = 0
    bytes_down: int = 0
    contribution_bytes: int = 0
    contribution_parameters: int = 0
    update_bytes: int = 0
    update_parameters: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def up(self, size: int) -> None:
        with self._lock:
            self.bytes_up += size

    def down(self, size: int) -> None:
        with self._lock:
            self.bytes_down += size

    def contribution(self, size: int, parameters: int) -> None:
        with self._lock:
            self.contribution_bytes += size
            self.contribution_parameters += parameters

    def update(self, size: int, parameters: int) -> None:
        with self._lock:
            self.update_bytes += size
            self.update_parameters += parameters
