"""What is tried again, and after which pause."""

from __future__ import annotations

import random
from dataclasses import dataclass

import grpc

from diloco_proto.errors import (
    ConnectionClosed,
    DilocoError,
    NotMember,
    NotReady,
    SnapshotExpired,
    TooMuchInFlight,
)
from diloco_proto.wire import error_from_rpc

RETRY_LATER = (ConnectionClosed, NotMember, NotReady, SnapshotExpired, TooMuchInFlight)
"""What the server may answer although the same call can succeed later."""

_FINAL = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
"""Statuses that gRPC itself gives for what no new attempt can mend, such as a message over the limit."""


class Stalled(ConnectionError):
    """Nothing moved on a call for too long, and it was given up."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Exponential backoff with full jitter: the n-th pause is uniform in [0, min(cap, first * 2^n)] seconds.

    The numbers are the system's: workers whose scripts seed `random` alike must not retry in step, and the trainer's
    own sequence stays what it is without us.
    """

    first: float = 0.5
    cap: float = 5.0

    def pause(self, attempt: int) -> float:
        return random.SystemRandom().uniform(0, min(self.cap, self.first * 2.0 ** min(attempt, 16)))


def translate(error: grpc.RpcError) -> Exception:
    """A typed error of the server, ConnectionError for what a new attempt may mend, or else DilocoError."""
    named = error_from_rpc(error)
    if named is not None:
        return named
    text = f"{error.code().name}: {error.details()}"
    return DilocoError(f"the server refused the call: {text}") if error.code() in _FINAL else ConnectionError(text)
