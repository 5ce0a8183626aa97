"""A real server that is killed, stopped, moved and rolled back while workers train, who go on and end alike."""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from proxy import Proxy
from server_process import ServerProcess, command
from torch import nn

import diloco_client
from diloco_client.retry import Retry
from diloco_server.store import Store

SETTINGS = ("--sync-every=6", "--num-fragments=2", "--overlap-steps=2", "--min-workers=2", "--lease-seconds=30")
NAMES = ("alice", "bob")


class Trainer:
    """A worker that trains on a thread of its own until it is told to finish; all end on the same θ."""

    def __init__(self, address: str, name: str) -> None:
        self.name = name
        self.error: BaseException | None = None
        self.outer: Any = None
        self.digests: dict[int, int] = {}
        self.holds_theta = False
        self._finish = threading.Event()
        self._data = torch.Generator().manual_seed(ord(name[0]))
        self._thread = threading.Thread(target=self._run, args=(address,), daemon=True)
        self._thread.start()

    def _run(self, address: str) -> None:
        model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        try:
            with diloco_client.join(address, model, optimizer, worker_id=self.name) as outer:
                self.outer = outer
                while not self._finish.wait(0.002):
                    x = torch.randn(16, 5, generator=self._data)
                    optimizer.zero_grad()
                    nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin()).backward()
                    optimizer.step()
                outer.flush(together=True)
                self.digests = outer.base_digests()
                theta = outer.global_state_dict()
                self.holds_theta = all(torch.equal(v, theta[k]) for k, v in model.state_dict().items())
        except BaseException as error:
            self.error = error

    @property
    def steps(self) -> int:
        return 0 if self.outer is None else self.outer.stats.steps

    @property
    def counted(self) -> int:
        return 0 if self.outer is None else self.outer.stats.counted

    def finish(self) -> None:
        self._finish.set()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), f"{self.name} does not end"
        if self.error is not None:
            raise self.error


class Crew:
    """Both workers, each over a link to wherever the server is."""

    def __init__(self, links: list[Proxy]) -> None:
        self.links = links
        self.trainers = [Trainer(link.address, name) for link, name in zip(links, NAMES, strict=True)]

    def until(self, condition: Callable[[Trainer], bool], what: str) -> None:
        """It holds for each of them."""
        pause = threading.Event()
        for trainer in self.trainers:
            for _ in range(6000):
                if trainer.error is not None:
                    raise trainer.error
                if condition(trainer):
                    break
                pause.wait(0.01)
            else:
                raise AssertionError(f"waited in vain for {trainer.name} {what}")

    def until_more(self, rounds: int = 4) -> None:
        """So many more contributions of each are counted."""
        before = {t: t.counted for t in self.trainers}
        self.until(lambda t: t.counted >= before[t] + rounds, f"to be counted {rounds} times")

    def train_alone(self, steps: int = 20) -> None:
        """Nobody waits for a server that is not there."""
        before = {t: t.steps for t in self.trainers}
        self.until(lambda t: t.steps >= before[t] + steps, "to train without a server")

    def moved_to(self, server: ServerProcess) -> None:
        for link in self.links:
            link.upstream_port = server.port

    def finish(self) -> tuple[dict[int, int], int]:
        """End together; the digests of θ and the inner steps of both."""
        for trainer in self.trainers:
            trainer.finish()
        for trainer in self.trainers:
            trainer.join()
        assert all(t.holds_theta for t in self.trainers)
        assert self.trainers[0].digests == self.trainers[1].digests
        return self.trainers[0].digests, sum(t.steps for t in self.trainers)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diloco_client.transport.Retry", lambda: Retry(first=0.05, cap=0.4))


@contextmanager
def crew(server: ServerProcess) -> Iterator[Crew]:
    with Proxy(server.port) as one, Proxy(server.port) as other:
        yield Crew([one, other])


def digests(server: ServerProcess) -> dict[int, int]:
    return {f["index"]: int(f["digest"], 16) for f in diloco_client.status(server.address)["fragments"]}


def counted_tokens(state: Path) -> list[int]:
    """Inner steps behind θ, by fragment, once the server has ended in order."""
    store = Store(state)
    try:
        return [f.tokens for f in store.snapshots.read(store.snapshots.list()[-1]).fragments]
    finally:
        store.close()


def said(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "diloco" and word in r.getMessage()]


def test_workers_ride_through_a_kill_a_drain_and_another_port_and_every_step_counts_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    caplog.set_level(logging.WARNING, "diloco")
    with ServerProcess(state, *SETTINGS) as first, crew(first) as both:
        both.until_more()
        caplog.clear()
        first.kill()
        both.train_alone()
        with ServerProcess(state, *SETTINGS) as second:
            assert second.port != first.port
            both.moved_to(second)
            both.until_more()
            assert second.terminate() == 0
        both.train_alone()
        with ServerProcess(state, *SETTINGS) as third:
            both.moved_to(third)
            both.until_more()
            ends, steps = both.finish()
            assert digests(third) == ends
            assert third.terminate() == 0
    assert counted_tokens(state) == [steps, steps], "lost, or counted twice"
    assert len(said(caplog, "lost the server at")) == 2 * len(NAMES)
    assert len(said(caplog, "back in run")) == 2 * len(NAMES)
    assert len(caplog.records) == 4 * len(NAMES), [r.getMessage() for r in caplog.records]


