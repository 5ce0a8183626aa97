"""How launched scripts end: well, badly, told to, or refused. Exit codes and signals are the script's own."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import diloco_client
from diloco_server import RunConfig, serve

PYTHON = sys.executable
ONE_ROUND = {"sync_every": 100, "num_fragments": 1}
"""Nothing but a flush moves the version."""

TRAIN = """
    import sys
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()

    for _ in range(5):
        step()
"""


def version(server) -> int:
    return diloco_client.status(server.address)["fragments"][0]["version"]


def test_an_exception_leaves_without_a_flush(launched) -> None:
    with serve(RunConfig(**ONE_ROUND)) as server:
        done = launched(server.address, TRAIN + "    raise RuntimeError('its own')\n")
        assert (done.returncode, version(server)) == (1, 0), done.stderr
    assert "RuntimeError: its own" in done.stderr
    assert "without a flush" in done.stderr


def test_the_run_ends_and_the_script_with_it(launched, tmp_path: Path) -> None:
    with serve(RunConfig(sync_every=2, num_fragments=1, overlap_steps=1, stop_after_rounds=3)) as server:
        theta = tmp_path / "theta.safetensors"
        done = launched(server.address, TRAIN + "    while True: step()\n", export=theta)
        assert done.returncode == 0, done.stderr
        diloco_client.export(server.address, tmp_path / "of-server.safetensors")
    assert "the script ends here" in done.stderr
    mine, its = load_file(theta), load_file(tmp_path / "of-server.safetensors")
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_the_run_ends_and_the_script_goes_on(launched) -> None:
    more = "    for _ in range(20): step()\n    print('its own end')\n"
    with serve(RunConfig(sync_every=2, num_fragments=1, overlap_steps=1, stop_after_rounds=2)) as server:
        done = launched(server.address, TRAIN + more, stop="continue")
        (worker,) = diloco_client.status(server.address)["workers"]
    assert (done.returncode, done.stdout) == (0, "its own end\n"), done.stderr
    assert "goes on alone" in done.stderr
    assert worker["steps"] < 20


def test_a_refusal_ends_a_script_that_catches_everything(script, run) -> None:
    path = script(
        TRAIN.replace("range(5)", "range(0)")
        + """
    try:
        step()
    except Exception:
        print("went on")
    except BaseException:
        pass
    try:
        step()
        print("went on")
    finally:
        print("cleaned up")
"""
    )
    with serve(RunConfig(**ONE_ROUND)) as server:
        model = torch.nn.Linear(5, 5)
        with diloco_client.join(server.address, model, torch.optim.SGD(model.parameters(), lr=0.1)):
            done = run("--server", server.address, "--", PYTHON, path)
    assert (done.returncode, done.stdout) == (1, "cleaned up\n")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("diloco: ManifestMismatch: ")
    assert "nothing has joined" not in done.stderr


SIGNALS = TRAIN + "    print('trained', flush=True)\n    while True: step()\n"


def test_its_own_handler_gets_the_signal(script, start) -> None:
    handler = "    import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    with serve(RunConfig(**ONE_ROUND)) as server:
        process = start("--server", server.address, "--", PYTHON, script(handler + SIGNALS))
        assert process.stdout.readline() == "trained\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 7
        assert version(server) == 0


def test_a_notice_pushes_what_is_left(script, start) -> None:
    with serve(RunConfig(**ONE_ROUND)) as server:
        process = start("--server", server.address, "--sigterm-seconds", "20", "--", PYTHON, script(SIGNALS))
        assert process.stdout.readline() == "trained\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
        assert version(server) == 1
