"""Workers that end, die, are replaced or fork, and the others."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from test_hook import make_model, step

import diloco_client
from diloco_server import RunConfig, serve


def join(address: str, name: str):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, optimizer, diloco_client.join(address, model, optimizer, worker_id=name)


def test_workers_with_unequal_numbers_of_steps_all_end(together) -> None:
    with serve(RunConfig(sync_every=8, num_fragments=2, overlap_steps=1, min_workers=2)) as server:

        def work(index: int) -> dict[int, int]:
            model, optimizer, outer = join(server.address, f"w{index}")
            with outer:
                for number in range((24, 80)[index]):
                    step(model, optimizer, number)
                outer.flush(together=True)
                return outer.base_digests()

        first, second = together(2, work)
    assert first == second


def test_a_dead_workers_replacement_takes_its_place(together) -> None:
    """Below the floor the survivor trains on without rounds, and so meets the newcomer."""
    with serve(RunConfig(sync_every=8, num_fragments=2, overlap_steps=1, min_workers=2, lease_seconds=1)) as server:
        dead, replaced = threading.Event(), threading.Event()

        def work(index: int) -> dict[int, int] | None:
            if index == 2:
                assert dead.wait(30)
            model, optimizer, outer = join(server.address, f"w{index}")
            if index == 1:
                for number in range(10):
                    step(model, optimizer, number)
                outer._link._session._closing.set()  # as kill -9 would: no word of leaving
                outer._transport.close()
                dead.set()
                return None
            with outer:
                number = 0
                while number < 40 or (index == 0 and not replaced.is_set()):
                    step(model, optimizer, number)
                    number += 1
                if index == 2:
                    assert outer.stats.counted > 0
                    replaced.set()
                outer.flush(together=True)
                return outer.base_digests()

        first, _, third = together(3, work)
    assert first == third


def test_the_second_flush_together_waits_too(together) -> None:
    met = threading.Event()
    with serve(RunConfig(sync_every=100, num_fragments=1, min_workers=2)) as server:

        def work(index: int) -> dict[int, int]:
            model, optimizer, outer = join(server.address, f"w{index}")
            with outer:
                step(model, optimizer, index)
                outer.flush(together=True)
                if index == 0:
                    step(model, optimizer, 7)
                    met.set()
                    outer.flush(together=True)
                else:
                    assert met.wait(30)
                    outer.flush(together=True)
                return outer.base_digests()

        first, second = together(2, work)
    assert first == second


def test_who_has_left_cannot_flush() -> None:
    with serve(RunConfig(sync_every=100, num_fragments=1)) as server:
        model, optimizer, outer = join(server.address, "w")
        step(model, optimizer, 1)
        outer.close()
        with pytest.raises(diloco_client.ConnectionClosed, match="left the run"):
            outer.flush(together=True)


def test_a_parameter_unfrozen_after_join_is_refused() -> None:
    with serve(RunConfig(sync_every=2, num_fragments=1, overlap_steps=0)) as server:
        model = make_model()
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with (
            pytest.raises(diloco_client.UnsupportedModel, match=r"'0\.weight' was frozen"),
            diloco_client.join(server.address, model, optimizer),
        ):
            step(model, optimizer, 1)
            model[0].requires_grad_(True)
            for number in range(3):
                step(model, optimizer, number)


DATALOADER = """
import sys, torch, diloco_client
from torch.utils.data import DataLoader, TensorDataset
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.randn(64, 4))
with diloco_client.join(sys.argv[1], model, optimizer) as outer:
    for epoch in range(4):
        for (x,) in DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="fork"):
            model(x).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
assert outer.stats.steps == 32
"""


def test_forked_dataloader_workers_do_no_harm() -> None:
    with serve(RunConfig(sync_every=6, num_fragments=2)) as server:
        command = [sys.executable, "-c", DATALOADER, server.address]
        script = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (script.returncode, script.stderr) == (0, "")