def test_workers_that_wait_for_the_first_parameters_give_them_again_to_the_next_server(tmp_path: Path) -> None:
    """The first one dies with them before it could keep them."""
    state = tmp_path / "state"
    with ServerProcess(state, *SETTINGS, fault="before_rename:1") as first, crew(first) as both:
        first.process.wait(30)
        assert not list((state / "snapshots").glob("[0-9]*"))
        with ServerProcess(state, *SETTINGS) as second:
            both.moved_to(second)
            both.until_more(2)
            ends, steps = both.finish()
            assert digests(second) == ends
            assert second.terminate() == 0
    assert counted_tokens(state) == [steps, steps]


@pytest.mark.parametrize("how", ["rollback", "snapshots"])
def test_workers_adopt_an_older_run_and_go_on(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rolled back by the operator, or after a crash without a journal."""
    state = tmp_path / "state"
    settings = (*SETTINGS, "--snapshot-every=2", "--keep-snapshots=50")
    settings += ("--durability=snapshots",) if how == "snapshots" else ()
    caplog.set_level(logging.WARNING, "diloco")
    with ServerProcess(state, *settings) as first, crew(first) as both:
        both.until_more(8)
        former = diloco_client.status(first.address)["run_id"]
        if how == "rollback":
            assert first.terminate() == 0
            settings += ("--rollback=3",)
        else:
            first.kill()
        both.train_alone()
        with ServerProcess(state, *settings) as second:
            went_back = [f["version"] for f in diloco_client.status(second.address)["fragments"]]
            ages = [time.time() - kept["saved_at"] for kept in diloco_client.snapshots(second.address)]
            both.moved_to(second)
            both.until(lambda t: t.outer._link.run_id == f"{former}.1", "to hear of it")
            both.until_more()
            ends, _ = both.finish()
            assert digests(second) == ends
            assert second.terminate() == 0
    assert all(0 <= age < 600 for age in ages)
    if how == "rollback":
        assert went_back == [3, 3]
        assert len(list((state / "old").iterdir())) == 1, "what was undone is kept"
    assert len(said(caplog, "the run was rolled back")) == len(NAMES)
    assert len(said(caplog, "lost the server at")) == len(NAMES)


def test_a_run_can_be_rolled_back_again_to_before_the_last_time(tmp_path: Path) -> None:
    """The journal of then has been put aside; and what each version was does not change by going back to it."""
    state = tmp_path / "state"
    settings = (*SETTINGS, "--snapshot-every=4", "--keep-snapshots=50")
    with ServerProcess(state, *settings) as server, crew(server) as both:
        both.until_more(16)
        both.finish()
        assert server.terminate() == 0
    shutil.copytree(state, tmp_path / "copy")

    def back(directory: Path, version: int) -> list[str]:
        with ServerProcess(directory, *settings, f"--rollback={version}") as server:
            fragments = diloco_client.status(server.address)["fragments"]
            assert [f["version"] for f in fragments] == [version, version]
            assert server.terminate() == 0
        return [f["digest"] for f in fragments]

    in_steps = [back(state, version) for version in (7, 5, 3)]
    assert in_steps[-1] == back(tmp_path / "copy", 3)
    assert "damaged" not in (tmp_path / "state.log").read_text()


def test_a_flag_that_is_left_in_place_rolls_a_run_back_only_once(tmp_path: Path) -> None:
    state = tmp_path / "state"
    settings = (*SETTINGS, "--snapshot-every=4", "--keep-snapshots=50")

    def versions(server: ServerProcess) -> list[int]:
        return [f["version"] for f in diloco_client.status(server.address)["fragments"]]

    def trained(*arguments: str) -> list[int]:
        with ServerProcess(state, *settings, *arguments) as server, crew(server) as both:
            both.until_more(8)
            both.finish()
            found = versions(server)
            server.kill()
        return found

    def held(*arguments: str) -> list[int]:
        with ServerProcess(state, *settings, *arguments) as server:
            return versions(server)

    trained()
    since = trained("--rollback=3")
    assert min(since) > 3
    assert held("--rollback=3") == since
    assert "was rolled back to version 3 at an earlier start" in (tmp_path / "state.log").read_text()
    assert held() == since
    assert held("--rollback=3") == [3, 3]


def test_a_state_directory_is_for_one_server_and_for_one_run(tmp_path: Path) -> None:
    state = tmp_path / "state"

    def refused(*arguments: str) -> str:
        done = subprocess.run(command(state, *arguments), capture_output=True, text=True, timeout=60)
        assert done.returncode == 3
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        return line

    with ServerProcess(state, *SETTINGS) as server, crew(server) as both:
        both.until_more(2)
        former = diloco_client.status(server.address)["run_id"]
        line = refused(*SETTINGS)
        assert f"another server (process {server.process.pid}) works in {state}; stop it first" in line
        both.until_more(1)
        both.finish()
        server.kill()
    line = refused(*SETTINGS, "--outer-lr=0.5", "--sync-every=12")
    assert f"{state} holds run {former} with other settings (" in line
    assert "sync_every: 6 there, 12 now" in line
    assert "outer_lr: 0.7 there, 0.5 now" in line
    assert "--new" in line
    with ServerProcess(state, *SETTINGS, "--outer-lr=0.5", "--new") as server:
        status = diloco_client.status(server.address)
        assert (status["state"], status["run_id"] == former) == ("empty", False)
    assert [path.name for path in (state / "old").iterdir()] == [f"{former}-1"]
