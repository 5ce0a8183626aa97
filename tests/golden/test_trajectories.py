"""The real code, fp32 both ways, follows the golden trajectories after every inner step, and the identities hold.

`drive` runs the server's and the workers' cores in virtual time, `train` a real server with torch workers. What the
golden numbers are: make_trajectories.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache

import make_trajectories
import numpy as np
import pytest
import torch
from make_trajectories import CASES, PATH
from plain_diloco import INNER_LR, START, Settings, target
from whole_update import commit

import diloco_client
from diloco_cli.simulate.clock import Clock
from diloco_cli.simulate.line import Line, Speed
from diloco_cli.simulate.server import VirtualServer
from diloco_cli.simulate.worker import VirtualWorker
from diloco_proto.codec import Encoded, Format, encode_fragment
from diloco_proto.manifest import Manifest, Role, TensorSpec
from diloco_server import RunConfig, serve
from diloco_server.outer import DELAYED, FragmentState, OuterSettings

GOLDEN = json.loads(PATH.read_text())["cases"]

IN_TORCH = (
    "alpha=0.0 tau=0 P=1",
    "alpha=0.5 tau=1 P=4",
    "alpha=1.0 tau=3 P=2",
    "three workers, H no multiple of P",
    "streaming by tokens",
    "delayed, streaming",
)


def same(actual, expected, where: str = "") -> None:
    """To 1e-6, relative. What is nearly zero is the difference of larger values, of which 2e-7 is the last bit."""
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=2e-7, err_msg=where)


def config_of(s: Settings) -> RunConfig:
    return RunConfig(
        sync_every=s.sync_every,
        num_fragments=s.num_fragments,
        overlap_steps=s.overlap_steps,
        mixing_alpha=s.mixing_alpha,
        outer_optimizer=s.outer_optimizer,
        outer_lr=s.outer_lr,
        outer_momentum=s.outer_momentum,
        delay_buffer=str(s.delay_buffer),
        weighting="tokens" if s.tokens else "uniform",
        uplink_codec="fp32",
        downlink_codec="fp32",
        max_outer_grad_norm=0.0,
        min_workers=s.workers,
        grace_seconds="inf",
    )


def tokens_of(s: Settings, worker: int, step: int) -> int:
    return s.tokens[worker][(step - 1) % len(s.tokens[worker])] if s.tokens else 1


@dataclass
class Row:
    """A worker after an inner step and what was due after it."""

    local: list[float]
    theta: list[float]
    pushed: list[int] = field(default_factory=list)
    applied: list[int] = field(default_factory=list)


# -- in virtual time --


class Values:
    """A copy of local values."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def wait(self) -> np.ndarray:
        return self.values


class ScalarTrainer:
    """Fragments of one float32 each, trained as the golden ones. All merges have to be on schedule."""

    def __init__(self, settings: Settings, index: int) -> None:
        tensors = [TensorSpec(f"layers.{p}.x", (1,), "float32", Role.TRAINED) for p in range(settings.num_fragments)]
        self.manifest = Manifest(tuple(tensors))
        self.worker: VirtualWorker | None = None
        self.rows: list[Row] = []
        self.settings, self.index, self.taken = settings, index, 0
        self.pushed: list[int] = []
        self.applied: list[int] = []

    def attach(self, layout) -> None:
        self.locals = [np.zeros(fragment.length, np.float32) for fragment in layout.fragments]
        for p, local in enumerate(self.locals):
            local[0] = START[p]

    def step(self) -> int:
        """One inner step; returns its tokens."""
        if self.taken:
            self.record()
        self.taken += 1
        for p, local in enumerate(self.locals):
            gradient = np.float32(self.settings.curvature) * local[0] - np.float32(target(self.index, p, self.taken))
            local[0] -= np.float32(INNER_LR) * gradient
        return tokens_of(self.settings, self.index, self.taken)

    def record(self) -> None:
        """The last step's row, now that all that was due after it is done."""
        theta = [float(base.theta[0]) for base in self.worker.bases]
        self.rows.append(Row([float(x[0]) for x in self.locals], theta, self.pushed, self.applied))
        self.pushed, self.applied = [], []

    def seed_values(self, fragment: int) -> np.ndarray:
        return self.locals[fragment].copy()

    def capture(self, fragment: int) -> Values:
        self.pushed.append(fragment)
        return Values(self.locals[fragment].copy())

    def rounded(self, fragment: int, theta: np.ndarray) -> np.ndarray:
        return theta

    def mix(self, fragment: int, theta: np.ndarray, alpha: float) -> None:
        self.applied.append(fragment)
        local = self.locals[fragment]
        self.locals[fragment] = np.float32(alpha) * local + np.float32(1.0 - alpha) * theta

    def adopt(self, fragment: int, theta: np.ndarray) -> None:
        assert self.taken == 0
        self.locals[fragment][:] = theta

    def shift(self, fragment: int, change: np.ndarray) -> None:
        raise AssertionError("a merge off schedule")

    def rebase_change(self, fragment, old, new, counted, correction=None):
        raise AssertionError("a merge off schedule")


