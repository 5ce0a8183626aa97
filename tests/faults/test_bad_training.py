"""Real training through links that break: all end on one θ, and every inner step is counted once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from proxy import Proxy
from torch import nn

import diloco_client
from diloco_client import session, transport
from diloco_client.network import Network
from diloco_client.retry import Retry
from diloco_server import RunConfig, serve

WORKERS = 3
STEPS = 32
LEASE = 6.0
"""So long rounds may stand still when the workers have come out of step and each waits in another round."""
BATCH = 16
HIDDEN = 30_000
"""Of a model with seven times as many parameters: some 840 KB in fp32, and 60 KB a contribution in int4."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses; a session that is silent for a good beat is taken up anew, so that no lease runs out, on however
    busy a machine."""
    monkeypatch.setattr(transport, "Retry", lambda: Retry(first=0.05, cap=1.0))
    monkeypatch.setattr(session, "LEAST_SILENCE", 0.0)
    monkeypatch.setattr(session, "SILENT_BEATS", 1.25)


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    chosen = Network.chosen
    monkeypatch.setattr(
        Network, "chosen", lambda **given: chosen(**(given | {"progress_timeout": seconds})), raising=True
    )


class Worker:
    """A model in a run, trained on data of its own over a link of its own."""

    def __init__(self, link: Proxy, index: int, **network: float) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = nn.Sequential(nn.Linear(5, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-5)
        self.outer = diloco_client.join(link.address, self.model, self.optimizer, worker_id=f"w{index}", **network)
        self._data = torch.Generator().manual_seed(index)

    def step(self) -> None:
        x = torch.randn(BATCH, 5, generator=self._data)
        loss = nn.functional.mse_loss(self.model(x), x.sum(1, keepdim=True).sin())
        self.optimizer.zero_grad()
        loss.backward()
        self.outer.report(tokens=BATCH, loss=loss.item())
        self.optimizer.step()

    def end(self) -> dict[int, int]:
        self.outer.flush(together=True)
        for name, value in self.outer.global_state_dict().items():
            assert torch.equal(value, self.model.state_dict()[name])
        self.outer.close()
        return self.outer.base_digests()


Trouble = Callable[[Proxy, int], None]


def train(trouble: Trouble, together: Callable[..., list[Any]], **network: float) -> list[Proxy]:
    """Train all workers; `trouble` is told of each step before it is taken. Returns the links."""
    config = RunConfig(sync_every=6, num_fragments=2, overlap_steps=1, min_workers=WORKERS, lease_seconds=LEASE)
    with ExitStack() as stack:
        server = stack.enter_context(serve(config))
        links = [stack.enter_context(Proxy(server.port)) for _ in range(WORKERS)]

        def work(index: int) -> dict[int, int]:
            worker = Worker(links[index], index, **network)
            for number in range(STEPS):
                trouble(links[index], number)
                worker.step()
            return worker.end()

        digests = together(WORKERS, work, 90.0)
        status = diloco_client.status(server.address, rounds=64)
    check(digests, status)
    return links


def check(digests: list[dict[int, int]], status: dict[str, Any]) -> None:
    assert all(d == digests[0] for d in digests)
    for fragment in status["fragments"]:
        assert int(fragment["digest"], 16) == digests[0][fragment["index"]]
        records = fragment["rounds"]
        assert [r["version"] for r in records] == list(range(1, len(records) + 1)), "none was forgotten"
        for index in range(WORKERS):
            own = [m for r in records for m in r["members"] if m["worker_id"] == f"w{index}"]
            assert sum(m["steps"] for m in own) == STEPS, "each step in one round"
            assert sum(m["tokens"] for m in own) == STEPS * BATCH


def test_connections_that_are_cut_in_mid_frame(together) -> None:
    def trouble(link: Proxy, step: int) -> None:
        if step % 9 == 4:
            link.up.cut_after = 20_000
        if step % 9 == 8:
            link.down.cut_after = 30_000

    links = train(trouble, together)
    assert sum(link.cuts for link in links) > WORKERS


def test_links_that_stand_still_for_a_moment(together) -> None:
    def trouble(link: Proxy, step: int) -> None:
        if step % 8 == 4:
            link.stall()
            threading.Timer(0.2, link.resume).start()

    assert [link.accepted for link in train(trouble, together)] == [2] * WORKERS, "the same connections all the time"


def test_connections_that_stand_still_for_ever(together, monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 0.7)

    def trouble(link: Proxy, step: int) -> None:
        if step == 15:
            link.stall(new=False)

    links = train(trouble, together)
    assert all(link.accepted > 2 for link in links)


def test_a_long_and_slow_link_with_several_connections_and_limits(together) -> None:
    def trouble(link: Proxy, step: int) -> None:
        if step == 0:
            link.up.delay = link.down.delay = 0.02
            link.up.rate = 2_000_000

    links = train(trouble, together, data_connections=3, upload_limit=3e6, download_limit=10e6)
    assert all(2 <= link.accepted <= 4 for link in links)


def test_old_connections_that_outlive_their_successors(together) -> None:
    def trouble(link: Proxy, step: int) -> None:
        if step in (8, 18):
            link.orphan()
        if step in (12, 24):
            link.deliver()

    links = train(trouble, together)
    assert all(link.accepted >= 4 for link in links)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_befalls_them(seed: int, together, monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 0.7)
    rng, lock = random.Random(seed), threading.Lock()

    def trouble(link: Proxy, step: int) -> None:
        with lock:
            kind, size = rng.randrange(20), rng.randrange(60_000)
        match kind if step < STEPS - 6 else None:  # whoever is gone at the end is not waited for
            case 0:
                link.cut(reset=size % 2 == 0)
            case 1:
                link.up.cut_after = size
            case 2:
                link.down.cut_after = size
            case 3:
                link.stall(new=False)
            case 4:
                link.stall(up=size % 2 == 0, down=size % 2 == 1, new=False)
            case 5:
                link.stall()
                threading.Timer(size / 200_000, link.resume).start()
            case 6:
                link.orphan()
            case 7:
                link.deliver()
            case 8:
                link.up.damage = 1
            case 9:
                link.down.damage = 1
            case 10:
                link.refusing = True
                threading.Timer(size / 200_000, setattr, (link, "refusing", False)).start()

    links = train(trouble, together, data_connections=1 + seed % 3)
    assert sum(link.accepted for link in links) > 2 * WORKERS
