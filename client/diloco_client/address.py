"""Where a server is, as workers and tools are told: `HOST:PORT`, or the join URL that the server wrote.

    diloco://TOKEN@HOST:PORT?pin=sha256:HEX     TLS; only the certificate with this hash will do (several: HEX,HEX)
    diloco://TOKEN@HOST:PORT?tls=1              TLS; the certificate is checked as a browser does
    diloco://HOST:PORT                          plain, as on loopback
    file:PATH                                   what stands in the file

Tokens never get into an error's text or a repr.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from diloco_proto.errors import InvalidAddress

SCHEME = "diloco"

URL_VARIABLE = "DILOCO_URL"
URL_FILE_VARIABLE = "DILOCO_URL_FILE"

_SHA256_HEX = re.compile(r"[0-9a-f]{64}")
_SECRET = re.compile(r"[\w-]{32,}")


@dataclass(frozen=True, slots=True)
class Place:
    """A server: its address, how to know it, and what to say to be let in."""

    target: str
    """HOST:PORT, as gRPC takes it; may be logged."""
    token: str = field(default="", repr=False)
    pins: tuple[str, ...] = ()
    """SHA-256 of the certificates (DER) that will do, in hexadecimal; empty: whatever the roots vouch for."""
    tls: bool = False

    @property
    def host(self) -> str:
        return self.target.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.target.rpartition(":")[2])

    @property
    def loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the address comes from. One in a file is read again when the server no longer lets us in."""

    text: str = field(default="", repr=False)
    path: Path | None = None

    def read(self) -> Place:
        """Raises InvalidAddress."""
        if self.path is None:
            return read_place(self.text)
        try:
            lines = self.path.read_text("utf-8").split()
        except (OSError, ValueError) as error:
            raise InvalidAddress(f"cannot read the join URL in {self.path}: {error}") from error
        if len(lines) != 1:
            raise InvalidAddress(f"{self.path} must hold one join URL and nothing else")
        return read_place(lines[0])


def find(address: str | None) -> Source:
    """The address that was given, else DILOCO_URL, else the file that DILOCO_URL_FILE names.

    Raises InvalidAddress when there is none.
    """
    text = address or os.environ.get(URL_VARIABLE, "")
    path = os.environ.get(URL_FILE_VARIABLE, "")
    if not text and not path:
        raise InvalidAddress(
            f"no server is given: pass its HOST:PORT or join URL, or set {URL_VARIABLE} or {URL_FILE_VARIABLE}"
        )
    if not text:
        return Source(path=Path(path))
    if text.startswith("file:"):
        return Source(path=Path(text.removeprefix("file://").removeprefix("file:")))
    return Source(text.strip())


def read_place(text: str) -> Place:
    """Raises InvalidAddress, without the token in it."""
    if "://" not in text:
        return Place(parse_address(text))
    try:
        url = urlsplit(text)
        query = dict(parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query)))
    except ValueError as error:
        raise InvalidAddress(f"{shown(text)!r} cannot be read as a join URL: {error}") from None
    if url.scheme != SCHEME or url.path not in ("", "/") or url.fragment or url.password is not None:
        raise InvalidAddress(f"{shown(text)!r} is no join URL: write {SCHEME}://TOKEN@HOST:PORT?pin=sha256:HEX")
    target = parse_address(url.netloc.rpartition("@")[2])
    place = Place(target, unquote(url.username or ""), _pins(query.pop("pin", None)), _tls(query.pop("tls", None)))
    if query:
        raise InvalidAddress(f"a join URL takes `pin` and `tls`, not {', '.join(map(shown, query))}")
    if place.pins:
        place = Place(place.target, place.token, place.pins, tls=True)
    check_clear(place)
    return place


def check_clear(place: Place) -> None:
    """Raises InvalidAddress for a token that would cross a network in the clear."""
    if place.token and not place.tls and not place.loopback:
        raise InvalidAddress(
            f"the token for {place.target} would cross the network in the clear: take the whole join URL that the "
            "server wrote, with its ?pin=…, or end it in ?tls=1 if the server has a certificate of a public authority"
        )


def parse_address(address: str) -> str:
    """host:port as gRPC takes it. Raises InvalidAddress."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host or "@" in host:
        raise InvalidAddress(f"{shown(address)!r} is not a server address: write HOST:PORT, such as 203.0.113.7:50051")
    return address


def shown(text: str) -> str:
    """The text without what could be a token: all before an @, and long words."""
    scheme, found, rest = text.rpartition("://")
    user, at, host = rest.rpartition("@")
    return _SECRET.sub("…", f"{scheme}{found}{'…' if user else ''}{at}{host}")


def _pins(value: str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    kind, _, digests = value.lower().partition(":")
    pins = tuple(digests.split(","))
    if kind != "sha256" or not all(_SHA256_HEX.fullmatch(pin) for pin in pins):
        raise InvalidAddress("the join URL's pin must be sha256: and 64 hexadecimal digits; was it cut off?")
    return pins


def _tls(value: str | None) -> bool:
    if value not in (None, "0", "1"):
        raise InvalidAddress(f"the join URL's tls must be 0 or 1, not {shown(str(value))!r}")
    return value == "1"
