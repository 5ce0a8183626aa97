"""What a stranger's socket can send to a port: things that are no gRPC, and gRPC without a token."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress

from diloco_proto.channel import LOOKAHEAD_BYTES

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_HEADERS = 4

WINDOW = LOOKAHEAD_BYTES
"""Bytes that the server lets a connection send, by its SETTINGS and WINDOW_UPDATE, before it has read any."""

PIECE = 1 << 13
"""Of them in a frame."""

Socket = socket.socket | ssl.SSLSocket
Trick = tuple[Callable[[int], Socket], Callable[[random.Random], Iterator[bytes]]]
"""How to connect to a port, and what to send."""


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def tls(port: int) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    connection = context.wrap_socket(connect(port), do_handshake_on_connect=False)
    try:
        connection.do_handshake()
    except OSError:
        connection.close()
        raise
    return connection


def http2(port: int) -> ssl.SSLSocket:
    """As far as every client gets."""
    connection = tls(port)
    with suppress(OSError):
        connection.sendall(PREFACE + frame(SETTINGS))
    return connection


def frame(kind: int, stream: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def header_block(*, path: str = "/diloco.v1.Outer/Push", token: str = "") -> bytes:
    """A gRPC call's headers in HPACK, every one a literal."""
    fields = {
        ":method": "POST",
        ":scheme": "https",
        ":path": path,
        ":authority": "127.0.0.1",
        "te": "trailers",
        "content-type": "application/grpc",
    } | ({"authorization": f"Bearer {token}"} if token else {})
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())


def _text(text: str) -> bytes:
    data = text.encode("ascii")
    assert len(data) < 127
    return bytes((len(data),)) + data


# -- the tricks: what to send over a connection that then stays open --


def noise(dice: random.Random) -> Iterator[bytes]:
    yield dice.randbytes(200_000)


def noise_as_frames(dice: random.Random) -> Iterator[bytes]:
    yield PREFACE + dice.randbytes(200_000)


def web_page(dice: random.Random) -> Iterator[bytes]:
    yield b"GET / HTTP/1.1\r\nHost: diloco\r\n" + b"X-Long: " + b"a" * 100_000 + b"\r\n"


def half_a_greeting(dice: random.Random) -> Iterator[bytes]:
    """The beginning of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="diloco").do_handshake()
    yield outgoing.read()[: dice.randrange(1, 200)]


def silence(dice: random.Random) -> Iterator[bytes]:
    yield b""


def odd_frames(dice: random.Random) -> Iterator[bytes]:
    for _ in range(50):
        kind, stream = dice.randrange(12), dice.choice((0, 1, 2, 3, 1 << 30))
        yield frame(kind, stream, dice.randbytes(dice.choice((0, 4, 8, 500))), dice.randrange(256))


def endless_headers(dice: random.Random) -> Iterator[bytes]:
    yield frame(HEADERS, 1, header_block())
    for _ in range(60):
        yield frame(CONTINUATION, 1, b"\0" + _text("x") + b"\x7f\x81\x3f" + b"y" * 8192)


def pings(dice: random.Random) -> Iterator[bytes]:
    for _ in range(20):
        yield frame(PING, 0, bytes(8)) * 500


def called_and_reset(dice: random.Random) -> Iterator[bytes]:
    """Calls that end as soon as they have begun, as many as will go."""
    for stream in range(1, 1000, 2):
        call = frame(HEADERS, stream, header_block(token="x" * 43), END_HEADERS)
        yield call + frame(RST_STREAM, stream, (8).to_bytes(4, "big"))


def calls_with_bodies(dice: random.Random) -> Iterator[bytes]:
    """As many calls as the server admits and then some, no token or a wrong one, and all the data that may be sent."""
    token = dice.choice(("", "y" * 43))
    streams = range(1, 64, 2)
    yield b"".join(frame(HEADERS, s, header_block(token=token), END_HEADERS) for s in streams)
    for at in range(0, WINDOW, PIECE):
        body = (b"\0" + (4 << 20).to_bytes(4, "big") if not at else b"") + bytes(PIECE - 5)
        yield frame(DATA, dice.choice(streams), body)


UNAUTHENTICATED: Trick = (http2, calls_with_bodies)

TRICKS: tuple[Trick, ...] = (
    (connect, noise),
    (connect, web_page),
    (connect, half_a_greeting),
    (connect, silence),
    (tls, silence),
    (tls, noise),
    (tls, noise_as_frames),
    (http2, silence),
    (http2, odd_frames),
    (http2, endless_headers),
    (http2, pings),
    (http2, called_and_reset),
    UNAUTHENTICATED,
)