@dataclass
class Driven:
    """What a run in virtual time did."""

    workers: list[list[Row]]
    versions: list[list[float]]
    """θ at the server, by fragment and version."""

    def locals(self, fragment: int = 0) -> list[list[float]]:
        """Of each worker, after each inner step."""
        return [[row.local[fragment] for row in rows] for rows in self.workers]


@cache
def drive(name: str) -> Driven:
    settings = CASES[name]
    clock = Clock()
    server = VirtualServer(config_of(settings), clock)
    trainers = [ScalarTrainer(settings, index) for index in range(settings.workers)]
    for i, trainer in enumerate(trainers):
        line = Line(clock, Speed())
        trainer.worker = VirtualWorker(clock, server, line, trainer, f"w{i}", 1, step_seconds=lambda: 1.0)
    versions: list[list[float]] = [[START[p]] for p in range(settings.num_fragments)]
    while min(len(trainer.rows) for trainer in trainers) < settings.steps:
        assert clock.step(), "the run stands still"
        assert all(trainer.worker.failure is None for trainer in trainers)
        if server.run.seeded:
            for p, known in enumerate(versions):
                if server.run.parameters.version(p) == len(known):
                    snapshot = server.run.parameters.pin(p)
                    known.append(float(snapshot.theta[0]))
                    server.run.parameters.unpin(snapshot)
    return Driven([trainer.rows[: settings.steps] for trainer in trainers], versions)


@pytest.mark.parametrize("name", CASES)
def test_the_cores_follow_the_golden_trajectory(name: str) -> None:
    driven, golden = drive(name), GOLDEN[name]
    for step, (local, theta, pushed, applied) in enumerate(golden["rows"]):
        for worker, rows in enumerate(driven.workers):
            row = rows[step]
            assert (row.pushed, row.applied) == (pushed, applied), f"step {step + 1}"
            same(row.theta, theta, f"step {step + 1}")
            same(row.local, local[worker], f"step {step + 1}")
    for version, expected in zip(driven.versions, golden["versions"], strict=True):
        same(version, expected)


def test_every_case_is_in_the_file_as_the_plain_code_makes_it() -> None:
    assert PATH.read_text() == make_trajectories.text()


# -- with torch, over the wire --


class Scalars(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.x = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(START[p])) for p in range(count)])

    def loss(self, settings: Settings, worker: int, step: int) -> torch.Tensor:
        terms = [settings.curvature / 2 * x**2 - target(worker, p, step) * x for p, x in enumerate(self.x)]
        return torch.stack(terms).sum()


def train(settings: Settings, address: str, index: int) -> tuple[list[Row], dict[int, int]]:
    model = Scalars(settings.num_fragments)
    optimizer = torch.optim.SGD(model.parameters(), lr=INNER_LR)
    rows = []
    with diloco_client.join(address, model, optimizer, worker_id=f"w{index}") as outer:
        for step in range(1, settings.steps + 1):
            optimizer.zero_grad()
            model.loss(settings, index, step).backward()
            outer.report(tokens=tokens_of(settings, index, step))
            optimizer.step()
            theta = [value.item() for value in outer.global_state_dict().values()]
            rows.append(Row([x.item() for x in model.x], theta))
        digests = outer.base_digests()
        outer.close()
    return rows, digests


