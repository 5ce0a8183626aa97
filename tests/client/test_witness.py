"""What a script does to its parameters beside its optimizer is told from training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import diloco_client
from diloco_client.optimizers import check_not_captured
from diloco_client.witness import TENSORS, Witness
from diloco_proto.errors import UnsupportedModel
from diloco_server import RunConfig, serve

CONFIG = {"sync_every": 10, "num_fragments": 1, "overlap_steps": 1, "outer_lr": 1.0, "outer_momentum": 0.0}
LOSSLESS = {"uplink_codec": "fp32", "downlink_codec": "fp32"}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


def loaded(net: nn.Module, best: dict[str, torch.Tensor]) -> None:
    net.load_state_dict(best)


def averaged(net: nn.Module, best: dict[str, torch.Tensor]) -> None:
    for name, parameter in net.named_parameters():
        parameter.data.copy_(0.5 * parameter.data + 0.5 * best[name])  # leaves the version counter alone


def replaced(net: nn.Module, best: dict[str, torch.Tensor]) -> None:
    nn.utils.vector_to_parameters(torch.cat([best[n].flatten() for n, _ in net.named_parameters()]), net.parameters())


@pytest.mark.parametrize("restore", [loaded, averaged, replaced])
def test_parameters_that_were_restored_before_the_flush_are_not_pushed(restore: Callable, caplog) -> None:
    with serve(RunConfig(**CONFIG, **LOSSLESS)) as server:
        net = model()
        best = copy.deepcopy(net.state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with diloco_client.join(server.address, net, optimizer) as outer:
            step(net, optimizer, 11)  # pushed after 9 and merged after 10: one more is left
            merged = outer.global_state_dict()
            restore(net, best)
        assert any("is not pushed" in record.message for record in caplog.records)
        assert diloco_client.status(server.address)["fragments"][0]["version"] == 1
        now = outer.global_state_dict()
        assert all(torch.equal(now[name], merged[name]) for name, _ in net.named_parameters())
        assert torch.equal(net[0].weight, now["0.weight"]), "a flush ends on θ"


def test_what_leaves_the_parameters_as_they_were_is_nothing(caplog) -> None:
    """Evaluation moves buffers; θ in the model, an average that is put in and taken out, another device: all undone."""
    with serve(RunConfig(**CONFIG)) as server:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with diloco_client.join(server.address, net, optimizer) as outer:
            step(net, optimizer, 12)
            net(torch.randn(8, 4))
            with outer.global_parameters():
                pass
            local = copy.deepcopy(net.state_dict())
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.zero_()
            net.load_state_dict(local)
            net.double().float()
        assert diloco_client.status(server.address)["fragments"][0]["version"] == 2
        assert not [record for record in caplog.records if "not by the optimizer" in record.message]


def test_training_goes_on_after_it(caplog) -> None:
    with serve(RunConfig(**CONFIG)) as server:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with diloco_client.join(server.address, net, optimizer) as outer:
            step(net, optimizer, 3)
            net.load_state_dict(model().state_dict())
            outer.flush()
            step(net, optimizer, 2)
            outer.flush()
        assert diloco_client.status(server.address)["fragments"][0]["version"] == 1


def test_a_reload_in_the_midst_of_training_is_told_once(caplog) -> None:
    with serve(RunConfig(**CONFIG)) as server:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with diloco_client.join(server.address, net, optimizer):
            for _ in range(3):
                step(net, optimizer, 10)
                net.load_state_dict(model().state_dict())
            step(net, optimizer, 11)
        said = [record.message for record in caplog.records if "not by the optimizer" in record.message]
    assert len(said) == 1
    assert "goes into the run as this worker's training" in said[0]


def test_weights_that_are_clipped_after_each_step_are_training(caplog) -> None:
    with serve(RunConfig(**CONFIG)) as server:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with diloco_client.join(server.address, net, optimizer):
            for _ in range(12):
                step(net, optimizer)
                for parameter in net.parameters():
                    parameter.data.clamp_(-0.05, 0.05)
        assert diloco_client.status(server.address)["fragments"][0]["version"] == 2
    assert not [record for record in caplog.records if "not by the optimizer" in record.message]


def test_any_layout_and_any_number_of_tensors() -> None:
    tensors = [
        torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(8, 8).t(),
        torch.randn(()),
        torch.zeros(0, 3),
        torch.randn(40, dtype=torch.bfloat16),
        torch.full((4,), float("nan")),
    ]
    witness = Witness(tensors)
    assert not witness.changed_now(), "nothing has stepped"
    witness.stepped()
    assert not witness.changed_now()
    tensors[2] += 1
    assert witness.changed_now()
    many = [torch.zeros(2) for _ in range(3 * TENSORS + 7)]
    witness = Witness(many)
    witness.stepped()
    for tensor in many:
        tensor += 1
    assert witness.changed_now()


def test_a_step_that_is_captured_in_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_not_captured()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with serve(RunConfig(**CONFIG)) as server:
        net = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with (
            pytest.raises(UnsupportedModel, match="CUDA graph"),
            diloco_client.join(server.address, net, optimizer) as outer,
        ):
            step(net, optimizer)
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            step(net, optimizer)
    assert outer.closed
