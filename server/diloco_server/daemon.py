"""The lifecycle of the server: start, serve until told to stop, shut down in order."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from diloco_proto.channel import SERVER_OPTIONS
from diloco_proto.errors import ConfigError, DilocoError

from .calls import CountCalls
from .config import RunConfig, ServerConfig
from .engine import Engine
from .entrance import Entrance
from .footprint import give_back, put_compiler_away, reuse_blocks
from .gauges import engine_metrics
from .health import health_handlers
from .keeper import Keeper
from .metrics import Exporter
from .opening import open_run
from .service import handlers

log = logging.getLogger("diloco.server")

MATH_THREADS = 4
"""Commits, frame checks and compression; two cores are kept busy even while one thread waits for memory."""

TRIM_SECONDS = 2.0

STOP_SECONDS = 5.0
"""How long open calls may take to end once the server has drained."""


class AddressInUse(DilocoError, OSError):
    """Another process listens on the port."""


class Daemon:
    """One server. `run` serves until `stop` is called; all of it happens on one event loop."""

    def __init__(self, config: RunConfig, server: ServerConfig) -> None:
        self._server = server
        self.entrance = Entrance(server)
        self._threads = ThreadPoolExecutor(MATH_THREADS, thread_name_prefix="diloco-math")
        opened = open_run(config, server, self._threads, time.monotonic())
        keeper = Keeper(
            opened,
            self._threads,
            journal=server.durability == "journal",
            every=server.snapshot_every,
            kept=server.keep_snapshots,
        )
        self._opened = opened
        self.engine = Engine(opened.run, self._threads, keeper)
        self.engine.on_failure = self._fail
        self.failure: Exception | None = None
        """The fault of ours that stopped the server."""
        self.port = 0
        self.on_stop: Callable[[], None] = lambda: None
        """Called once, when the shutdown begins."""
        self._stopping: asyncio.Event | None = None
        self._reason = ""

    @property
    def address(self) -> str:
        host = self._server.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def join_url(self) -> str:
        """What a worker is told to join. A secret when the server is guarded: the token is in it."""
        return self.entrance.url()

    async def run(self, on_listening: Callable[[Daemon], None]) -> None:
        """Serve until `stop`. Calls `on_listening` once the port is open and the kernels are compiled.

        Raises AddressInUse, or `failure` if there was one.
        """
        self._stopping = asyncio.Event()
        interceptors = (CountCalls(self.engine.metrics), *self.entrance.interceptors)
        server = grpc.aio.server(options=(*SERVER_OPTIONS, *self.entrance.options), interceptors=interceptors)
        server.add_generic_rpc_handlers((handlers(self.engine), health_handlers(self.engine)))
        self._bind(server)
        exporter = self._export_metrics()
        watching = asyncio.create_task(self.entrance.watch())
        try:
            await self.engine.warm_up()
            await self._go_on()
            await server.start()
            self._announce()
            log.info("run %s is served at %s", self.engine.run.run_id, self.address)
            on_listening(self)
            await self._stopping.wait()
            await self.engine.drain(self._reason)
        finally:
            watching.cancel()
            await server.stop(STOP_SECONDS if self._stopping.is_set() else None)
            self._threads.shutdown(wait=True)
            if exporter is not None:
                await asyncio.to_thread(exporter.close)
            if self._server.port_file is not None:
                self._server.port_file.unlink(missing_ok=True)
        if self.failure is not None:
            raise self.failure

    async def _go_on(self) -> None:
        """Keep the run from here on, if it was resumed."""
        store, keeper = self._opened.store, self.engine.keeper
        if store is None:
            return
        self.engine.storage = keeper.describe
        keeper.on_snapshot = self.engine.metrics.on_snapshot
        loop = asyncio.get_running_loop()
        store.journal.on_failure = lambda error: _call_soon(loop, self.engine.fail, error)
        store.journal.on_fsync = lambda seconds: _call_soon(loop, self.engine.metrics.on_fsync, seconds)
        await keeper.resume(self.engine.fragment_lock)
        self.engine.settle()

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self.stop("it has failed")

    def stop(self, reason: str) -> None:
        """Begin the shutdown. Call it on the event loop."""
        assert self._stopping is not None
        if not self._reason:
            self._reason = reason
            self.on_stop()
        self._stopping.set()

    def bound_drain(self) -> None:
        """End the process if it has not ended by itself within `drain_seconds`, whatever then holds it up."""
        seconds = self._server.drain_seconds

        def give_up() -> None:
            log.error("not drained within %g s (--drain-seconds): exiting at once, as if killed", seconds)
            os._exit(1)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()

    def _bind(self, server: grpc.aio.Server) -> None:
        host, port = self._server.host, self._server.port
        _probe(host, port)
        try:
            self.port = self.entrance.bind(server, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise AddressInUse(f"cannot listen on {host}:{port}: {error}") from error
        if self.port == 0:
            raise AddressInUse(f"cannot listen on {host}:{port}")

    def _export_metrics(self) -> Exporter | None:
        """Let Prometheus scrape, if that was asked for. Raises AddressInUse."""
        loop = asyncio.get_running_loop()
        self.engine.metrics.attach(lambda: engine_metrics(self.engine), loop)
        host, port = self._server.metrics_host, self._server.metrics_port
        if port == 0:
            return None
        try:
            exporter = Exporter(self.engine.metrics, host, port)
        except OSError as error:
            text = f"cannot serve metrics on {host}:{port}: {error.strerror}. Choose another --metrics-port"
            raise AddressInUse(text) from error
        log.info("metrics are at http://%s/metrics", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        return exporter

    def _announce(self) -> None:
        self.entrance.write_urls()
        path = self._server.port_file
        if path is not None:
            temporary = Path(f"{path}.tmp")
            temporary.write_text(f"{self.port}\n")
            temporary.replace(path)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """From another thread; nothing happens once the loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


