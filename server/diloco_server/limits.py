"""How much one peer, and all together, may have open at once, and how long nothing may come from them.

A worker goes by its name, whoever has not said it yet by its address. Honest workers stay far below; one that is
refused tries again by itself.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from diloco_proto.errors import TooMuchInFlight

log = logging.getLogger("diloco.server")

SAY_EVERY = 30.0
"""Seconds between two lines in the log on the same limit."""


class Stream(StrEnum):
    """What may be open."""

    UNNAMED = "streams that have not said who they are"
    SESSION = "sessions"
    PUSH = "pushes"
    PULL = "pulls"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The limits. Many workers may share an address: a household's, or that of this machine."""

    peer: tuple[tuple[Stream, int], ...] = (
        (Stream.UNNAMED, 256),
        (Stream.SESSION, 4),  # those of one worker, of which the newest counts
        # Up to 8 connections of each of an island's ranks, and those that were given up, until that is noticed. Half of
        # what all peers may have, so that no worker keeps the others out.
        (Stream.PUSH, 512),
        (Stream.PULL, 512),
    )
    """Of one worker, or of one address where a stream has no name: unnamed ones and pulls."""
    total: tuple[tuple[Stream, int], ...] = (
        (Stream.UNNAMED, 1024),
        (Stream.SESSION, 1024),
        (Stream.PUSH, 1024),
        (Stream.PULL, 1024),
    )
    first_seconds: float = 10.0
    """Until a stream has said what it is about."""
    frame_seconds: float = 120.0
    """Until the next frame of a push is here."""
    unread_seconds: float = 120.0
    """Until a message of a pull is read. Then what it is read from is let go, and the stream as soon as it moves."""


class Limits:
    """Counts what is open. Belongs to the event loop."""

    def __init__(self, bounds: Bounds | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.bounds = bounds or Bounds()
        self._clock = clock
        self._open: Counter[tuple[Stream, str]] = Counter()
        self._totals: Counter[Stream] = Counter()
        self._said: dict[Stream, float] = {}

    def open(self, kind: Stream) -> int:
        """How many there are of all peers."""
        return self._totals[kind]

    @contextmanager
    def hold(self, kind: Stream, peer: str) -> Iterator[None]:
        """Count one within the block. Raises TooMuchInFlight."""
        key = kind, peer
        for held, most, whose in (
            (self._open[key], dict(self.bounds.peer)[kind], repr(peer[:128])),
            (self._totals[kind], dict(self.bounds.total)[kind], "all peers together"),
        ):
            if held >= most:
                self._refuse(kind, f"{whose} already has {held} {kind} open, as many as this server takes at once")
        self._open[key] += 1
        self._totals[kind] += 1
        try:
            yield
        finally:
            self._totals[kind] -= 1
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    def _refuse(self, kind: Stream, why: str) -> None:
        now = self._clock()
        if now - self._said.get(kind, -SAY_EVERY) >= SAY_EVERY:
            self._said[kind] = now
            log.warning("refused: %s", why)
        raise TooMuchInFlight(f"{why}; later there is room")


def address_of(peer: str) -> str:
    """The address in gRPC's words for a peer, such as ipv4:192.0.2.7:51000; without the port."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
