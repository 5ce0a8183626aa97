"""Bare gRPC: a server process of grpc.aio on uvloop that takes and gives bytes, and a synchronous client."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from .crew import end_with

MESSAGE = 1 << 20
SERVICE = "raw.Raw"

KeyPair = tuple[bytes, bytes]
"""Private key and certificate, PEM."""


POOL = 64
"""Different messages, sent in turn: one and the same would come from the processor's cache every time."""


def random_messages() -> list[bytes]:
    return [os.urandom(MESSAGE) for _ in range(POOL)]


def messages(size: int, pool: Sequence[bytes]) -> Iterator[bytes]:
    """So many bytes, in messages of the pool and a rest."""
    for i, left in enumerate(range(size, 0, -MESSAGE)):
        message = pool[i % len(pool)]
        yield message if left >= MESSAGE else message[:left]


@contextmanager
def raw_server(pair: KeyPair | None = None) -> Iterator[int]:
    """Its port; through TLS with a key pair."""
    spawn = mp.get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=_serve, args=(theirs, pair), daemon=True)
    server.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        server.kill()
        server.join()


class RawClient:
    """One connection to it, with gRPC's own channel options."""

    def __init__(self, port: int, certificate: bytes | None = None, name: str = "localhost") -> None:
        """`certificate`: PEM of the server's, which is for `name`."""
        if certificate is None:
            self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        else:
            options = (("grpc.ssl_target_name_override", name),)
            self._channel = grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(certificate), options)
        self._take = self._channel.stream_unary(f"/{SERVICE}/Take")
        self._give = self._channel.unary_stream(f"/{SERVICE}/Give")
        self._messages = random_messages()
        grpc.channel_ready_future(self._channel).result(30)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def push(self, size: int) -> float:
        """Send so many bytes; the seconds until the server has read them."""
        began = time.perf_counter()
        self._take(messages(size, self._messages))
        return time.perf_counter() - began

    def pull(self, size: int) -> float:
        """Receive so many bytes and keep them; the seconds that it took."""
        began = time.perf_counter()
        kept = list(self._give(str(size).encode()))
        taken = time.perf_counter() - began
        assert sum(map(len, kept)) == size
        return taken


def _serve(listening: Any, pair: KeyPair | None) -> None:
    end_with(listening)
    try:
        import uvloop as loops
    except ImportError:
        loops = asyncio
    loops.run(_serving(listening, pair))


async def _serving(listening: Any, pair: KeyPair | None) -> None:
    pool = random_messages()

    async def take(requests: AsyncIterator[bytes], context: object) -> bytes:
        async for _ in requests:
            pass
        return b""

    async def give(request: bytes, context: object) -> AsyncIterator[bytes]:
        for piece in messages(int(request), pool):
            yield piece

    server = grpc.aio.server()
    handlers = {"Take": grpc.stream_unary_rpc_method_handler(take), "Give": grpc.unary_stream_rpc_method_handler(give)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    if pair is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    listening.send(port)
    await server.wait_for_termination()
