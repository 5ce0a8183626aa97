"""Connections to one server: which there are, how each is secured, and what a failed one says.

A certificate that the join URL pins is fetched and compared before anything is sent, and is then gRPC's only root. It
is fetched again when a handshake fails, not before.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import grpc

from diloco_proto.channel import CLIENT_OPTIONS
from diloco_proto.errors import (
    CertificateError,
    ConfigError,
    InvalidAddress,
    PermissionDenied,
    ServerUnreachable,
    TLSMismatch,
    Unauthenticated,
    error_from_rpc,
)

from . import probe
from .address import Place, check_clear, find
from .stub import Stub

log = logging.getLogger("diloco")

CA_CERT_VARIABLE = "DILOCO_CA_CERT"
CLIENT_VARIABLES = ("DILOCO_CLIENT_CERT", "DILOCO_CLIENT_KEY")
"""Stand in for ca_cert, client_cert and client_key where TLS is spoken and they are not given."""

LOOK_SECONDS = 5.0
"""The longest time between two looks at a server that does not answer, for a reason that waiting will not mend."""

A_MOMENT = 1.0
"""Seconds for which it is not worth a word that the server does not answer."""

HANG_UPS = 3
"""In a row, right after a handshake, before they are taken for the server's word and not for a bad link's."""


class Credentials(TypedDict, total=False):
    """What a join URL does not carry."""

    token: str | None
    ca_cert: str | Path | None
    client_cert: str | Path | None
    client_key: str | Path | None


@dataclass(eq=False, slots=True)
class Line:
    """One connection, with the stub of the protocol over it."""

    name: str
    token: str
    channel: grpc.Channel
    stub: Any


class Connector:
    """Opens lines to the server at `address` (HOST:PORT or join URL; None: from the environment), each once.

    `token` overrides the URL's. `ca_cert` are PEM certificates of authorities, in the place of the public ones;
    `client_cert` and `client_key` are shown to a server that asks for them (mTLS); DILOCO_CA_CERT, DILOCO_CLIENT_CERT
    and DILOCO_CLIENT_KEY stand in for them. An address in a file is read again whenever a line is opened. Raises
    InvalidAddress, or ConfigError for files that cannot be used.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        ca_cert: str | Path | None = None,
        client_cert: str | Path | None = None,
        client_key: str | Path | None = None,
    ) -> None:
        self._source = find(address)
        self._token = token
        self._ca_cert = Path(ca_cert) if ca_cert else None
        self._client = _client_pair(client_cert, client_key)
        self._place = self._read()
        if self._place.tls:
            self._ca_cert = self._ca_cert or _path_in(CA_CERT_VARIABLE)
            self._client = self._client or _client_pair(*map(_path_in, CLIENT_VARIABLES))
        if self._ca_cert is not None:
            _check_roots(self._ca_cert)
        self._lines: dict[str, Line] = {}
        self._former: list[Line] = []
        self._lock = threading.Lock()
        self._pinned: tuple[Place, bytes] | None = None
        self._look_first = False
        self._reached = False
        self._closed = threading.Event()

    @property
    def target(self) -> str:
        """HOST:PORT; all that may be shown of where this goes."""
        return self._place.target

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            lines = [*self._lines.values(), *self._former]
            self._lines.clear()
        for line in lines:
            line.channel.close()

    # -- lines --

    def line(self, name: str, timeout: float = probe.TIMEOUT) -> Line:
        """The line of that name; opened when it is first asked for, which takes a moment (each step of it at most
        `timeout` seconds) where a certificate is pinned.

        Raises ConnectionError, and a DilocoError for what no new attempt mends: PinMismatch, CertificateError,
        TLSMismatch.
        """
        with self._lock:
            line = self._lines.get(name)
        if line is not None:
            return line
        opened = self._open(name, timeout)  # this may take seconds: not under the lock
        with self._lock:
            line = self._lines.setdefault(name, opened)
            if self._closed.is_set():
                self._former.append(opened)
        if line is not opened or self._closed.is_set():
            opened.channel.close()
        if self._closed.is_set():
            raise ConnectionError(f"the connection to {self.target} was closed")
        return line

    def drop(self, line: Line) -> None:
        """Let go of a line that is of no use for new calls; those under way go on. The next `line` opens another."""
        with self._lock:
            if self._lines.get(line.name) is line:
                del self._lines[line.name]
                self._former.append(line)

    def unused(self, line: Line) -> None:
        """No call is under way on the line: it is closed if it was dropped."""
        with self._lock:
            if line not in self._former:
                return
            self._former.remove(line)
        line.channel.close()

    def failed(self, line: Line, error: grpc.RpcError) -> ConnectionError | None:
        """What a call's failure says of its line. A ConnectionError when another line may do better, so that the
        call is worth a new attempt whatever its error is; None when the error stands."""
        if isinstance(error_from_rpc(error), Unauthenticated | PermissionDenied):
            if self._current().token == line.token:
                return None
            self.drop(line)
            return ConnectionError("the join URL has changed; trying with the new one")
        if error.code() is grpc.StatusCode.UNAVAILABLE and "handshake failed" in (error.details() or ""):
            self._pinned = None
            self._look_first = True
            self.drop(line)
        return None

    def reach(self, name: str, timeout: float, on_waiting: Callable[[], None]) -> None:
        """Return once the server answers on that line; `on_waiting` is called when that takes more than a moment.

        Raises ServerUnreachable after `timeout` seconds; at once what no waiting mends.
        """
        began = time.monotonic()
        deadline = began + timeout
        patience, pause, waiting, reason = 0.5, 0.25, False, ""
        while True:
            left = max(0.05, deadline - time.monotonic())
            step = min(left, probe.TIMEOUT)
            try:
                line = self.line(name, step)
                if _ready(line.channel, min(patience, left)):
                    self._reached = True
                    return
                patience = min(2 * patience, LOOK_SECONDS) if waiting else patience
                self._look(step)
            except ConnectionError as error:
                if self._closed.wait(min(pause, left)):
                    raise
                pause = min(2 * pause, LOOK_SECONDS)
                reason = f" ({error})"
            if time.monotonic() >= deadline:
                raise ServerUnreachable(
                    f"no diloco-server answered at {self.target} within {timeout:.0f} s{reason}. Is it running, is the "
                    "address right, and does a firewall let the port through?"
                )
            if not waiting and time.monotonic() - began >= A_MOMENT:
                on_waiting()
                waiting = True

    # -- within --

    def _read(self) -> Place:
        place = self._source.read()
        if self._token is not None:
            place = replace(place, token=self._token)
        if self._ca_cert or self._client or (self._token and not place.loopback):
            place = replace(place, tls=True)
        check_clear(place)
        return place

    def _current(self) -> Place:
        """Where to go now: a file may have changed."""
        if self._source.path is not None:
            try:
                self._place = self._read()
            except InvalidAddress as error:
                log.warning("%s; the former one is used", error)
        return self._place

    def _open(self, name: str, timeout: float) -> Line:
        place = self._current()
        try:
            options, credentials = self._secured(place, timeout)
        except (CertificateError, TLSMismatch) as error:
            if not self._reached:
                raise
            # A laptop that wakes in a hotel's network meets the hotel's gate: not the end of a run.
            log.warning("%s; training goes on, and it is tried again", error)
            raise ConnectionError(str(error)) from error
        if place.loopback:
            options.append(("grpc.enable_http_proxy", 0))  # a proxy cannot know what is on this machine
        if credentials is None:
            channel = grpc.insecure_channel(place.target, options)
        else:
            channel = grpc.secure_channel(place.target, credentials, options)
        if place.token:
            channel = grpc.intercept_channel(channel, _Bearer(place.token))
        return Line(name, place.token, channel, Stub(channel))

    def _secured(self, place: Place, timeout: float) -> tuple[list[tuple[str, Any]], grpc.ChannelCredentials | None]:
        """Options and credentials of a channel."""
        options: list[tuple[str, Any]] = [*CLIENT_OPTIONS]
        if not place.tls:
            return options, None
        certificate, key = (None, None) if self._client is None else map(_read, self._client)
        if place.pins:
            known, der = self._pinned or (None, b"")
            if known != place:
                der = probe.pinned_certificate(place, timeout)
                self._pinned = place, der
            options.append(("grpc.ssl_target_name_override", probe.name_in(der)))
            roots: bytes | None = ssl.DER_cert_to_PEM_cert(der).encode("ascii")
        else:
            roots = self._roots()
            if self._look_first:
                probe.verified_greeting(place, roots, self._client, timeout)
        self._look_first = False
        return options, grpc.ssl_channel_credentials(roots, key, certificate)

    def _look(self, timeout: float) -> None:
        """At what answers, since gRPC gets no connection. Raises what waiting will not mend, or ConnectionError."""
        place = self._place
        if not place.tls:
            probe.check_plain(place, timeout)
            return
        for _ in range(HANG_UPS):
            if place.pins:
                probe.pinned_certificate(place, timeout)
                greeting = probe.unverified_greeting(place, self._client, timeout)
            else:
                greeting = probe.verified_greeting(place, self._roots(), self._client, timeout)
            if greeting != b"" or self._closed.wait(0.2):
                return
        raise probe.turned_away(place, self._client)

    def _roots(self) -> bytes | None:
        """PEM certificates of the authorities to trust; None: those that gRPC brings along."""
        if self._ca_cert is not None:
            return _read(self._ca_cert)
        bundle = ssl.get_default_verify_paths().cafile
        return _read(bundle) if bundle else None


