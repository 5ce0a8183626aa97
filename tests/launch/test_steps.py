"""When an inner step is over."""

from __future__ import annotations

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from diloco_client.launch.steps import PATIENCE, Clock, InnerSteps, living_optimizers, skipped, within_its_own_step


def optimizer(**options: object) -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.zeros(2, requires_grad=True)], **options)


def ends(order: str, watched: str) -> str:
    """The steps of `order` with a dot after each that ends an inner step."""
    known = {name: optimizer() for name in sorted(set(order + watched))}
    steps = InnerSteps()
    steps.watch([known[name] for name in watched])
    return "".join(name + ("." if steps.over(known[name]) else "") for name in order)


@pytest.mark.parametrize(
    ("order", "watched"),
    [
        ("a.a.a.", "a"),
        ("dg.dg.dg.", "dg"),
        ("dddg.dddg.", "dg"),
        ("gd.ddg.dddg.", "dg"),
        ("abc.cba.", "abc"),
        ("a.ba.ab.", "a"),
    ],
)
def test_when_all_have_stepped(order: str, watched: str) -> None:
    assert ends(order.replace(".", ""), watched) == order


def test_one_that_never_steps_is_not_waited_for_for_ever(caplog) -> None:
    assert ends("a" * (PATIENCE + 3), "ab") == "a" * (PATIENCE - 1) + "a." * 4
    assert sum("has taken no step" in record.message for record in caplog.records) == 1
    late = "a" * (PATIENCE + 1) + "b" + "aab"
    assert ends(late, "ab") == "a" * (PATIENCE - 1) + "a.a." + "ba." + "ab."


def test_one_that_is_gone_is_not_waited_for() -> None:
    first, second, steps = optimizer(), optimizer(), InnerSteps()
    steps.watch([first, second])
    assert not steps.over(first)
    del second
    assert steps.over(first)


def test_an_overflow_that_a_fused_optimizer_sees_itself() -> None:
    for fused in (True, False):
        adam = optimizer(fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        seen: list[bool] = []
        handle = adam.register_step_post_hook(lambda o, args, kwargs, seen=seen: seen.append(skipped(o)))
        for value in (1.0, float("inf"), 1.0):
            tensor = adam.param_groups[0]["params"][0]
            scaler.scale((tensor * value).sum()).backward()
            scaler.step(adam)
            scaler.update()
            adam.zero_grad()
        handle.remove()
        assert seen == ([False, True, False] if fused else [False, False])


def test_a_step_within_the_step_of_the_same_optimizer_is_no_second_one() -> None:
    class Base(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    tensor = torch.zeros(2, requires_grad=True)
    plain, derived = torch.optim.SGD([tensor], lr=0.1), Base([tensor], lr=0.1)
    seen: list[tuple[torch.optim.Optimizer, bool]] = []
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append((o, within_its_own_step(o))))
    try:
        derived.step()
        plain.step()
    finally:
        handle.remove()
    assert seen == [(derived, True), (derived, False), (plain, False)]


def test_a_clock_trains_nothing() -> None:
    clock, counted = Clock(), []
    clock.register_step_post_hook(lambda *_: counted.append(1))
    clock.step()
    assert counted == [1]
    assert clock.param_groups == []
    assert not any(o is clock for o in living_optimizers())
