"""The commands through TLS and tokens, as processes: who is shown the join URL, and how they take it."""

from __future__ import annotations

import os
import pty
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from diloco_cli.client import main
from diloco_cli.server import _banner
from diloco_proto.channel import CLIENT_OPTIONS, MAX_STREAMS
from diloco_server import serve

SERVER = [sys.executable, "-m", "diloco_cli.server"]
WRONG = "x" * 43
CLIENT = [sys.executable, "-m", "diloco_cli.client"]


@dataclass(frozen=True)
class Running:
    """A server with TLS and tokens whose stdout is a terminal."""

    pid: int
    banner: str
    state: Path
    log: Path

    @property
    def url(self) -> str:
        return (self.state / "join-url").read_text().strip()

    @property
    def port(self) -> int:
        return int(self.url.partition("?")[0].rpartition(":")[2])

    def token(self, role: str) -> str:
        return (self.state / "tokens" / role).read_text().strip()

    def resident(self) -> int:
        """Bytes of memory."""
        found = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True)
        return int(found.stdout) * 1024


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("terminal")
    ours, theirs = pty.openpty()
    command = [*SERVER, "--port", "0", "--secure", "--state-dir", str(folder / "state")]
    with (folder / "log").open("wb") as errors:
        process = subprocess.Popen(command, stdout=theirs, stderr=errors, cwd=folder)
    os.close(theirs)
    try:
        banner = b""
        while banner.count(b"\n") < 2:
            banner += os.read(ours, 4096)
        yield Running(process.pid, banner.decode(), folder / "state", folder / "log")
    finally:
        process.terminate()
        process.wait(30)
        os.close(ours)


def client(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")}
    return subprocess.run([*CLIENT, *arguments], env=clean | env, capture_output=True, text=True, timeout=60)


def test_a_terminal_is_shown_the_join_url_and_the_client_takes_it(running: Running, tmp_path: Path) -> None:
    found = re.search(r"export DILOCO_URL='(diloco://\S+@127\.0\.0\.1:\d+\?pin=sha256:\w{64})'", running.banner)
    assert found, running.banner
    assert running.url == found[1]
    assert running.token("worker") in running.url
    done = client("status", "--json", DILOCO_URL_FILE=str(running.state / "observer-url"))
    assert (done.returncode, done.stderr) == (0, "")
    assert running.token("observer") not in done.stdout
    wrong = running.url.replace(running.token("worker"), WRONG)
    refused = client("export", "--server", wrong, str(tmp_path / "out.safetensors"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: the server does not know this token")
    assert len(refused.stderr.splitlines()) == 1
    log = running.log.read_text()
    assert re.search(r"refused /diloco\.v1\.Outer/Describe from ipv4:127\.0\.0\.1:\d+: Unauthenticated", log)
    for secret in (WRONG, *map(running.token, ("worker", "observer", "admin"))):
        assert secret not in log


def test_strangers_fill_neither_memory_nor_disk(running: Running) -> None:
    """Endless bodies on all the calls that their connections may have, and plain nonsense."""
    sent = bytes(1 << 20)
    certificate = grpc.ssl_channel_credentials((running.state / "tls" / "cert.pem").read_bytes())
    options = (*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", "diloco"))
    before, log = running.resident(), running.log.stat().st_size
    codes: Counter[grpc.StatusCode] = Counter()

    def flood() -> None:
        with grpc.secure_channel(f"127.0.0.1:{running.port}", certificate, options) as channel:
            push = channel.stream_stream("/diloco.v1.Outer/Push")
            calls = [push(iter(lambda: sent, None), timeout=60) for _ in range(MAX_STREAMS)]
            for call in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    list(call)
                codes[caught.value.code()] += 1

    threads = [threading.Thread(target=flood) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {grpc.StatusCode.UNAUTHENTICATED: 60 * MAX_STREAMS}
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", running.port), 10) as raw:
            raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while raw.recv(4096):
                pass
    assert running.resident() - before < 100e6
    assert running.log.stat().st_size - log < 20_000
    assert "andshake" not in running.log.read_text(), "gRPC writes a line for each, unless told not to"


@pytest.mark.parametrize("on_disk", [True, False])
def test_whatever_is_no_terminal_is_not(on_disk: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(state_dir=tmp_path if on_disk else None, secure=True) as server:
        _banner(server)
        printed = capsys.readouterr().out
        assert server.join_url.partition("@")[0].removeprefix("diloco://") not in printed
        assert (str(tmp_path / "join-url") if on_disk else "--state-dir is missing") in printed


def test_insecure_stands_in_the_banner(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(insecure=True) as server:
        _banner(server)
    assert "INSECURE: no TLS, no token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["status", "127.0.0.1:1", "--server", "127.0.0.1:2"], 2, "the server is given twice"),
        (["export", "a:1", "b", "c"], 2, "write: export [ADDRESS] PATH"),
        (["export", "x.safetensors"], 1, "no server is given"),
        (["status"], 1, "no server is given"),
    ],
)
def test_a_server_given_twice_or_not_at_all(
    arguments: list[str],
    status: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable in ("DILOCO_URL", "DILOCO_URL_FILE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit) as caught:
        main.main(arguments, prog_name="diloco-client")
    assert caught.value.code == status
    assert says in capsys.readouterr().err
