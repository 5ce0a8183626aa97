"""The server's certificate: its own, made on the first start, or the user's; read again when its files change."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from diloco_proto.errors import ConfigError

from .private import private_folder, signature, warn_if_open, write_private

log = logging.getLogger("diloco.server")

NAME = "diloco"
"""Host name in every certificate that we make. Clients know it by its pin, so no other needs to be right."""

LIFETIME = datetime.timedelta(days=3650)
"""Of a certificate that we make: no run outlives it, and a new one means a new join URL for every worker."""

EARLY = datetime.timedelta(days=1)
"""A certificate is valid from so long before it is made: clocks of workers may be behind."""

WARN_BEFORE = datetime.timedelta(days=21)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate, perhaps with the chain behind it, and its key; PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    leaf: x509.Certificate

    @property
    def pin(self) -> str:
        """SHA-256 of the certificate's DER, in hexadecimal."""
        return hashlib.sha256(self.leaf.public_bytes(serialization.Encoding.DER)).hexdigest()

    @property
    def self_signed(self) -> bool:
        return self.leaf.issuer == self.leaf.subject


def self_signed(names: Iterable[str]) -> KeyPair:
    """A new certificate for NAME, loopback and these host names and addresses; EC P-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = [_general_name(n) for n in dict.fromkeys((NAME, "localhost", "127.0.0.1", "::1", *names))]
    leaf = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return KeyPair(leaf.public_bytes(serialization.Encoding.PEM), private, leaf)


def load(certificate: Path, key: Path) -> KeyPair:
    """Raises ConfigError for files that cannot be read, do not belong together, or a time that has run out."""
    try:
        pem, private = certificate.read_bytes(), key.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
    try:
        leaf = x509.load_pem_x509_certificates(pem)[0]
        public = serialization.load_pem_private_key(private, None).public_key()
    except (ValueError, TypeError) as error:  # TypeError: the key has a password
        raise ConfigError(
            f"{certificate} and {key} must hold a certificate and its key, PEM, without a password: {error}"
        ) from error
    if public != leaf.public_key():
        raise ConfigError(f"the key in {key} does not belong to the certificate in {certificate}")
    _check_dates(certificate, leaf)
    return KeyPair(pem, private, leaf)


class Certificate:
    """What the server shows. Files that change are taken up at the next handshake or `refresh`; bad ones are not."""

    def __init__(self, files: tuple[Path, Path] | None, pair: KeyPair) -> None:
        self.pair = pair
        self.on_change: Callable[[], None] | None = None
        self._files = files
        self._seen = self._signatures()
        self._lock = threading.Lock()

    @classmethod
    def of_user(cls, certificate: Path, key: Path) -> Certificate:
        pair = load(certificate, key)
        warn_if_open(key)
        return cls((certificate, key), pair)

    @classmethod
    def own(cls, folder: Path | None, names: Iterable[str]) -> Certificate:
        """That in `folder`, made there if there is none; without a folder, one that ends with this process."""
        if folder is None:
            return cls(None, self_signed(names))
        certificate, key = private_folder(folder) / "cert.pem", folder / "key.pem"
        if not certificate.exists() and not key.exists():
            pair = self_signed(names)
            write_private(key, pair.key)
            write_private(certificate, pair.certificate)
            log.info("made a certificate for TLS: %s", certificate)
        return cls.of_user(certificate, key)

    def credentials(self, client_ca: bytes | None) -> grpc.ServerCredentials:
        """With `client_ca` (PEM) clients must show a certificate that one of those authorities has signed."""
        told = self.pair

        def configuration() -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(self.pair.key, self.pair.certificate)], client_ca)

        def on_handshake() -> grpc.ServerCertificateConfiguration | None:
            nonlocal told
            self.refresh()
            if self.pair is told:
                return None
            told = self.pair
            return configuration()

        return grpc.dynamic_ssl_server_credentials(
            configuration(),
            on_handshake,  # type: ignore[arg-type]  # None is "as before": documented, and missing in the stubs
            client_ca is not None,
        )

    def refresh(self) -> None:
        """Take up files that have changed; what is wrong with them is logged, and the old pair stays."""
        with self._lock:
            seen = self._signatures()
            if self._files is None or seen == self._seen:
                return
            self._seen = seen
            try:
                self.pair = load(*self._files)
            except ConfigError as error:
                log.error("the new TLS certificate is not taken: %s. The former one stays in use", error)
                return
        log.info("a new TLS certificate is in use: sha256:%s", self.pair.pin)
        if self.on_change is not None:
            self.on_change()

    def _signatures(self) -> tuple[object, ...]:
        return tuple(signature(path) for path in self._files or ())


def read_authorities(path: Path) -> bytes:
    """PEM certificates, at least one. Raises ConfigError."""
    try:
        pem = path.read_bytes()
        x509.load_pem_x509_certificates(pem)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} must hold PEM certificates of authorities: {error}") from error
    return pem


def _check_dates(path: Path, leaf: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if now < leaf.not_valid_before_utc:
        raise ConfigError(f"the certificate in {path} is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M}")
    if now > leaf.not_valid_after_utc:
        raise ConfigError(
            f"the certificate in {path} expired on {leaf.not_valid_after_utc:%Y-%m-%d}: put a new one there with its "
            "key, or remove both if diloco-server made them (it makes new ones; the join URL changes)"
        )
    if now > leaf.not_valid_after_utc - WARN_BEFORE:
        log.warning("the certificate in %s expires on %s", path, f"{leaf.not_valid_after_utc:%Y-%m-%d}")


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
