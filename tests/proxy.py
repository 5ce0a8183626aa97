"""A bad link: a TCP proxy in a thread of this process, which delays, limits, stalls, cuts, damages and misdirects.

    with Proxy(server.port) as link:
        worker = join(link.address, …)
        link.up.rate = 100_000      # bytes a second, from the worker to the server
        link.stall()                # nothing moves, nobody is told
        link.cut()                  # RST to both

`up` is the way from whoever connects to the upstream server, `down` the way back. Everything may be called from any
thread; what a call has changed holds when it returns.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

CHUNK = 16 << 10
QUEUED_CHUNKS = 64
"""Of each direction of a connection: what a stalled link swallows before its sender notices."""

FRAME_MAGIC = b"DLF1"
FRAME_HEADER = 32

T = TypeVar("T")


@dataclass(slots=True)
class Direction:
    """How one way of the link behaves. Changes apply to connections that are open, too."""

    delay: float = 0.0
    """Seconds that each byte is under way."""
    rate: float = 0.0
    """Bytes a second and connection; 0 for no limit."""
    cut_after: int | None = None
    """The connection that first has carried so many more bytes is reset in that moment; once."""
    damage: int = 0
    """So many frames of the codec are to be changed by one bit on their way."""


@dataclass(eq=False)
class Link:
    """One connection through the proxy."""

    number: int
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    carried: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    """Bytes handed on."""
    flowing: dict[str, asyncio.Event] = field(default_factory=lambda: {"up": asyncio.Event(), "down": asyncio.Event()})
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    orphan: bool = False
    left: bool = False
    """The client has ended it, which the server may not know yet."""


class Proxy:
    """Listens on a free port of 127.0.0.1 and connects to `upstream_port` there."""

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        """May be changed: the server has been started elsewhere."""
        self.refusing = False
        """New connections are reset at once."""
        self.up = Direction()
        self.down = Direction()
        self.accepted = 0
        """Connections so far, the refused not counted."""
        self.cuts = 0
        self.damaged = 0
        self.port = 0
        self._links: list[Link] = []
        self._stalled = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = self._call(self._listen())
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- what befalls the link --

    @property
    def open(self) -> list[int]:
        """Numbers of the connections that are open on both sides, oldest first."""
        return self._now(lambda: [link.number for link in self._links if not link.orphan])

    def left(self, number: int) -> bool:
        """Whether whoever had connected has ended this connection; also if a stall keeps that from the server."""
        return self._now(lambda: all(link.left for link in self._links if link.number == number))

    def carried(self, number: int, way: str) -> int:
        """Bytes that the connection has carried that way, "up" or "down"; 0 for one that is gone."""
        return self._now(lambda: next((link.carried[way] for link in self._links if link.number == number), 0))

    def stall(self, *numbers: int, up: bool = True, down: bool = True, new: bool = True) -> None:
        """Nothing moves any more, on these connections or on all; on new ones either, if `new`, until `resume`."""

        def stall() -> None:
            self._stalled = self._stalled or (new and not numbers)
            for link in self._chosen(numbers):
                for way, wanted in (("up", up), ("down", down)):
                    if wanted:
                        link.flowing[way].clear()

        self._now(stall)

    def resume(self, *numbers: int, old: bool = True) -> None:
        """Everything moves on, what was swallowed first; if not `old` only what connects from now on."""

        def resume() -> None:
            self._stalled = self._stalled and bool(numbers)
            if not old:
                return
            for link in self._chosen(numbers):
                link.flowing["up"].set()
                link.flowing["down"].set()

        self._now(resume)

    def cut(self, *numbers: int, reset: bool = True) -> int:
        """End these connections or all, by RST or else by FIN. Returns how many."""

        def cut() -> int:
            links = [link for link in self._chosen(numbers) if not link.orphan]
            for link in links:
                self._end(link, reset)
            return len(links)

        return self._now(cut)

    def orphan(self, *numbers: int) -> None:
        """End the client's side only: the server still takes the connection for alive, while a new one may come. What
        was under way upwards is held back until `deliver`."""

        def orphan() -> None:
            for link in self._chosen(numbers):
                link.orphan = True
                link.flowing["up"].clear()
                _end(link.client, reset=True)

        self._now(orphan)

    def deliver(self) -> None:
        """Hand on what orphaned connections still held, then end them."""
        orphans = self._now(lambda: [link for link in self._links if link.orphan])
        for link in orphans:
            self._call(self._deliver(link))

    # -- within, on the loop --

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK)

    async def _close(self) -> None:
        self._server.close()
        for link in list(self._links):
            self._end(link, reset=True)
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self.refusing:
            _end(client, reset=True)
            return
        try:
            upstream, server = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=CHUNK)
        except OSError:
            _end(client, reset=True)
            return
        self.accepted += 1
        link = Link(self.accepted, client, server)
        if not self._stalled:
            link.flowing["up"].set()
            link.flowing["down"].set()
        self._links.append(link)
        for way, source, sink, how in (("up", reader, server, self.up), ("down", upstream, client, self.down)):
            queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)
            link.tasks.append(asyncio.create_task(self._read(link, way, source, queue, how)))
            link.tasks.append(asyncio.create_task(self._write(link, way, sink, queue, how)))

    async def _read(
        self,
        link: Link,
        way: str,
        source: asyncio.StreamReader,
        queue: asyncio.Queue[tuple[float, bytes]],
        how: Direction,
    ) -> None:
        data = b"?"
        while data:
            try:
                data = await source.read(CHUNK)
            except OSError:
                data = b""
            link.left = link.left or (way == "up" and not data)
            await queue.put((self._loop.time() + how.delay, data))

    async def _write(
        self,
        link: Link,
        way: str,
        sink: asyncio.StreamWriter,
        queue: asyncio.Queue[tuple[float, bytes]],
        how: Direction,
    ) -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            await link.flowing[way].wait()
            if not data:
                break
            if how.rate:
                await asyncio.sleep(len(data) / how.rate)
            if how.damage:
                data = self._damage(data, how)
            cut = how.cut_after is not None and how.cut_after < len(data)
            if cut:
                data, how.cut_after = data[: how.cut_after], None
            elif how.cut_after is not None:
                how.cut_after -= len(data)
            with suppress(OSError):
                sink.write(data)
                await sink.drain()
            link.carried[way] += len(data)
            if cut:
                break
        if not link.orphan:
            self._end(link, reset=bool(data))

    def _damage(self, data: bytes, how: Direction) -> bytes:
        """Change a bit in the body of a frame, if one begins here."""
        at = data.find(FRAME_MAGIC)
        if at < 0 or at + FRAME_HEADER >= len(data):
            return data
        how.damage -= 1
        self.damaged += 1
        changed = bytearray(data)
        changed[at + FRAME_HEADER] ^= 1
        return bytes(changed)

    async def _deliver(self, link: Link) -> None:
        link.flowing["up"].set()
        await link.tasks[1]  # the writer upwards: up to the end of what the client had sent
        self._end(link, reset=False)

    def _chosen(self, numbers: tuple[int, ...]) -> list[Link]:
        return [link for link in self._links if not numbers or link.number in numbers]

    def _end(self, link: Link, reset: bool) -> None:
        if link not in self._links:
            return
        self._links.remove(link)
        self.cuts += reset
        for writer in (link.client, link.server):
            _end(writer, reset)
        for task in link.tasks:
            if task is not asyncio.current_task(self._loop):
                task.cancel()

    def _now(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self._call(call())

    def _call(self, coroutine: Awaitable[T]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)  # type: ignore[arg-type]


def _end(writer: asyncio.StreamWriter, reset: bool) -> None:
    if reset:
        sock = writer.get_extra_info("socket")
        if sock is not None:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()
