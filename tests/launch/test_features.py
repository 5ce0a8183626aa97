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


def test_scaler_accumulation_compile_and_autocast(launched, tmp_path: Path) -> None:
    """Of 12 steps 3 are skipped for an overflow, and the first good one only opens the door."""
    with serve(RunConfig(sync_every=100, num_fragments=2)) as server:
        done = launched(server.address, MIXED, worker_id="mixed")
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


def test_a_launched_and_a_joined_worker_share_a_run(launched, together) -> None:
    with serve(RunConfig(**SLOW, min_workers=2)) as server:

        def work(index: int) -> None:
            if index == 0:
                done = launched(server.address, MIXED, together=True)
                assert done.returncode == 0, done.stderr
                return
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

        together(2, work)
        assert [w["steps"] for w in diloco_client.status(server.address)["workers"]] == [8, 8]


TRAIN = """
    import copy
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def train(optimizer, steps, model=model):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, model.in_features)).square().mean().backward()
            optimizer.step()
"""


def test_an_optimizer_that_takes_the_place_of_another_counts_from_its_first_step(launched) -> None:
    """And the former one's state goes with it, if the script has given it up."""
    text = """
    import gc
    for _ in range(4):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        train(optimizer, 5)
    gc.collect()
    print(sum(isinstance(o, torch.optim.Adam) for o in gc.get_objects()))
    """
    with serve(RunConfig(**SLOW)) as server:
        done = launched(server.address, TRAIN + text)
        (worker,) = diloco_client.status(server.address)["workers"]
    assert (done.returncode, done.stdout, worker["steps"]) == (0, "1\n", 19), done.stderr


def test_a_new_optimizer_with_master_weights_is_refused(launched) -> None:
    text = """
    train(torch.optim.SGD(model.parameters(), lr=0.1), 3)
    class Masters(torch.optim.SGD):
        master_weights = True
    train(Masters(model.parameters(), lr=0.1), 3)
    """
    with serve(RunConfig(**SLOW)) as server:
        done = launched(server.address, TRAIN + text)
    assert done.returncode == 1
    assert "diloco: MasterWeights: the optimizer Masters" in done.stderr


def test_a_second_stage_that_would_train_alone_is_refused(launched) -> None:
    """A first one has calibrated a scale; the main model comes later. A probe of few steps is borne with."""
    text = """
    scale = nn.Parameter(torch.ones(1))
    first = torch.optim.LBFGS([scale], lr=0.1)

    def calibrate():
        first.step(lambda: (first.zero_grad(), loss := (scale - 3).square().sum(), loss.backward())[1])

    for _ in range(2):
        calibrate()
        probe = nn.Linear(5, 1)
        train(torch.optim.SGD(probe.parameters(), lr=0.1), 10, probe)
    print("second stage", flush=True)
    train(torch.optim.Adam(model.parameters(), lr=0.01), 50)
    print("went on")
    """
    with serve(RunConfig(**SLOW)) as server:
        done = launched(server.address, TRAIN + text)
    assert (done.returncode, done.stdout) == (1, "second stage\n"), done.stderr
    (refusal,) = [line for line in done.stderr.splitlines() if "UnsupportedModel" in line]
    assert "what LBFGS trains is in the run, and has not stepped while Adam, made later, took 16 steps" in refusal


def test_parameters_that_the_script_restores_at_its_end_are_not_pushed(launched, tmp_path: Path) -> None:
    text = """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(optimizer, 1)
    best = copy.deepcopy(model.state_dict())
    train(optimizer, 3)
    torch.save(model.state_dict(), "last.pt")
    model.load_state_dict(best)
    """
    exact = {"uplink_codec": "fp32", "downlink_codec": "fp32", "outer_lr": 1.0, "outer_momentum": 0.0}
    with serve(RunConfig(sync_every=3, num_fragments=1, overlap_steps=0, mixing_alpha=0.0, **exact)) as server:
        done = launched(server.address, TRAIN + text, export=tmp_path / "theta.safetensors")
        assert done.returncode == 0, done.stderr
    assert "changed since the last inner step" in done.stderr
    theta, last = load_file(tmp_path / "theta.safetensors"), torch.load(tmp_path / "last.pt")
    assert all(torch.allclose(theta[name], last[name], atol=1e-6) for name in last)


def test_lightning_that_tests_its_best_checkpoint_does_not_push_it(launched) -> None:
    """The first validation is the best one here."""
    text = """
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.validations = torch.nn.Linear(8, 1), 0
        def training_step(self, batch, index):
            return self.layer(batch).square().mean()
        def validation_step(self, batch, index):
            self.validations += 1
            self.log("val_loss", float(self.validations))
        def test_step(self, batch, index):
            print("tested", flush=True)
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(torch.randn(24, 8), 8)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=[ModelCheckpoint("best", monitor="val_loss")], **quiet)
    module = Module()
    trainer.fit(module, data, data)
    trainer.test(module, data, ckpt_path="best", verbose=False)
    """
    with serve(RunConfig(sync_every=100, num_fragments=1)) as server:
        done = launched(server.address, text)
        assert (done.returncode, done.stdout.count("tested")) == (0, 3), done.stderr
        status = diloco_client.status(server.address)
    assert "changed since the last inner step" in done.stderr
    assert (status["workers"][0]["steps"], status["fragments"][0]["version"]) == (5, 0)


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
            "model.bias.register_post_accumulate_grad_hook(lambda p: optimizer.step() and 0); train()",
            "the script steps its optimizers within the backward pass",
        ),
        ("with diloco_client.join(None, model, optimizer): train()", "the script joins a run by itself"),
        ("import threading; t = threading.Thread(target=train); t.start(); t.join()", "the script trains in a thread"),
    ],
)
def test_what_it_cannot_do_is_refused(way: str, message: str, launched) -> None:
    with serve(RunConfig(**SLOW)) as server:
        done = launched(server.address, REFUSED + f"    {way.replace('None', repr(server.address))}\n")
    assert "went on" not in done.stdout
    assert f"diloco: UnsupportedModel: {message}" in done.stderr
    assert done.returncode == 1
