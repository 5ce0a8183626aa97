"""Long links to one server: a process that relays TCP connections with a delay, a rate and stalls.

Unlike the tests' proxy, which does mischief, these are to be fast, and a link's rate is that of all its connections
together. What has been read goes on its way at the moment when a line of that rate would have carried it, and a delay
later; a link reads no more while QUEUE seconds of its bytes wait for their turn.
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from .crew import end_with

CHUNK = 128 << 10
QUEUE = 0.05
"""Seconds: the buffer of a router that is not too large."""

STALL_GAP, STALL_SECONDS = 2.0, 0.5
"""Where connections stall, each does by itself: so long after the last time in the mean (exponential), and so long."""


class Controls:
    """How the links of one server behave; any process may change it."""

    def __init__(self) -> None:
        self._values = mp.get_context("forkserver").RawArray("d", 3)

    def set(self, rate: float = 0.0, delay: float = 0.0, stalls: bool = False) -> None:
        """`rate`: bytes a second each way and link, 0 for no limit; `delay`: seconds each way."""
        self._values[:] = [rate, delay, float(stalls)]

    def get(self) -> tuple[float, float, bool]:
        rate, delay, stalls = self._values[:]
        return rate, delay, bool(stalls)


@contextmanager
def links(upstream_port: int, count: int, controls: Controls) -> Iterator[list[int]]:
    """The ports of so many links to a server on this machine."""
    spawn = mp.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_main, args=(theirs, upstream_port, count, controls), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


@dataclass
class _Way:
    """One way of a link."""

    controls: Controls
    free_at: float = 0.0
    """When all that has been read so far is on its way."""

    def send(self, size: int, now: float) -> tuple[float, float]:
        """When so many bytes arrive, and when more may be read."""
        rate, delay, _ = self.controls.get()
        self.free_at = max(self.free_at, now) + (size / rate if rate else 0.0)
        return self.free_at + delay, self.free_at - QUEUE


@dataclass
class _Queue:
    """What one connection has under way in one direction: when it arrives, and the bytes; none at the end."""

    items: deque[tuple[float, bytes]] = field(default_factory=deque)
    filled: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, due: float, data: bytes) -> None:
        self.items.append((due, data))
        self.filled.set()

    async def get(self) -> tuple[float, bytes]:
        while not self.items:
            self.filled.clear()
            await self.filled.wait()
        return self.items.popleft()


@dataclass
class _Stalls:
    """Of one connection, both ways at once."""

    dice: random.Random
    next_at: float

    def until(self, now: float) -> float:
        """When bytes that could arrive now do arrive."""
        while now >= self.next_at + STALL_SECONDS:
            self.next_at += STALL_SECONDS + self.dice.expovariate(1 / STALL_GAP)
        return self.next_at + STALL_SECONDS if now >= self.next_at else now


class _Link:
    def __init__(self, upstream_port: int, controls: Controls, seed: int) -> None:
        self._port = upstream_port
        self._controls = controls
        self._up, self._down = _Way(controls), _Way(controls)
        self._dice = random.Random(seed)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        dice = random.Random(self._dice.random())
        stalls = _Stalls(dice, loop.time() + dice.expovariate(1 / STALL_GAP))
        there, back = await asyncio.open_connection("127.0.0.1", self._port, limit=CHUNK)
        up, down = _Queue(), _Queue()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(reader, self._up, up))
            tasks.create_task(self._read(there, self._down, down))
            tasks.create_task(self._write(up, back, stalls))
            tasks.create_task(self._write(down, writer, stalls))

    async def _read(self, reader: asyncio.StreamReader, way: _Way, queue: _Queue) -> None:
        clock = asyncio.get_running_loop().time
        data = b"?"
        while data:
            try:
                data = await reader.read(CHUNK)
            except OSError:
                data = b""
            due, more_at = way.send(len(data), clock())
            queue.put(due, data)
            if more_at > clock():
                await asyncio.sleep(more_at - clock())

    async def _write(self, queue: _Queue, writer: asyncio.StreamWriter, stalls: _Stalls) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due, data = await queue.get()
            if self._controls.get()[2]:
                due = stalls.until(max(due, clock()))
            if due > clock():
                await asyncio.sleep(due - clock())
            if not data:
                break
            with suppress(OSError):
                writer.write(data)
                await writer.drain()
        writer.close()


def _main(answer: Any, upstream_port: int, count: int, controls: Controls) -> None:
    end_with(answer)
    try:
        import uvloop as loops
    except ImportError:
        loops = asyncio
    loops.run(_serve(answer, upstream_port, count, controls))


async def _serve(answer: Any, upstream_port: int, count: int, controls: Controls) -> None:
    ports, servers = [], []
    for seed in range(count):
        link = _Link(upstream_port, controls, seed)
        servers.append(await asyncio.start_server(link.accept, "127.0.0.1", 0, limit=CHUNK))
        ports.append(servers[-1].sockets[0].getsockname()[1])
    answer.send(ports)
    await asyncio.Event().wait()