@dataclass(frozen=True, slots=True)
class _Details(grpc.ClientCallDetails):
    """Of one call, as gRPC takes them from an interceptor."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None = None


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Puts the token into every call's metadata."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(self._with_token(client_call_details), request_iterator)

    def _with_token(self, details: Any) -> Any:
        metadata = (*(details.metadata or ()), self._entry)
        return _Details(details.method, details.timeout, metadata, details.credentials, details.wait_for_ready)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConnectionError(f"cannot read {path}: {error.strerror}") from error  # it may be in exchange just now


def _ready(channel: grpc.Channel, timeout: float) -> bool:
    try:
        future = grpc.channel_ready_future(channel)
    except ValueError as error:  # gRPC's word for a channel that was closed in this moment
        raise ConnectionError(f"the connection was closed: {error}") from error
    try:
        future.result(timeout)
    except grpc.FutureTimeoutError:
        future.cancel()
        return False
    return True


def _client_pair(cert: str | Path | None, key: str | Path | None) -> tuple[str, str] | None:
    """Paths of certificate and key. Raises ConfigError unless they can be read and belong together."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("client_cert and client_key go together: one is given without the other")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ConfigError(f"client_cert {cert} with client_key {key} cannot be used: {error}") from error
    return str(cert), str(key)


def _path_in(variable: str) -> Path | None:
    text = os.environ.get(variable, "")
    return Path(text) if text else None


def _no_password() -> str:
    raise ValueError("the key is encrypted; a key without a password is needed")


def _check_roots(path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        raise ConfigError(f"ca_cert {path} holds no certificate that can be read: {error}") from error
