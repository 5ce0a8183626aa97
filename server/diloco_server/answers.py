"""How a call's messages are read, and how it is refused when they are not what they should be."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError

from diloco_proto.errors import ERROR_KEY, ConnectionClosed, DilocoError, InvalidContribution, TooMuchInFlight

from .auth import Notices
from .logs import plain

LOGGED = 100
"""Refused calls in a minute that have a line in the log; they are as many as a worker with a fault cares to make."""

MOST_TOLD = 2000
"""Bytes of an error's text. In headers they may become three times as many, and a client takes 8 KiB of those."""

M = TypeVar("M")


def reader(parse: Callable[[bytes], M]) -> Callable[[bytes], M | None]:
    """A deserializer: None for bytes that are no such message. gRPC would answer an exception in its own words, and
    take it for a fault of ours."""

    def read(data: bytes) -> M | None:
        try:
            return parse(data)
        except DecodeError:
            return None

    return read


def readable(message: M | None) -> M:
    """What a `reader` has read. Raises InvalidContribution."""
    if message is None:
        raise InvalidContribution("received bytes that are no message of this protocol")
    return message


def told(error: DilocoError) -> str:
    """What a peer and the log are told of it. Parts may be a peer's own words: as long and as odd as it likes."""
    return plain(str(error), MOST_TOLD).encode("utf-8", "replace")[:MOST_TOLD].decode("utf-8", "ignore")


class Refusals:
    """Ends calls with typed errors."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._notices = Notices(clock, LOGGED, logging.INFO)

    async def refuse(self, context: grpc.aio.ServicerContext[Any, Any], method: str, error: DilocoError) -> NoReturn:
        """End the call with the error's status and class name. Never returns."""
        if not isinstance(error, ConnectionClosed | TooMuchInFlight):  # of these the limits have told, now and then
            self._notices.refused(context.peer(), method, error, told(error))
        await context.abort(error.status, told(error), ((ERROR_KEY, type(error).__name__),))
