"""A worker's own record of what it pushed and what it was told: JSON lines, each written before anything follows."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diloco_client.courier import Courier
from diloco_client.flights import Arrival, Flight
from diloco_client.transport import Transport
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import frame_checksum

Span = tuple[str, int, int]
"""Inner steps: the process that took them, the first and the last of them."""

Lives = list[tuple[str, int]]
"""Each process that this worker's parameters have passed through, and the first inner step that it took."""


class Record:
    """Append-only; shared by all processes of one worker."""

    def __init__(self, path: Path, life: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._life = life

    def write(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "life": self._life, "time": time.time(), **fields})
        os.write(self._fd, line.encode() + b"\n")


def steps_of(lives: Lives, after: int, last: int) -> list[Span]:
    """Who took the inner steps after + 1 … last."""
    ends = [first - 1 for _, first in lives[1:]] + [last]
    spans = [(life, max(first, after + 1), min(end, last)) for (life, first), end in zip(lives, ends, strict=True)]
    return [span for span in spans if span[1] <= span[2]]


def _contribution(flight: Flight) -> dict[str, Any]:
    return {
        "fragment": flight.fragment,
        "base_version": flight.base.version,
        "digests": [f"{frame_checksum(frame):016x}" for frame in flight.frames],
    }


def watch(record: Record, lives: Lives) -> None:
    """From now on all that couriers of this process push, and what becomes of it, is recorded."""
    prepare, push, take = Courier._prepare, Transport.push, Courier.take
    current = threading.local()

    def prepared(self: Courier, flight: Flight) -> None:
        prepare(self, flight)
        current.flight = flight  # which this thread pushes next, if it is the one that pushes

    def pushed(self: Transport, header: pb.PushHeader, frames: Sequence[bytes]) -> pb.Outcome:
        if header.purpose != pb.PURPOSE_CONTRIBUTION:
            return push(self, header, frames)
        flight = current.flight
        what = _contribution(flight)
        steps = steps_of(lives, flight.step - flight.steps, flight.step)
        record.write("sent", **what, generation=header.generation, steps=steps)
        outcome = push(self, header, frames)
        record.write("answered", **what, generation=header.generation, outcome=pb.OutcomeKind.Name(outcome.kind))
        return outcome

    def taken(self: Courier, fragment: int) -> Arrival | None:
        arrival = take(self, fragment)
        if arrival is not None and arrival.flight is not None:
            record.write("settled", **_contribution(arrival.flight), counted=arrival.flight.counted)
        return arrival

    Courier._prepare, Transport.push, Courier.take = prepared, pushed, taken  # type: ignore[method-assign]
