"""What trains, as its link to the run sees it, and what it is given to train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from diloco_proto import outer_pb2 as pb


@dataclass(frozen=True, slots=True)
class Shard:
    """A worker's share of the data: `index` of `count`."""

    index: int
    count: int


class Trainer(Protocol):
    """What trains here, as the link sees it."""

    @property
    def notice_left(self) -> float | None:
        """Seconds left until this machine is taken away; None while there was no notice."""
        ...

    def beat(self) -> pb.Heartbeat: ...

    def note(self, tokens: int | None, loss: float | None) -> None:
        """Tokens and loss of an inner step."""
        ...


class Idle:
    """Trains nothing yet."""

    notice_left: float | None = None

    def beat(self) -> pb.Heartbeat:
        return pb.Heartbeat()

    def note(self, tokens: int | None, loss: float | None) -> None:
        """Nobody asks."""
