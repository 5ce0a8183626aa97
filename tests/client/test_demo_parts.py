"""The demo's parts: text, model, arithmetic, keeping of processes. The whole of it is an end-to-end test."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diloco_client.demo import corpus
from diloco_client.demo import team as team_module
from diloco_client.demo.model import ByteGPT, ModelConfig, count_parameters
from diloco_client.demo.options import DemoError, DemoOptions
from diloco_client.demo.progress import ALONE, Progress
from diloco_client.demo.report import make_report, same_everywhere, save
from diloco_client.demo.team import Team
from diloco_client.demo.worker import LEARNING_RATE, learning_rate
from diloco_proto.errors import ConfigError


@pytest.fixture
def small() -> ByteGPT:
    """A model that trains in a moment."""
    torch.manual_seed(0)
    return ByteGPT(ModelConfig(layers=1, width=32, heads=2, context=16))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of 60 modules of 1 to 60 lines, and files that must not be read."""
    root = tmp_path / "lib"
    for i in range(60):
        path = root / f"package{i % 7}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"x = {i:02d}\n" * (i + 1))
    for left_out in ("test", "package1/tests", "site-packages/torch"):
        (root / left_out).mkdir(parents=True)
        (root / left_out / "module.py").write_text("no\n" * 1000)
    return root


def test_every_file_belongs_to_one_shard_or_to_validation(library: Path) -> None:
    divided = corpus.divide(library, 4)
    dealt = [*divided.validation, *(path for shard in divided.shards for path in shard)]
    assert len(dealt) == len(set(dealt)) == 60
    assert set(dealt) == set(library.glob("package?/module*.py"))
    assert divided == corpus.divide(library, 4)


def test_shards_are_of_nearly_equal_size(library: Path) -> None:
    sizes = [len(corpus.read_bytes(shard)) for shard in corpus.divide(library, 4).shards]
    assert max(sizes) < 1.1 * min(sizes)


def test_validation_does_not_depend_on_the_number_of_workers(library: Path) -> None:
    assert corpus.divide(library, 2).validation == corpus.divide(library, 5).validation


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few"):
        corpus.divide(tmp_path, 4)


def test_windows_are_bytes_and_the_bytes_after_them() -> None:
    data = np.arange(200, dtype=np.uint8)
    tokens, targets = next(corpus.batches(data, size=5, context=16, seed=0))
    assert tokens.shape == targets.shape == (5, 16)
    assert torch.equal(targets, tokens + 1)
    again, _ = next(corpus.batches(data, size=5, context=16, seed=0))
    assert torch.equal(tokens, again)
    spread, _ = corpus.spread(data, size=3, context=16)
    assert spread[:, 0].tolist() == [0, 91, 183]


def test_the_model_has_about_a_million_parameters_and_a_tied_head() -> None:
    model = ByteGPT(ModelConfig())
    assert 0.9e6 < count_parameters(model) < 1.1e6
    assert model.head.weight is model.embedding.weight
    assert {"head.weight", "embedding.weight"} <= set(model.state_dict())


def test_the_model_learns(small: ByteGPT) -> None:
    tokens = torch.randint(0, 256, (4, 17))
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = small(tokens[:, :-1], tokens[:, 1:])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 5
    assert losses[-1] < 1


def test_the_model_sees_no_future(small: ByteGPT) -> None:
    for parameter in small.parameters():  # residual branches start at zero: give attention something to do
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.randint(0, 256, (4, 17))
    early = tokens[:, 1:].clone()
    early[:, 8:] = -100  # not counted by the cross-entropy
    late = tokens.clone()
    late[:, 8:] = (late[:, 8:] + 1) % 256
    first = tokens.clone()
    first[:, 0] = (first[:, 0] + 1) % 256
    loss = small(tokens[:, :-1], early)
    assert torch.isclose(small(late[:, :-1], early), loss)
    assert not torch.isclose(small(first[:, :-1], early), loss)


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 400) for step in range(1, 401)]
    assert max(rates) == pytest.approx(LEARNING_RATE)
    assert 0 < rates[0] < LEARNING_RATE / 10
    assert rates[-1] == pytest.approx(LEARNING_RATE / 10)
    assert all(learning_rate(step, 2) > 0 for step in (1, 2))


