"""What scripts do that have never heard of diloco: each joins, is counted rightly, and flushes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diloco_client
from diloco_server import RunConfig, serve

PYTHON = sys.executable
SLOW = {"sync_every": 4, "num_fragments": 2, "overlap_steps": 1, "grace_seconds": "inf"}

MIXED = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh())
            self.head = nn.Linear(16, 1)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x):
            return self.head(self.body(x))

    torch.manual_seed(7)
    model = Net()
    average = torch.optim.swa_utils.AveragedModel(model)  # a copy of it, as for an exponential moving average
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    changed = 0
    for step in range(12):
        for _ in range(2):
            x = torch.randn(8, 6)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.mse_loss(compiled(x).float(), x.sum(1, keepdim=True))
            scaler.scale(loss / 2).backward()
        if step in (0, 5, 6):
            model.head.weight.grad.fill_(float("inf"))
        before = model.head.weight.detach().clone()
        scaler.step(optimizer)
        changed += not torch.equal(before, model.head.weight)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    torch.save(model.state_dict(), "mine.pt")
    print("changed", changed, flush=True)
"""


def test_scaler_accumulation_compile_and_autocast(script, run, tmp_path: Path) -> None:
    """Of 12 steps 3 are skipped for an overflow, and the first good one only opens the door."""
    with serve(RunConfig(sync_every=100, num_fragments=2)) as server:
        done = run("--server", server.address, "--worker-id", "mixed", "--", PYTHON, script(MIXED))
        assert done.returncode == 0, done.stderr
        (worker,) = diloco_client.status(server.address)["workers"]
        versions = [f["version"] for f in diloco_client.status(server.address)["fragments"]]
        diloco_client.export(server.address, tmp_path / "theta.safetensors")
    assert "changed 9" in done.stdout.splitlines()
    assert (worker["worker_id"], worker["steps"]) == ("mixed", 8)
    assert "AdamW trains: Net" in done.stderr
    assert versions == [1, 1, 1, 0], "two of parameters, one of buffers, one that is frozen"
    theta, mine = load_file(tmp_path / "theta.safetensors"), torch.load(tmp_path / "mine.pt")
    assert theta.keys() == {name for name in mine if not name.endswith("num_batches_tracked")}, "the script's own names"


def test_a_launched_and_a_joined_worker_share_a_run(script, start) -> None:
    with serve(RunConfig(**SLOW, min_workers=2)) as server:
        launched = start("--server", server.address, "--together", "--", PYTHON, script(MIXED))
        torch.manual_seed(1)
        model = nn.Module()
        model.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh())
        model.head, model.frozen = nn.Linear(16, 1), nn.Linear(2, 2).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with diloco_client.join(server.address, model, optimizer) as outer:
            for _ in range(8):
                x = torch.randn(8, 6)
                model.head(model.body(x)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            outer.flush(together=True)
        _, err = launched.communicate(timeout=60)
        assert launched.returncode == 0, err
        assert [w["steps"] for w in diloco_client.status(server.address)["workers"]] == [8, 8]


def test_a_gan_with_one_graph_for_both_steps(script, run) -> None:
    """Started with -m; with DataLoader workers, and another sitecustomize. The generator's graph is older than the
    critic's step, so nothing may change its parameters in between."""
    script("print('the other sitecustomize', flush=True)", "other/sitecustomize.py")
    script("", "package/__init__.py")
    script(
        """
        import sys
        import torch
        from torch import nn
        from torch.utils.data import DataLoader, TensorDataset

        def main():
            assert sys.argv[1:] == ["--flag", "value"]
            generator, critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
            of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
            of_generator = torch.optim.RMSprop(generator.parameters(), lr=1e-3)
            data = DataLoader(TensorDataset(torch.randn(104, 8)), batch_size=8, num_workers=2)
            for (real,) in data:
                fake = generator(torch.randn(8, 4))
                of_critic.zero_grad()
                (critic(fake.detach()).mean() - critic(real).mean()).backward()
                of_critic.step()
                of_generator.zero_grad()
                (-critic(fake).mean()).backward()
                of_generator.step()

        if __name__ == "__main__":
            main()
        """,
        "package/train.py",
    )
    with serve(RunConfig(**SLOW)) as server:
        command = [PYTHON, "-m", "package.train", "--flag", "value"]
        paths = os.pathsep.join(filter(None, ["other", os.environ.get("PYTHONPATH")]))
        done = run("--", *command, PYTHONPATH=paths, DILOCO_URL=server.address, DILOCO_WORKER_ID="gan")
        assert done.returncode == 0, done.stderr
        status = diloco_client.status(server.address)
    assert "the other sitecustomize" in done.stdout
    assert [(w["worker_id"], w["steps"]) for w in status["workers"]] == [("gan", 12)], "no DataLoader worker joins"
    assert "Adam, RMSprop trains: Sequential, Linear" in done.stderr
    assert "named by their place" in done.stderr


REFUSED = """
    import torch
    import diloco_client

    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        print("went on")
"""


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (
            "model.bias.register_post_accumulate_grad_hook(lambda p: optimizer.step() and None); train()",
            "the script steps its optimizers within the backward pass",
        ),
        ("with diloco_client.join(None, model, optimizer): train()", "the script joins a run by itself"),
        ("import threading; t = threading.Thread(target=train); t.start(); t.join()", "the script trains in a thread"),
    ],
)
def test_what_it_cannot_do_is_refused(way: str, message: str, script, run) -> None:
    path = script(REFUSED)
    path.write_text(path.read_text() + way)
    with serve(RunConfig(**SLOW)) as server:
        done = run("--", PYTHON, path, DILOCO_URL=server.address)
    assert "went on" not in done.stdout
    assert f"diloco: UnsupportedModel: {message}" in done.stderr
    assert done.returncode == 1