@pytest.mark.parametrize("name", IN_TORCH)
def test_torch_workers_follow_the_golden_trajectory(name: str, together) -> None:
    settings, golden = CASES[name], GOLDEN[name]
    with serve(config_of(settings)) as server:
        results = together(settings.workers, lambda index: train(settings, server.address, index))
        fragments = diloco_client.status(server.address)["fragments"]
    for step, (local, theta, _, _) in enumerate(golden["rows"]):
        for worker, (rows, _) in enumerate(results):
            same(rows[step].theta, theta, f"step {step + 1}")
            same(rows[step].local, local[worker], f"step {step + 1}")
    for p, fragment in enumerate(fragments):
        under_way = sum(p in row[2] for row in golden["rows"]) - sum(p in row[3] for row in golden["rows"])
        if not under_way:
            assert fragment["version"] == len(golden["versions"][p]) - 1
            assert {int(fragment["digest"], 16)} == {digests[p] for _, digests in results}


# -- the identities --


def alone(worker: int, x: float, first: int, last: int) -> list[float]:
    """Plain training of fragment 0 in inner steps `first` to `last`, with nobody else: x after each."""
    path = []
    for step in range(first, last + 1):
        x = x - 0.25 * (x - target(worker, 0, step))
        path.append(x)
    return path


def averaged(weights: tuple[float, ...]) -> list[float]:
    """FedAvg: three rounds of eight steps, each from the weighted mean of where the workers came in the last."""
    means = [START[0]]
    for first in (1, 9, 17):
        ends = [alone(worker, means[-1], first, first + 7)[-1] for worker in range(3)]
        means.append(sum(w * x for w, x in zip(weights, ends, strict=True)) / sum(weights))
    return means


def test_outer_sgd_with_lr_1_is_fedavg() -> None:
    same(drive("fedavg").versions[0], averaged((1, 1, 1)))


def test_fedavg_by_tokens_weighs_each_worker_by_what_it_trained_on() -> None:
    # Eight steps of 2 tokens, of 3, and of 4 and 1 in turn.
    same(drive("fedavg by tokens").versions[0], averaged((16, 24, 20)))


def test_token_weights_are_capped_at_twice_the_median() -> None:
    # 8, 16 and 128 tokens a round.
    same(drive("fedavg by tokens, one has far more").versions[0], averaged((8, 16, 32)))


def test_workers_that_were_averaged_all_go_on_from_the_mean() -> None:
    driven = drive("fedavg")
    for path in driven.locals():
        same([path[7], path[15], path[23]], driven.versions[0][1:])


def gradient_over_three_workers(x: float, step: int) -> float:
    """Of the mean loss: the large batch."""
    return sum(x - target(worker, 0, step) for worker in range(3)) / 3


def test_h_1_with_inner_sgd_is_large_batch_sgd() -> None:
    path = [START[0]]
    for step in range(1, 25):
        path.append(path[-1] - 0.25 * gradient_over_three_workers(path[-1], step))
    driven = drive("H=1")
    same(driven.versions[0], path)
    same(driven.locals(), [path[1:]] * 3)