def finished(workers: int) -> Progress:
    """A demo of 1000 parameters whose worker i moved 100·i more bytes than worker 0."""
    progress = Progress.of(workers)
    for i, (name, track) in enumerate(progress.tracks.items()):
        if name != ALONE:
            initial = {"loss": 5.0 + i, "windows": 4, "parameters": 1000}
            progress.hear(name, {"event": "initial", **initial})
        traffic = {"stall": 1.0, "up": 4000 + 100 * i, "down": 2000}
        progress.hear(name, {"event": "step", "step": 1, "loss": 5.0, "seconds": 10.0, **traffic})
        progress.hear(name, {"event": "step", "step": 2, "loss": 4.0, "seconds": 20.0, **traffic})
        progress.hear(name, {"event": "curve", "step": 2, "loss": 2.0 + i, "windows": 1 + i})
        done = {"loss": 2.0 + i, "windows": 4, "seconds": 20.0, "bits_up": 4.0 + i, "bits_down": 4.1}
        digests = {"digests": {"0": "0xab", "1": "0xcd"}}
        progress.hear(name, {"event": "done", **traffic, **done, **digests})
        assert track.phase == "done"
    return progress


def test_the_report_counts_the_worst_worker_and_averages_the_loss() -> None:
    options = DemoOptions(workers=2, steps=100, sync_every=10)
    report = make_report(options, finished(2), {"0": "0xab", "1": "0xcd"}, seconds=12.0)
    assert report.initial_loss == 5.5
    assert report.global_loss == 2.5
    assert report.alone_loss == 4.0
    assert (report.bytes_up, report.bytes_down) == (4100, 2000)
    assert report.data_parallel_bytes == 2 * 4 * 1000 * 100
    assert report.reduction == 800_000 / 6100
    assert (report.bits_up, report.bits_down) == (5.0, 4.1)
    assert report.stall == 0.05
    assert report.identical
    assert report.global_curve == {2: (2.0 * 1 + 3.0 * 2) / 3}
    assert not make_report(options, finished(2), {"0": "0xab", "1": "0xce"}, seconds=12.0).identical


def test_no_fragments_are_not_identical() -> None:
    assert not same_everywhere({}, {"worker-0": {}})


def test_the_training_loss_on_display_starts_at_the_first_loss() -> None:
    losses = finished(1).alone.losses
    assert losses[0] == pytest.approx(5.0)
    assert 4.0 < losses[1] < 5.0


def test_report_and_picture_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    progress = finished(2)
    report = make_report(DemoOptions(workers=2, steps=100), progress, {}, seconds=1.0)
    save(report, progress, tmp_path)
    keys = {"initial_loss", "alone_loss", "global_loss", "bits_up", "bits_down", "reduction", "stall"}
    assert keys | {"identical", "seconds"} <= set(json.loads((tmp_path / "report.json").read_text()))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(report.to_json())["identical"] is False


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"steps": 10, "sync_every": 25}, {"overlap_steps": 25}])
def test_options_that_cannot_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        DemoOptions(**wrong)  # type: ignore[arg-type]


def test_a_crash_shows_the_end_of_the_log(tmp_path: Path) -> None:
    with Team(tmp_path) as team:
        team.start("worker-7", [sys.executable, "-c", "raise SystemExit('no more memory')"])
        assert team.receive(30) == ("worker-7", None)
        with pytest.raises(DemoError, match=r"(?s)worker-7 ended with exit status 1 .*no more memory"):
            team.fail("worker-7")


def test_a_team_leaves_nobody_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team_module, "GRACE_SECONDS", 0.5)
    stubborn = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('{\"pid\": %d}' % os.getpid(), flush=True); time.sleep(600)"
    )
    with Team(tmp_path) as team:
        team.start("stubborn", [sys.executable, "-c", stubborn])
        received = team.receive(30)
        assert received is not None
        assert received[1] is not None
        pid = received[1]["pid"]
    assert gone(pid)


def test_the_guard_ends_its_command_when_stdin_closes() -> None:
    command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    guard = subprocess.Popen(
        [sys.executable, "-m", "diloco_client.demo.guard", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    with guard.stdout:
        pid = int(guard.stdout.readline())
        guard.stdin.close()
        assert guard.wait(30) == 128 + signal.SIGTERM
    assert gone(pid)


def gone(pid: int, within: float = 5.0) -> bool:
    """Whether process `pid` ends within so many seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
