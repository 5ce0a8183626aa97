"""grpc.health.v1.Health, as probes ask it, and the command that asks."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from server_process import ServerProcess

import diloco_client
from diloco_client.health import health
from diloco_proto.health import CHECK, WATCH, Health, HealthCheckRequest, HealthCheckResponse
from diloco_server import serve
from diloco_server.daemon import STOP_SECONDS, Daemon
from diloco_server.engine import Engine
from diloco_server.health import MAX_WATCHERS, SERVICES

FULL = "no space left on /data: make room there"


def set_trouble(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(Engine, "trouble", property(lambda _: text))


@pytest.fixture
def server() -> Iterator[Daemon]:
    with serve() as daemon:
        yield daemon


@pytest.fixture
def channel(server: Daemon) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


def check(channel: grpc.Channel, service: str = "") -> Health:
    call = channel.unary_unary(CHECK, HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString)
    return Health(call(HealthCheckRequest(service=service), timeout=30).status)


def watch(channel: grpc.Channel, service: str = "") -> Iterator[Health]:
    call = channel.unary_stream(WATCH, HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString)
    return (Health(answer.status) for answer in call(HealthCheckRequest(service=service), timeout=30))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "diloco_cli.client", "health", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("service", SERVICES)
def test_a_server_that_listens_serves(channel: grpc.Channel, service: str) -> None:
    assert check(channel, service) is Health.SERVING


def test_the_messages_are_those_of_the_standard() -> None:
    assert HealthCheckRequest(service="ab").SerializeToString() == b"\x0a\x02ab"
    assert HealthCheckResponse(status=Health.SERVING).SerializeToString() == b"\x08\x01"
    assert HealthCheckResponse(status=Health.NOT_SERVING).SerializeToString() == b"\x08\x02"
    assert HealthCheckResponse(status=Health.SERVICE_UNKNOWN).SerializeToString() == b"\x08\x03"


def test_a_service_that_is_not_here(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(channel, "other.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert next(watch(channel, "other.Service")) is Health.SERVICE_UNKNOWN


def test_who_cannot_write_does_not_serve_and_says_when_it_can_again(
    server: Daemon, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = watch(channel)
    assert next(states) is Health.SERVING
    set_trouble(monkeypatch, FULL)
    assert check(channel) is Health.NOT_SERVING
    assert health(server.address) is Health.NOT_SERVING
    assert next(states) is Health.NOT_SERVING
    set_trouble(monkeypatch, "")
    assert next(states) is Health.SERVING


def test_watchers_hear_of_a_drain_and_do_not_hold_it_up() -> None:
    with serve() as server:
        channel = grpc.insecure_channel(server.address)
        states = watch(channel, SERVICES[-1])
        assert next(states) is Health.SERVING
        began = time.monotonic()
    assert time.monotonic() - began < STOP_SECONDS
    assert list(states) == [Health.NOT_SERVING]
    channel.close()


def test_there_are_only_so_many_watchers(server: Daemon) -> None:
    own = (("grpc.use_local_subchannel_pool", 1),)  # a connection takes only so many calls
    channels = [grpc.insecure_channel(server.address, own) for _ in range(5)]
    watchers = [watch(channels[i % 4]) for i in range(MAX_WATCHERS)]
    assert {next(w) for w in watchers} == {Health.SERVING}
    with pytest.raises(grpc.RpcError) as caught:
        next(watch(channels[4]))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert check(channels[4]) is Health.SERVING
    for channel in channels:
        channel.close()


def test_nobody_there(free_port: int) -> None:
    with pytest.raises(diloco_client.ServerUnreachable, match=f"127.0.0.1:{free_port}"):
        health(f"127.0.0.1:{free_port}", timeout=0.5)


def test_something_else_there() -> None:
    plain = grpc.server(ThreadPoolExecutor(1))
    port = plain.add_insecure_port("127.0.0.1:0")
    plain.start()
    with pytest.raises(diloco_client.ServerUnreachable, match="UNIMPLEMENTED"):
        health(f"127.0.0.1:{port}", timeout=10)
    plain.stop(None)


def test_the_command_is_for_containers(server: Daemon, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    good = command("--server", server.address)
    assert (good.returncode, good.stdout, good.stderr) == (0, "serving\n", "")
    set_trouble(monkeypatch, FULL)
    bad = command("--server", server.address)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == "Error: the server is up, but it is shutting down or cannot write its state\n"
    none = command("--server", f"127.0.0.1:{free_port}", "--timeout", "0.5")
    assert (none.returncode, none.stdout) == (1, "")
    (line,) = none.stderr.splitlines()
    assert line.startswith("Error: no diloco-server answered at 127.0.0.1:")


def test_the_command_imports_nothing_heavy(server: Daemon) -> None:
    heavy = ("torch", "numba", "numpy", "safetensors", "rich")
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(sorted(set({heavy!r}) & sys.modules.keys())))\n"
        "from diloco_cli.client import main\n"
        "main(['health', '--server', sys.argv[1]], prog_name='diloco-client')"
    )
    found = subprocess.run([sys.executable, "-c", code, server.address], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "serving\n[]\n"), found.stderr


def test_a_guarded_server_answers_without_a_token_and_tells_nothing_else(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "state", "--secure") as server:
        url = (tmp_path / "state" / "join-url").read_text().strip()
        without = re.sub(r"//[^@]+@", "//", url)
        assert without != url
        assert health(without) is Health.SERVING
        assert health(url) is Health.SERVING
        with pytest.raises(diloco_client.DilocoError, match="asks for a token"):
            diloco_client.status(without)
        assert server.terminate() == 0
