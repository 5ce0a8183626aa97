"""The module behind an optimizer: found, named as its author would, and the same in every worker."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from diloco_client.binding import Binding
from diloco_client.launch.roots import Parts, find_trained
from diloco_client.launch.steps import living_optimizers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Loss(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def sgd(*tensors: torch.Tensor) -> torch.optim.SGD:
    return torch.optim.SGD(tensors, lr=0.1)


def names(*optimizers: torch.optim.Optimizer) -> list[str]:
    trained = find_trained(optimizers)
    return [t.name for t in Binding(trained.module, trained.optimizers).manifest.tensors if t.role == "trained"]


NET = ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]


def test_the_outermost_module() -> None:
    net = Net()
    copy = torch.optim.swa_utils.AveragedModel(net)
    assert find_trained([sgd(*net.parameters())]).module is net
    assert find_trained([sgd(net.head.weight)]).module is net, "frozen parameters and buffers come along"
    assert names(sgd(*net.parameters())) == NET
    assert copy is not net


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_taken_off(wrap) -> None:
    net = Net()
    wrapped = wrap(net)
    wrapped(torch.randn(2, 3)).sum().backward()
    assert find_trained([sgd(*wrapped.parameters())]).module is net


def test_compiled_parts_keep_their_names() -> None:
    net = Net()
    net.body = torch.compile(net.body, backend="eager")
    assert names(sgd(*net.parameters())) == NET


def test_what_a_loss_and_a_metric_share() -> None:
    net = Net()
    loss, metric = Loss(net), Loss(net)
    assert find_trained([sgd(*net.parameters())]).module is net
    del metric
    gc.collect()
    assert find_trained([sgd(*net.parameters())]).module is loss


def test_a_traced_copy_with_the_same_parameters_does_not_count() -> None:
    net = Net()
    traced = torch.fx.symbolic_trace(net)
    assert find_trained([sgd(*traced.parameters())]).module is net
    alone = torch.fx.symbolic_trace(Net())
    gc.collect()
    assert find_trained([sgd(*alone.parameters())]).module is alone


def test_adapters_on_a_frozen_base() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.low = nn.Linear(base.in_features, 1, bias=False)

    net = Net()
    net.head = Adapted(net.head)
    net.body.requires_grad_(False)
    optimizer = sgd(*(p for p in net.parameters() if p.requires_grad))
    assert find_trained([optimizer]).module is net
    assert names(optimizer) == ["head.low.weight"]


def test_several_modules_are_parts_in_the_order_of_their_optimizers() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(3, 3)
    assert names(sgd(*second.parameters()), sgd(*first.parameters())) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    both = sgd(*first.parameters(), *second.parameters())
    assert list(find_trained([both]).module.children()) == [first, second]


def test_two_optimizers_on_one_module() -> None:
    net = Net()
    optimizers = sgd(net.head.weight), sgd(*net.body.parameters(), net.head.bias)
    assert find_trained(optimizers).module is net


def test_parameters_of_no_module() -> None:
    net, temperature, image = Net(), nn.Parameter(torch.ones(1)), torch.zeros(3, requires_grad=True)
    assert names(sgd(temperature, image)) == ["optimizer0.group0.0", "optimizer0.group0.1"]
    mixed = sgd(*net.parameters()), sgd(temperature)
    assert names(*mixed) == [*(f"0.{name}" for name in NET), "optimizer1.group0.0"] or isinstance(
        find_trained(mixed).module, Parts
    )
    trained = find_trained([sgd(*net.parameters()), other := sgd(image)])
    assert trained.left_out == (other,), "an image beside a model stays the worker's own"
    assert trained.module is net


def test_parts_keep_the_tensors_themselves() -> None:
    image = torch.zeros(3, requires_grad=True)
    parts = find_trained([sgd(image)]).module
    assert [p is image for p in parts.parameters()] == [True]
    assert list(parts.state_dict()) == ["optimizer0.group0.0"]


def test_optimizers_that_the_collector_does_not_see_are_found() -> None:
    net = Net()
    optimizer = sgd(*net.parameters())
    gc.freeze()
    try:
        assert any(o is optimizer for o in living_optimizers())
        assert find_trained([optimizer]).module is net
        assert gc.get_freeze_count() > 0, "and are out of its sight again"
    finally:
        gc.unfreeze()
