"""Certificates of every kind, good and bad, and servers that show them."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, PEM, and what is needed to sign others with it."""

    certificate: bytes
    key: bytes
    leaf: x509.Certificate
    signer: ec.EllipticCurvePrivateKey

    @property
    def pin(self) -> str:
        return hashlib.sha256(self.leaf.public_bytes(serialization.Encoding.DER)).hexdigest()

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        folder.mkdir(exist_ok=True)
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(self.certificate)
        key.write_bytes(self.key)
        key.chmod(0o600)
        return certificate, key


def issue(
    name: str,
    *,
    by: Issued | None = None,
    begins: datetime.timedelta = -DAY,
    ends: datetime.timedelta = DAY,
    names: tuple[str, ...] = ("diloco",),
) -> Issued:
    """Signed by itself, as an authority, or `by` one. `begins` and `ends` are relative to now."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = [
        x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() or n.startswith(":") else x509.DNSName(n)
        for n in names
    ]
    leaf = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by.leaf.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        .sign(key if by is None else by.signer, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Issued(leaf.public_bytes(serialization.Encoding.PEM), private, leaf, key)


class Handled(grpc.GenericRpcHandler):
    """Takes any call, and notes its method and metadata."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[tuple[str, str], ...]]] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        self.calls.append((handler_call_details.method, tuple(handler_call_details.invocation_metadata)))
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")


@contextmanager
def shows(issued: Issued | None) -> Iterator[tuple[int, Handled]]:
    """A gRPC server with that certificate, or in the clear: its port, and the calls that reached it."""
    handled = Handled()
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=(handled,))
    if issued is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        credentials = grpc.ssl_server_credentials([(issued.key, issued.certificate)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port, handled
    finally:
        server.stop(None).wait()
