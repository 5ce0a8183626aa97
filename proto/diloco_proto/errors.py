"""Every error that diloco raises.

DilocoError
├── ConfigError            a setting that can never work
├── InvalidAddress         a server address that cannot be read
├── ServerUnreachable      no answer for as long as the caller was ready to wait
├── ConnectionClosed       the server ended the session; the run may go on elsewhere
├── TLSMismatch            one side speaks TLS and the other does not
├── CertificateError       the server's certificate is not acceptable: expired, wrong name, unknown issuer
│   └── PinMismatch        it is another one than the join URL names
├── Unauthenticated        no token, or one that the server does not know
├── PermissionDenied       a token whose role does not allow the call
├── UnsupportedModel       a model or optimizer that the hook cannot train rightly
│   ├── MasterWeights      the optimizer keeps its own copy of the parameters
│   └── NonFiniteParameter NaN, Inf or a value too large, in a named tensor
├── UnclearIsland          a process group of several ranks, and nothing says whether they are one worker
├── IslandBroken           another rank of this worker has died, or gone its own way
├── ManifestMismatch       the model differs from the one being trained
├── ProtocolMismatch       client and server speak different protocols
├── RunMismatch            the address now serves another run
├── RolledBack             the run went back to an earlier version; a new hello says which
├── StateMismatch          a worker's saved state that does not fit its model, run or name
├── NotMember              a worker without a session, or whose lease ran out
├── Superseded             a newer process with the same worker id took over
├── NotReady               asked for something the run does not have yet
│   └── StorageTrouble     the server cannot write to its disk at the moment
├── NotKept                asked for a snapshot that the server does not keep
├── InvalidContribution    a push that is not what the run expects
├── DamagedFrame           a frame that was changed on its way; send it again
├── TooMuchInFlight        more streams or bytes at once than the server takes; later there is room
└── SnapshotExpired        the version being read is gone; ask again

Those a server may answer with carry a gRPC status and travel by class name (`from_wire`).
"""

from __future__ import annotations

from typing import Any, ClassVar

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


class TLSMismatch(DilocoError):
    """One side speaks TLS and the other does not, or a client certificate is missing."""


class CertificateError(DilocoError):
    """The server's certificate is not acceptable: nothing was sent."""


class PinMismatch(CertificateError):
    """The server shows another certificate than the one that the join URL names."""


class Unauthenticated(DilocoError):
    """The call came without a token, or with one that the server does not know."""

    status = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(DilocoError):
    """The role of the caller's token does not allow the call."""

    status = grpc.StatusCode.PERMISSION_DENIED


class UnsupportedModel(DilocoError, ValueError):
    """A model or optimizer that the hook cannot train rightly."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class MasterWeights(UnsupportedModel):
    """The optimizer keeps master weights of its own, which would undo every merge."""


class NonFiniteParameter(UnsupportedModel):
    """A parameter holds NaN, Inf or a magnitude of 2^126 and more."""


class UnclearIsland(DilocoError, ValueError):
    """Several processes train together, and neither the model nor the caller says whether they are one worker."""


class IslandBroken(DilocoError, ConnectionError):
    """Another rank of this worker's island has died or gone its own way: this one cannot go on without it."""


class ManifestMismatch(DilocoError, ValueError):
    """The worker's model differs from the one the run trains."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class ProtocolMismatch(DilocoError):
    """Client and server speak different versions of the protocol."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class RunMismatch(DilocoError):
    """The server runs another run than the one the caller belongs to."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class RolledBack(DilocoError):
    """The run went back to an earlier version and has a new run id; a new hello brings the worker along."""

    status = grpc.StatusCode.ABORTED


class StateMismatch(DilocoError, ValueError):
    """A state of `outer.state_dict()` that does not fit the model, the run or the worker it is loaded into."""


class NotMember(DilocoError):
    """The worker has no session, or its lease ran out; a new hello brings it back."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class Superseded(DilocoError):
    """A newer process with the same worker id has joined."""

    status = grpc.StatusCode.ABORTED


class NotReady(DilocoError):
    """The run does not hold yet what was asked for."""

    status = grpc.StatusCode.UNAVAILABLE


class NotKept(DilocoError, LookupError):
    """The server does not keep the snapshot that was asked for."""

    status = grpc.StatusCode.NOT_FOUND


class StorageTrouble(NotReady):
    """The server's disk takes nothing at the moment, so nothing can be acknowledged."""


class InvalidContribution(DilocoError, ValueError):
    """A push that does not fit the run: wrong fragment, codec, frames or worker."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class DamagedFrame(DilocoError):
    """A frame did not arrive as it was announced: something on the way changes bytes."""

    status = grpc.StatusCode.DATA_LOSS


class TooMuchInFlight(DilocoError):
    """One peer, or all together, have more open or under way than the server takes at once; later there is room."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class SnapshotExpired(DilocoError):
    """The version being read was overtaken; ask for the fragment again."""

    status = grpc.StatusCode.ABORTED


_BY_NAME: dict[str, type[DilocoError]] = {
    cls.__name__: cls
    for cls in (
        ConfigError,
        ConnectionClosed,
        Unauthenticated,
        PermissionDenied,
        UnsupportedModel,
        NonFiniteParameter,
        ManifestMismatch,
        ProtocolMismatch,
        RunMismatch,
        RolledBack,
        NotMember,
        Superseded,
        NotReady,
        StorageTrouble,
        NotKept,
        InvalidContribution,
        DamagedFrame,
        TooMuchInFlight,
        SnapshotExpired,
    )
}


def from_wire(name: str, message: str) -> DilocoError:
    """The error a server answered with: its class by name, DilocoError if this side does not know it."""
    return _BY_NAME.get(name, DilocoError)(message)


def error_from_rpc(error: grpc.RpcError) -> DilocoError | None:
    """The typed error that the server answered with, or None if the failure is the connection's."""
    metadata: Any = error.trailing_metadata()
    for key, value in metadata or ():
        if key == ERROR_KEY:
            return from_wire(str(value), error.details() or "")
    return None
