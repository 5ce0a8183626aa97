"""A model as flat fragments: which tensors take part, and the arithmetic of the merges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diloco_client.binding import Binding, non_finite
from diloco_proto.codec import Format, decode_fragment, encode_fragment
from diloco_proto.errors import MasterWeights, NonFiniteParameter, UnsupportedModel
from diloco_proto.manifest import Pattern, Role, build_layout


class Tied(nn.Module):
    """An embedding whose weight is also the head's, a frozen layer and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.mid = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def bind(model: nn.Module, fragments: int = 1) -> Binding:
    binding = Binding(model, [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)])
    binding.attach(build_layout(binding.manifest, fragments, Pattern.STRIDED))
    return binding


def flat(binding: Binding, fragment: int = 0) -> torch.Tensor:
    return binding.capture(fragment).values.clone()


def test_tied_parameters_are_one_tensor_under_their_first_name() -> None:
    manifest = bind(Tied()).manifest
    by_name = {t.name: t for t in manifest.tensors}
    assert by_name["embed.weight"].tied == ("head.weight",)
    assert "head.weight" not in by_name


def test_parameters_that_share_storage_without_being_one_object_are_tied() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    assert model.head.weight is not model.embed.weight
    binding = Binding(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    assert [t.name for t in binding.manifest.tensors].count("head.weight") == 0


def test_frozen_parameters_travel_in_a_fragment_of_their_own() -> None:
    binding = bind(Tied(), fragments=2)
    roles = {t.name: t.role for t in binding.manifest.tensors}
    assert roles["frozen.weight"] is roles["frozen.bias"] is Role.FROZEN
    last = binding.layout.fragments[-1]
    assert last.role is Role.FROZEN
    assert {s.tensor.name for s in last.slots} == {"frozen.weight", "frozen.bias"}


def test_a_parameter_that_no_optimizer_holds_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    binding = Binding(model, [torch.optim.SGD(model[0].parameters(), lr=0.1)])
    assert {t.name for t in binding.manifest.tensors if t.role is Role.FROZEN} == {"1.weight", "1.bias"}


def test_several_optimizers_train_their_parameters_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    binding = Binding(model, [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model])
    assert all(t.role is Role.TRAINED for t in binding.manifest.tensors)


def test_compiled_models_have_their_plain_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model, backend="eager")
    binding = Binding(compiled, [torch.optim.SGD(model.parameters(), lr=0.1)])
    assert [t.name for t in binding.manifest.tensors] == ["0.weight", "0.bias"]


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    model.requires_grad_(False)
    with pytest.raises(UnsupportedModel, match="requires_grad"):
        Binding(model, [torch.optim.SGD(other.parameters(), lr=0.1)])


def test_float64_parameters_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2).double())
    with pytest.raises(UnsupportedModel, match=r"0\.weight.*float64"):
        Binding(model, [torch.optim.SGD(model.parameters(), lr=0.1)])