def test_h_1_with_inner_sgd_and_outer_nesterov_is_large_batch_nesterov() -> None:
    x = torch.nn.Parameter(torch.tensor(START[0], dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.75 * 0.25, momentum=0.875, nesterov=True)
    path = [x.item()]
    for step in range(1, 25):
        x.grad = torch.tensor(gradient_over_three_workers(x.item(), step), dtype=torch.float64)
        optimizer.step()
        path.append(x.item())
    same(drive("H=1 with Nesterov").versions[0], path)


def test_one_worker_with_outer_sgd_of_lr_1_trains_as_if_alone() -> None:
    path = alone(0, START[0], 1, 24)
    driven = drive("one worker, averaging")
    same(driven.locals(), [path])
    same(driven.versions[0], [START[0], path[7], path[15], path[23]])


def test_one_worker_with_nesterov_is_torch_sgd_on_what_a_period_moved() -> None:
    theta = torch.nn.Parameter(torch.tensor(START[0], dtype=torch.float64))
    optimizer = torch.optim.SGD([theta], lr=0.75, momentum=0.875, nesterov=True)
    path = [theta.item()]
    for first in (1, 9, 17):
        theta.grad = torch.tensor(path[-1] - alone(0, path[-1], first, first + 7)[-1], dtype=torch.float64)
        optimizer.step()
        path.append(theta.item())
    same(drive("one worker").versions[0], path)


@pytest.mark.parametrize("fragments", [1, 2, 4])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_alpha_1_leaves_local_training_alone(overlap: int, fragments: int) -> None:
    driven = drive(f"alpha=1.0 tau={overlap} P={fragments}")
    same(driven.locals(), [alone(worker, START[0], 1, 24) for worker in range(2)])


@pytest.mark.parametrize("fragments", [1, 2, 4])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_alpha_0_makes_the_applied_fragment_the_global_one(overlap: int, fragments: int) -> None:
    for rows in drive(f"alpha=0.0 tau={overlap} P={fragments}").workers:
        applied = [(row.local[p], row.theta[p]) for row in rows for p in row.applied]
        assert len(applied) >= 2 * fragments
        assert all(local == theta for local, theta in applied)


def test_without_overlap_the_fragments_are_as_many_runs_with_shifted_periods() -> None:
    # Fragment 1 of 2 is due at 8, 16 and 24, as the only one of a run with P = 1 that starts where it does.
    s, x = CASES["alpha=0.5 tau=0 P=2"], [START[1], START[1]]
    theta, momentum, versions = START[1], 0.0, [START[1]]
    for step in range(1, 25):
        x = [local - 0.25 * (local - target(worker, 1, step)) for worker, local in enumerate(x)]
        if step % 8 == 0:
            gradient = theta - sum(x) / 2
            momentum = s.outer_momentum * momentum + gradient
            theta -= s.outer_lr * (gradient + s.outer_momentum * momentum)
            x = [(local + theta) / 2 for local in x]
            versions.append(theta)
    same(drive("alpha=0.5 tau=0 P=2").versions[1], versions)


def nesterov_steps(mean: float, pushes_a_step: int, pushes: int) -> list[float]:
    """θ after each whole Nesterov step on `mean`, from where the fragment starts."""
    theta, momentum, path = START[0], 0.0, []
    for _ in range(pushes // pushes_a_step):
        momentum = 0.875 * momentum + mean
        theta -= 0.75 * (mean + 0.875 * momentum)
        path.append(theta)
    return path


def test_delayed_nesterov_over_n_equal_pushes_is_one_nesterov_step() -> None:
    # The gradient does not depend on x, and five steps see each target once: every push is the same.
    push = -0.25 * sum(target(0, 0, step) for step in range(5))
    versions = drive("delayed, equal pushes").versions[0]
    assert len(versions) == 9
    same([versions[4], versions[8]], nesterov_steps(push, 4, 8))


def encoded(value: float) -> Encoded:
    return encode_fragment(Format.FP32, np.full(64, value, np.float32))


@pytest.mark.parametrize("pushes", [(0.5,) * 4, (1.0, -2.0, 0.75, 3.0)])
def test_delayed_nesterov_over_n_pushes_of_equal_weight_is_one_nesterov_step_on_their_mean(pushes) -> None:
    zeros = [np.zeros(64, np.float32) for _ in range(3)]
    state = FragmentState(np.full(64, START[0], np.float32), *zeros)
    settings = OuterSettings(optimizer=DELAYED, lr=0.75, momentum=0.875, downlink=Format.FP32)
    reached = []
    for push in pushes * 3:
        commit(state, [encoded(push)], [1.0], settings, delay=4)
        reached.append(float(state.theta[0]))
    same(reached[3::4], nesterov_steps(sum(pushes) / 4, 4, 12))
