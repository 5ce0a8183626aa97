"""A look at what answers at an address, before anything is sent to it: its certificate, and whether it speaks TLS.

gRPC only says that a connection failed, and tries for ever; this says why.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import socket
import ssl

from diloco_proto.errors import CertificateError, PinMismatch, TLSMismatch

from .address import Place

TIMEOUT = 10.0
"""Seconds for each step of a look: a connection, a handshake, a first answer."""

ClientPair = tuple[str, str]
"""Paths of a client certificate and its key, PEM."""

_UNKNOWN_ISSUER = 20
"""OpenSSL's X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY."""

_SETTINGS = 4
"""Type of the frame with which every HTTP/2 server begins."""


def pinned_certificate(place: Place, timeout: float = TIMEOUT) -> bytes:
    """The server's certificate (DER) if it is one of those that `place` names and its time has not run out.

    Each step may take `timeout` seconds. The handshake ends before anything of ours is sent. Raises PinMismatch,
    CertificateError, TLSMismatch, or ConnectionError when nothing answers.
    """
    der = _handshake(place, _unchecked(), timeout)[0]
    found = hashlib.sha256(der).hexdigest()
    if found not in place.pins:
        raise PinMismatch(
            f"the server at {place.target} shows another certificate (sha256:{found}) than the join URL names; nothing "
            "was sent to it. If its certificate was made anew, take the new join URL from its state directory; if "
            "not, somebody stands between you and it"
        )
    _check_dates(place, der)
    return der


def verified_greeting(place: Place, roots: bytes | None, client: ClientPair | None, timeout: float) -> bytes | None:
    """The first bytes of a server whose certificate `roots` (PEM; None: the system's) vouch for; b"" if it hangs up.

    Raises CertificateError or TLSMismatch when it is not acceptable; ConnectionError when nothing answers.
    """
    context = ssl.create_default_context(cadata=None if roots is None else roots.decode("ascii"))
    context.set_alpn_protocols(["h2"])
    # As gRPC judges: any certificate among the roots is trusted by itself, and no rule is added that it has not.
    context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~ssl.VERIFY_X509_STRICT
    if client is not None:
        context.load_cert_chain(*client)
    try:
        return _handshake(place, context, timeout)[1]
    except ssl.SSLCertVerificationError as error:
        if roots is None and error.verify_code == _UNKNOWN_ISSUER and not context.cert_store_stats()["x509"]:
            return None  # this machine's Python has no roots of its own; gRPC's may know better
        raise CertificateError(
            f"the certificate of the server at {place.target} is not acceptable: {error.verify_message.rstrip('.')}. "
            "Nothing was sent to it. Check the host name, the dates (and this machine's clock), and give the "
            "authority's certificate as ca_cert if it is not a public one"
        ) from None


def unverified_greeting(place: Place, client: ClientPair | None, timeout: float) -> bytes | None:
    """The first bytes of the server, whatever its certificate; b"" if it hangs up. Raises as `verified_greeting`."""
    context = _unchecked()
    if client is not None:
        context.load_cert_chain(*client)
    return _handshake(place, context, timeout)[1]


def turned_away(place: Place, client: ClientPair | None) -> TLSMismatch:
    """A server that checks client certificates hangs up after the handshake, without a word."""
    advice = (
        "it wants a client certificate: pass client_cert and client_key (--client-cert, --client-key)"
        if client is None
        else f"it does not take the client certificate {client[0]}: another issuer than its --client-ca, or expired"
    )
    return TLSMismatch(f"the server at {place.target} hangs up right after the TLS handshake: {advice}")


def check_plain(place: Place, timeout: float) -> None:
    """Raises TLSMismatch when a server that we would talk to in the clear speaks TLS."""
    try:
        _handshake(place, _unchecked(), timeout)
    except (ConnectionError, TLSMismatch):
        return
    raise TLSMismatch(
        f"the server at {place.target} speaks TLS: take its join URL (diloco://TOKEN@…, in `join-url` in its state "
        "directory), as an argument or as DILOCO_URL, instead of the plain address"
    )