class MasterAdam(torch.optim.Adam):
    """Keeps fp32 copies in its state, as mixed-precision optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("master_param", p.detach().float().clone())


def test_an_optimizer_over_copies_is_refused() -> None:
    model = nn.Linear(2, 2)
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer = torch.optim.SGD([*masters, *model.parameters()], lr=0.1)
    with pytest.raises(MasterWeights, match="not one of the model's parameters"):
        Binding(model, [optimizer])


def test_master_weights_in_the_optimizer_state_are_found_after_the_first_step() -> None:
    model = nn.Linear(2, 2).bfloat16()
    optimizer = MasterAdam(model.parameters())
    binding = Binding(model, [optimizer])
    optimizer.step()
    with pytest.raises(MasterWeights, match="master_param"):
        binding.check_optimizers()


def test_an_optimizer_with_an_attribute_for_its_copies_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.fp32_from_fp16_groups = [[torch.zeros(2)]]
    with pytest.raises(MasterWeights, match="fp32_from_fp16_groups"):
        Binding(model, [optimizer])


def test_capture_pads_each_tensor_to_a_block_and_copies() -> None:
    model = nn.Linear(3, 5)
    binding = bind(model)
    values = flat(binding)
    assert values.shape == (128,)
    torch.testing.assert_close(values[:15].view(5, 3), model.weight.detach())
    assert not values[15:64].any()
    torch.testing.assert_close(values[64:69], model.bias.detach())
    before = values.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    assert torch.equal(values, before)


def test_capture_follows_the_logical_order_of_permuted_tensors() -> None:
    model = nn.Conv2d(3, 4, 2, bias=False).to(memory_format=torch.channels_last)
    binding = bind(model)
    expected = model.weight.detach().contiguous().view(-1)
    torch.testing.assert_close(flat(binding)[: expected.numel()], expected)
    theta = torch.arange(64, dtype=torch.float32)
    binding.adopt(0, theta)
    torch.testing.assert_close(model.weight.detach().contiguous().view(-1), theta[:48])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mix_is_alpha_local_plus_the_rest_global(alpha: float) -> None:
    model = nn.Linear(8, 8, bias=False)
    binding = bind(model)
    local, theta = flat(binding), torch.randn(64)
    binding.mix(0, theta, alpha)
    torch.testing.assert_close(flat(binding), alpha * local + (1 - alpha) * theta)
    if alpha == 0.0:
        assert torch.equal(flat(binding), theta)


def test_bf16_parameters_do_not_send_their_rounding() -> None:
    model = nn.Linear(8, 8, bias=False).bfloat16()
    binding = bind(model)
    base = torch.randn(64)  # not representable in bf16
    binding.adopt(0, base)
    assert not binding.delta(0, base, binding.capture(0)).any()
    plain = base.numpy() - flat(binding).numpy()
    assert np.abs(plain).max() > 0


def test_a_rebase_keeps_all_local_progress() -> None:
    model = nn.Linear(8, 8, bias=False)
    binding = bind(model)
    old, new = torch.randn(64), torch.randn(64)
    progress = torch.randn(64) * 0.01
    binding.adopt(0, old + progress)
    delta = binding.delta(0, old, binding.capture(0)).copy()
    binding.shift(0, binding.rebase_change(0, old, new, None))
    torch.testing.assert_close(
        torch.from_numpy(binding.delta(0, new, binding.capture(0))), torch.from_numpy(delta), atol=1e-6, rtol=0
    )


def test_a_late_merge_takes_out_what_was_counted_and_nothing_else() -> None:
    model = nn.Linear(8, 8, bias=False)
    binding = bind(model)
    old, new = torch.randn(64), torch.randn(64)
    pushed, later = torch.randn(64) * 0.01, torch.randn(64) * 0.01
    binding.adopt(0, old + pushed)
    contribution = encode_fragment(Format.INT4, binding.delta(0, old, binding.capture(0)))
    binding.adopt(0, old + pushed + later)
    whole = binding.delta(0, old, binding.capture(0)).copy()
    binding.shift(0, binding.rebase_change(0, old, new, contribution))
    left = binding.delta(0, new, binding.capture(0))
    np.testing.assert_allclose(left, whole - decode_fragment(contribution), atol=1e-6)


def test_bf16_rebase_moves_by_representable_steps() -> None:
    model = nn.Linear(8, 8, bias=False).bfloat16()
    binding = bind(model)
    old, new = torch.randn(64), torch.randn(64)
    binding.adopt(0, old)
    binding.shift(0, binding.rebase_change(0, old, new, None))
    assert torch.equal(flat(binding), new.bfloat16().float())


def test_state_dict_has_the_models_names_dtypes_and_ties() -> None:
    model = Tied().bfloat16()
    binding = bind(model, fragments=2)
    bases = [torch.full((f.length,), float(f.index + 1)) for f in binding.layout.trained]
    state = binding.state_dict(bases)
    assert list(state) == list(model.state_dict())
    assert all(v.dtype == torch.bfloat16 for v in state.values())
    assert torch.equal(state["embed.weight"], state["head.weight"])
    assert torch.equal(state["frozen.weight"], model.frozen.weight)
    model.load_state_dict(state)


def test_a_bad_value_is_named_by_its_tensor() -> None:
    model = nn.Linear(3, 5)
    binding = bind(model)
    with torch.no_grad():
        model.bias[2] = float("nan")
    with pytest.raises(NonFiniteParameter, match="'bias'"):
        binding.seed_values(0)
    assert "'weight'" in str(non_finite(binding.layout.fragments[0], 14))
