"""Every error that diloco raises.

DilocoError
├── ConfigError            a setting that can never work
├── InvalidAddress         a server address that cannot be read
├── ServerUnreachable      no answer for as long as the caller was ready to wait
├── ConnectionClosed       the server ended the session; the run may go on elsewhere
├── UnsupportedModel       a model or optimizer that the hook cannot train rightly
│   ├── MasterWeights      the optimizer keeps its own copy of the parameters
│   └── NonFiniteParameter NaN, Inf or a value too large, in a named tensor
├── ManifestMismatch       the model differs from the one being trained
├── ProtocolMismatch       client and server speak different protocols
├── RunMismatch            the address now serves another run
├── NotMember              a worker without a session, or whose lease ran out
├── Superseded             a newer process with the same worker id took over
├── NotReady               asked for something the run does not have yet
├── InvalidContribution    a push that is not what the run expects
└── SnapshotExpired        the version being read is gone; ask again

Those a server may answer with carry a gRPC status and travel by class name (`from_wire`).
"""

from __future__ import annotations

from typing import ClassVar

import grpc

ERROR_KEY = "diloco-error"
"""Trailing metadata key that holds the class name of a typed error."""


class DilocoError(Exception):
    """Base of all errors raised by diloco."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN


class ConfigError(DilocoError, ValueError):
    """A setting that can never work."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class InvalidAddress(DilocoError, ValueError):
    """A server address that cannot be read."""


class ServerUnreachable(DilocoError, ConnectionError):
    """The server gave no answer for as long as the caller was ready to wait."""


class ConnectionClosed(DilocoError, ConnectionError):
    """The server ended the session."""

    status = grpc.StatusCode.UNAVAILABLE


class UnsupportedModel(DilocoError, ValueError):
    """A model or optimizer that the hook cannot train rightly."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class MasterWeights(UnsupportedModel):
    """The optimizer keeps master weights of its own, which would undo every merge."""


class NonFiniteParameter(UnsupportedModel):
    """A parameter holds NaN, Inf or a magnitude of 2^126 and more."""


class ManifestMismatch(DilocoError, ValueError):
    """The worker's model differs from the one the run trains."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class ProtocolMismatch(DilocoError):
    """Client and server speak different versions of the protocol."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class RunMismatch(DilocoError):
    """The server runs another run than the one the caller belongs to."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class NotMember(DilocoError):
    """The worker has no session, or its lease ran out; a new hello brings it back."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class Superseded(DilocoError):
    """A newer process with the same worker id has joined."""

    status = grpc.StatusCode.ABORTED


class NotReady(DilocoError):
    """The run does not hold yet what was asked for."""

    status = grpc.StatusCode.UNAVAILABLE


class InvalidContribution(DilocoError, ValueError):
    """A push that does not fit the run: wrong fragment, codec, frames or worker."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class SnapshotExpired(DilocoError):
    """The version being read was overtaken; ask for the fragment again."""

    status = grpc.StatusCode.ABORTED


_BY_NAME: dict[str, type[DilocoError]] = {
    cls.__name__: cls
    for cls in (
        ConfigError,
        ConnectionClosed,
        UnsupportedModel,
        NonFiniteParameter,
        ManifestMismatch,
        ProtocolMismatch,
        RunMismatch,
        NotMember,
        Superseded,
        NotReady,
        InvalidContribution,
        SnapshotExpired,
    )
}


def from_wire(name: str, message: str) -> DilocoError:
    """The error a server answered with: its class by name, DilocoError if this side does not know it."""
    return _BY_NAME.get(name, DilocoError)(message)