def _handshake(place: Place, context: ssl.SSLContext, timeout: float) -> tuple[bytes, bytes | None]:
    """The certificate (DER) and the first bytes that the server sends; None if it says nothing, b"" if it hangs up.

    Raises ssl.SSLCertVerificationError, TLSMismatch for a server without TLS, ConnectionError for the rest.
    """
    try:
        with _connect(place, timeout) as plain, context.wrap_socket(plain, server_hostname=place.host) as secure:
            certificate = secure.getpeercert(binary_form=True)
            try:
                return certificate or b"", secure.recv(9)
            except TimeoutError:
                return certificate or b"", None
            except OSError:
                return certificate or b"", b""
    except ssl.SSLCertVerificationError:
        raise
    except ssl.SSLError as error:
        if _greets_in_the_clear(place, timeout):
            raise TLSMismatch(
                f"the server at {place.target} does not speak TLS, but the join URL asks for it. Take the join URL "
                "that this server wrote; if it runs on loopback or with --insecure, the plain HOST:PORT"
            ) from error
        raise ConnectionError(f"TLS handshake: {error.reason or error}") from error
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from error


def _greets_in_the_clear(place: Place, timeout: float) -> bool:
    try:
        with _connect(place, timeout) as plain:
            first = plain.recv(9)
    except OSError:
        return False
    return len(first) == 9 and first[3] == _SETTINGS


def _unchecked() -> ssl.SSLContext:
    """Takes any certificate: it is judged afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _check_dates(place: Place, der: bytes) -> None:
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(der)
    now = datetime.datetime.now(datetime.UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if begins <= now <= ends:
        return
    fault = f"expired on {ends:%Y-%m-%d}" if now > ends else f"is not valid before {begins:%Y-%m-%d}"
    raise CertificateError(
        f"the certificate of the server at {place.target} {fault}; here it is {now:%Y-%m-%d %H:%M} UTC. Nothing was "
        "sent to it. Set this machine's clock right, or have a new certificate made (on the server: remove `tls/` from "
        "its state directory and start it again) and take the new join URL"
    )


def name_in(der: bytes) -> str:
    """A host name that the certificate holds for: gRPC checks one, although the pin has said all."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    certificate = x509.load_der_x509_certificate(der)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(common[0].value) if common else "diloco"
    dns = names.get_values_for_type(x509.DNSName)
    addresses = names.get_values_for_type(x509.IPAddress)
    return str(next(iter([*dns, *addresses]), "diloco")).replace("*", "pinned")


def _connect(place: Place, timeout: float) -> socket.socket:
    proxy = _proxy(place)
    if proxy is None:
        return socket.create_connection((place.host, place.port), timeout)
    tunnel = socket.create_connection(proxy, timeout)
    try:
        tunnel.sendall(f"CONNECT {place.target} HTTP/1.1\r\nHost: {place.target}\r\n\r\n".encode("ascii"))
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            byte = tunnel.recv(1)  # one at a time: what follows belongs to the server
            if not byte or len(answer) > 8192:
                raise ConnectionError(f"the proxy {proxy[0]}:{proxy[1]} gave no answer to CONNECT")
            answer += byte
        if answer.split(b" ", 2)[1:2] != [b"200"]:
            line = answer.split(b"\r\n")[0].decode("ascii", "replace")
            raise ConnectionError(f"the proxy {proxy[0]}:{proxy[1]} answered CONNECT with {line!r}")
    except BaseException:
        tunnel.close()
        raise
    return tunnel


def _proxy(place: Place) -> tuple[str, int] | None:
    """The HTTP proxy that gRPC would go through: of the same variables, in the same order."""
    from urllib.parse import urlsplit

    if place.loopback:
        return None
    exempt = _first_set("no_grpc_proxy", "no_proxy")
    if any(place.host.endswith(part.strip()) for part in exempt.split(",") if part.strip()):
        return None
    text = _first_set("grpc_proxy", "https_proxy", "http_proxy")
    proxy = urlsplit(text)
    return (proxy.hostname, proxy.port or 80) if proxy.hostname else None


def _first_set(*variables: str) -> str:
    return next((os.environ[name] for name in variables if os.environ.get(name)), "")
