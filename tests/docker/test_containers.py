"""What compose and Kubernetes would start, started here: a run through TLS, scaled workers, drain, restart."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from containers import Image, Machine, compose, kubernetes, mounts, seconds

STEPS = 24
H = 8
START_SECONDS = 100.0
"""On a machine's first run the kernels are compiled."""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    folder = tmp_path / "volumes"
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Machine(folder, int(probe.getsockname()[1]))


@pytest.fixture
def running() -> Iterator[ExitStack]:
    """Kills what is left at the end."""
    with ExitStack() as stack:
        yield stack


class Server:
    """One container of the server's image."""

    def __init__(
        self, machine: Machine, env: dict[str, str], volumes: dict[str, str], health: list[str], log: Path
    ) -> None:
        self._machine, self._env, self._volumes, self._health, self._log = machine, env, volumes, health, log
        self._image = Image.of("server")

    def start(self, running: ExitStack) -> subprocess.Popen[str]:
        """Returns once it is healthy."""
        process = self._machine.start(self._image, [], self._env, self._volumes, self._log)
        ends(process, running)
        deadline = time.monotonic() + START_SECONDS
        while self.check().returncode != 0:
            assert process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
        return process

    def check(self) -> subprocess.CompletedProcess[str]:
        """The health check."""
        return self._machine.run(self._image, self._health, self._env, self._volumes)

    def status(self) -> dict[str, Any]:
        """As `docker compose exec server diloco-client status` tells it."""
        command = ["diloco-client", "status", "file:/var/lib/diloco/observer-url", "--json"]
        done = self._machine.run(self._image, command, self._env, self._volumes)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def ends(process: subprocess.Popen[str], running: ExitStack) -> None:
    """Whatever happens."""
    running.callback(process.wait)
    running.callback(process.kill)


def stop(process: subprocess.Popen[str], grace: float) -> None:
    """As `docker stop` does, but that nothing is killed: it has to end in time and with 0."""
    process.terminate()
    assert process.wait(grace) == 0


def digests(status: dict[str, Any]) -> list[tuple[int, str]]:
    return [(fragment["version"], fragment["digest"]) for fragment in status["fragments"]]


@pytest.mark.timeout(500)
def test_compose(machine: Machine, running: ExitStack, tmp_path: Path) -> None:
    chosen = {"STEPS": str(STEPS), "DILOCO_SYNC_EVERY": str(H), "DILOCO_MIN_WORKERS": "2"}
    services = compose(**chosen, DILOCO_UPLOAD_LIMIT="2000000")["services"]
    server, worker = services["server"], services["worker"]
    held = Server(machine, server["environment"], mounts(server), Image.of("server").health, tmp_path / "server.log")
    assert held.check().returncode != 0
    process = held.start(running)

    join = machine.volume("join")
    assert [path.name for path in join.iterdir()] == ["join-url"], "the workers see this volume"
    assert stat.S_IMODE((join / "join-url").stat().st_mode) == 0o600

    image = Image.of("worker")
    logs = [tmp_path / f"worker-{number}" / "log" for number in range(2)]  # --scale worker=2
    workers = [machine.start(image, worker["command"], worker["environment"], mounts(worker), log) for log in logs]
    for each in workers:
        ends(each, running)
    for each, log in zip(workers, logs, strict=True):
        assert each.wait(240) == 0, log.read_text()
        assert "holds the global parameters" in log.read_text()

    trained = held.status()
    assert len(trained["workers"]) == 2
    assert {w["shard"] for w in trained["workers"]} == {0, 1}
    assert min(version for version, _ in digests(trained)) >= STEPS // H - 1

    with (machine.volume("state") / "tokens" / "worker").open("a") as tokens:
        tokens.write("x" * 32 + "\n")
    held.status()
    assert f"//{'x' * 32}@" in (join / "join-url").read_text(), "the next token is handed out by itself"

    stop(process, seconds(server["stop_grace_period"]))
    assert held.check().returncode != 0
    process = held.start(running)
    assert held.status()["run_id"] == trained["run_id"]
    assert digests(held.status()) == digests(trained)
    stop(process, seconds(server["stop_grace_period"]))


@pytest.mark.timeout(300)
def test_compose_stops_a_worker(machine: Machine, running: ExitStack, tmp_path: Path) -> None:
    services = compose(STEPS="1000000", DILOCO_SYNC_EVERY=str(H))["services"]
    server, worker = services["server"], services["worker"]
    held = Server(machine, server["environment"], mounts(server), Image.of("server").health, tmp_path / "server.log")
    held.start(running)
    log = tmp_path / "worker" / "log"
    process = machine.start(Image.of("worker"), worker["command"], worker["environment"], mounts(worker), log)
    ends(process, running)
    wait_for(lambda: "step 0," in log.read_text() or process.poll() is not None)
    process.terminate()
    process.wait(seconds(worker["stop_grace_period"]))
    wait_for(lambda: all(w["state"] == "gone" for w in held.status()["workers"]))


@pytest.mark.timeout(300)
def test_kubernetes(machine: Machine, running: ExitStack, tmp_path: Path) -> None:
    pod = kubernetes()["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {each["name"]: each["value"] for each in container["env"]}
    volumes = {m["mountPath"]: f"pod-{m['name']}" for m in container["volumeMounts"]}
    probe = container["startupProbe"]["exec"]["command"]
    held = Server(machine, env, volumes, probe, tmp_path / "server.log")
    assert held.check().returncode != 0
    process = held.start(running)
    url = (machine.volume("pod-state") / "join-url").read_text()
    assert url.startswith("diloco://")
    assert "?pin=sha256:" in url
    assert json.loads((tmp_path / "server.log").read_text().splitlines()[0])["level"] == "info"
    stop(process, pod["terminationGracePeriodSeconds"])
    assert held.check().returncode != 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