def _probe(host: str, port: int) -> None:
    """Bind the port for a moment: gRPC reports a taken one on stderr, in its own words."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = "Choose another --host or --port"
            if error.errno == errno.EADDRINUSE:
                advice = "Is another server running there? Choose another --port, or stop it"
            raise AddressInUse(f"cannot listen on {host}:{port}: {error.strerror}. {advice}") from error


def event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop loop where uvloop is installed, else asyncio's own; the global policy is left alone."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run_forever(config: RunConfig, server: ServerConfig, on_listening: Callable[[Daemon], None]) -> None:
    """Serve in the main thread until SIGTERM or SIGINT; a second signal forces the exit with code 1.

    Raises ConfigError or AddressInUse when the start fails, and what made the server stop if it was a fault of ours.
    """
    reuse_blocks()
    daemon = Daemon(config, server)
    daemon.on_stop = daemon.bound_drain

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _on_signal, daemon, number)
        trimming = loop.create_task(_trim(daemon.engine))
        await daemon.run(ready)
        trimming.cancel()

    def ready(daemon: Daemon) -> None:
        put_compiler_away()
        on_listening(daemon)

    with asyncio.Runner(loop_factory=event_loop) as runner:
        runner.run(main())


async def _trim(engine: Engine) -> None:
    """Give back what is left of rounds, some seconds after them."""
    trimmed = 0
    while True:
        await asyncio.sleep(TRIM_SECONDS)
        if engine.run.rounds_committed != trimmed:
            trimmed = engine.run.rounds_committed
            await asyncio.get_running_loop().run_in_executor(None, give_back)


def _on_signal(daemon: Daemon, number: int) -> None:
    if daemon._reason:
        log.warning("second signal: exiting at once")
        os._exit(1)  # an exception would have to wait for the threads
    daemon.stop(f"received {signal.Signals(number).name}")


@contextmanager
def serve(
    config: RunConfig | None = None,
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    state_dir: Path | None = None,
    **settings: Any,
) -> Iterator[Daemon]:
    """A server in this process, on a thread of its own: for tests and notebooks. Yields once it listens.

    Keeps nothing on disk unless it is given a `state_dir`. `settings` are further fields of ServerConfig.

    with serve(RunConfig(sync_every=6), port=0) as server:
        diloco_client.join(server.address, model, optimizer)
    """
    listening: Future[asyncio.AbstractEventLoop] = Future()
    daemon = Daemon(config or RunConfig(), ServerConfig(host=host, port=port, state_dir=state_dir, **settings))

    def target() -> None:
        try:
            with asyncio.Runner(loop_factory=event_loop) as runner:
                loop = runner.get_loop()
                runner.run(daemon.run(lambda _: listening.set_result(loop)))
        except BaseException as error:
            if not listening.done():
                listening.set_exception(error)
            elif error is not daemon.failure:
                raise

    thread = threading.Thread(target=target, name="diloco-server", daemon=True)
    thread.start()
    loop = listening.result()
    try:
        yield daemon
    finally:
        with suppress(RuntimeError):  # the loop is closed if the server has failed
            loop.call_soon_threadsafe(daemon.stop, "the serve() block ended")
        thread.join()
    if daemon.failure is not None:
        raise daemon.failure


__all__ = ["AddressInUse", "ConfigError", "Daemon", "run_forever", "serve"]
