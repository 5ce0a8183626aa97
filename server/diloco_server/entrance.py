"""The way into the server: its port, with TLS and tokens or without, and the URLs that lead there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import threading
from pathlib import Path

import grpc

from diloco_proto.errors import ConfigError

from .auth import Gate, Role, Tokens
from .config import ServerConfig
from .private import write_private
from .tls import Certificate, read_authorities

log = logging.getLogger("diloco.server")

URL_FILES = {Role.WORKER: "join-url", Role.OBSERVER: "observer-url", Role.ADMIN: "admin-url"}
"""In the state directory, one for each role."""

MAX_CONNECTIONS = 1024
"""Open at once, whoever holds them; each costs memory before its token is known. One beyond is closed at once."""

LOOK_SECONDS = 1.0
"""Between two looks at the files of tokens and certificate while nobody calls."""

ANY_ADDRESS = ("0.0.0.0", "::", "")


class Entrance:
    """Open to everybody, or guarded: TLS, and a token for every call. Raises ConfigError."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._port = 0
        self._lock = threading.Lock()
        self._tokens: Tokens | None = None
        self._certificate: Certificate | None = None
        self._credentials: grpc.ServerCredentials | None = None
        if config.guarded:
            self._guard(config, config.state_dir)
        elif config.insecure:
            log.warning(
                "INSECURE: no TLS and no token at %s. Whoever reaches it can join, read the model, and push anything",
                config.host,
            )

    @property
    def guarded(self) -> bool:
        return self._credentials is not None

    @property
    def insecure(self) -> bool:
        """Asked to do without TLS and tokens."""
        return self._config.insecure

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        """Channel arguments: half of the files that this process may open are left to the journal and all else."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MAX_CONNECTIONS if files < 0 else min(MAX_CONNECTIONS, files // 2)
        return (("grpc.max_allowed_incoming_connections", most),)

    @property
    def interceptors(self) -> tuple[grpc.aio.ServerInterceptor, ...]:
        return () if self._tokens is None else (Gate(self._tokens),)

    def bind(self, server: grpc.aio.Server, address: str) -> int:
        """Returns the port. Raises RuntimeError when it is taken."""
        if self._credentials is None:
            self._port = server.add_insecure_port(address)
        else:
            self._port = server.add_secure_port(address, self._credentials)
        return self._port

    def url(self, role: Role = Role.WORKER) -> str:
        """With the role's token in it: a secret. `bind` comes first."""
        where = self._advertised()
        if self._certificate is None:
            return f"diloco://{where}"
        token = "" if self._tokens is None else self._tokens.newest(role)
        pair = self._certificate.pair
        # A certificate of an authority is renewed every few months: a pin would lock all workers out.
        known_by = f"pin=sha256:{pair.pin}" if pair.self_signed else "tls=1"
        return f"diloco://{token}@{where}?{known_by}"

    def write_urls(self) -> None:
        """Put them where workers and tools can take them from. Raises ConfigError."""
        folder, shared = self._config.state_dir, self._config.join_url_file
        places = {} if folder is None else {folder / name: role for role, name in URL_FILES.items()}
        if shared is not None:
            places[shared] = Role.WORKER
        with self._lock:
            for path, role in places.items():
                text = self.url(role).encode("utf-8") + b"\n"
                if not _holds(path, text):  # a full disk must not keep the server from starting again
                    write_private(path, text)

    async def watch(self) -> None:
        """Take up tokens and a certificate that change while nobody calls: whoever hands out the URL, reads it then."""
        while self._tokens is not None and self._certificate is not None:
            self._tokens.refresh()
            self._certificate.refresh()
            await asyncio.sleep(LOOK_SECONDS)

    @property
    def url_file(self) -> Path | None:
        folder = self._config.state_dir
        return None if folder is None else folder / URL_FILES[Role.WORKER]

    def _guard(self, config: ServerConfig, folder: Path | None) -> None:
        if config.tls_cert is not None and config.tls_key is not None:
            self._certificate = Certificate.of_user(config.tls_cert, config.tls_key)
        else:
            host = _split(config.advertise)[0] or config.host
            names = () if host in ANY_ADDRESS else (host,)
            self._certificate = Certificate.own(folder and folder / "tls", names)
        authorities = None if config.client_ca is None else read_authorities(config.client_ca)
        self._credentials = self._certificate.credentials(authorities)
        self._tokens = Tokens(folder and folder / "tokens")
        self._certificate.on_change = self._tokens.on_change = self._rewrite_urls

    def _rewrite_urls(self) -> None:
        try:
            self.write_urls()
        except ConfigError as error:
            log.error("the join URL has changed, but %s", error)

    def _advertised(self) -> str:
        host, port = _split(self._config.advertise)
        host = host or self._config.host
        if host in ANY_ADDRESS:
            host = _outward()
        return f"[{host}]:{port or self._port}" if ":" in host else f"{host}:{port or self._port}"


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _split(address: str) -> tuple[str, str]:
    """HOST[:PORT], an IPv6 address in brackets, into host (no brackets) and port; either may be empty."""
    if address.startswith("["):
        host, _, rest = address[1:].partition("]")
        return host, rest.removeprefix(":")
    host, _, port = address.partition(":")
    return host, port


def _outward() -> str:
    """This machine's address on the way to the internet, as far as it knows itself; behind NAT, `advertise` must say
    it. No packet is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return socket.gethostname()
