"""A model as flat fragments: which tensors take part, and the arithmetic of the merges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from diloco_client.binding import Binding, non_finite
from diloco_client.captured import Captured, InPlace
from diloco_client.flights import Base, Flight
from diloco_client.host import HostCopy
from diloco_proto.codec import Format, UnencodableValue, decode_fragment, encode_fragment
from diloco_proto.codec.formats import Floats
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


def flat(binding: Binding, fragment: int = 0) -> Floats:
    return binding.capture(fragment).wait().copy()


def delta_of(binding, fragment, base):
    """Δ, as `Flight.encode` computes it."""
    return binding.rounded(fragment, base) - binding.capture(fragment).wait()


def flight_of(captured: Captured, base: Floats, residual: Floats | None = None) -> Flight:
    """One inner step of fragment 0, with error feedback if there is a residual."""
    return Flight(
        fragment=0, base=Base(0, base), captured=captured, step=1, due_step=1, steps=1, tokens=1, tokens_until=1,
        since_version=0, feedback=residual is not None, residual=residual,
    )  # fmt: skip


def normal(generator: np.random.Generator) -> Floats:
    return generator.standard_normal(64, dtype=np.float32)


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


@pytest.fixture
def no_tensor_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diloco_client.binding.SMALL", 0)


@pytest.mark.usefixtures("no_tensor_is_small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_pads_each_tensor_to_a_block(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 5, dtype=dtype)
    binding = bind(model)
    values = flat(binding)
    assert values.shape == (128,)
    np.testing.assert_array_equal(values[:15].reshape(5, 3), model.weight.detach().float())
    assert not values[15:64].any()
    np.testing.assert_array_equal(values[64:69], model.bias.detach().float())
    captured = binding.capture(0)
    if not isinstance(captured, InPlace):
        with torch.no_grad():
            model.weight.add_(1.0)
    np.testing.assert_array_equal(captured.wait(), values)
    assert isinstance(captured, InPlace) == (dtype is torch.float32)


def test_a_tensor_that_is_no_longer_what_it_was_is_copied() -> None:
    """A module may replace its buffers; a model may be converted."""
    model = nn.BatchNorm1d(9000)
    binding = bind(model)
    buffers = binding.layout.num_trained
    assert isinstance(binding.capture(buffers), InPlace)
    expected = model.running_var.clone()
    model.running_var = expected.double()
    captured = binding.capture(buffers)
    assert isinstance(captured, HostCopy)
    begin = next(s.offset for s in binding.layout.fragments[buffers].slots if s.tensor.name == "running_var")
    np.testing.assert_array_equal(captured.wait()[begin : begin + 9000], expected)


def test_of_many_small_tensors_a_copy_is_made() -> None:
    assert isinstance(bind(nn.Sequential(*(nn.Linear(30, 30) for _ in range(50)))).capture(0), HostCopy)
    assert isinstance(bind(nn.Linear(300, 300, bias=False)).capture(0), InPlace)


def test_what_was_captured_in_place_can_be_resized_later() -> None:
    model = nn.Linear(300, 300, bias=False)
    bind(model).capture(0)
    model.weight.untyped_storage().resize_(0)


@pytest.mark.usefixtures("no_tensor_is_small")
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("fmt", list(Format), ids=lambda f: f.label)
def test_what_is_encoded_in_place_is_what_a_copy_of_it_would_give(fmt: Format, feedback: bool) -> None:
    binding = bind(nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 3), nn.LayerNorm(128)))
    captured = binding.capture(0)
    assert isinstance(captured, InPlace)
    copy = HostCopy(torch.from_numpy(captured.wait()), None)
    generator = np.random.default_rng(0)
    base, residual = (generator.standard_normal(binding.spans[0].length, dtype=np.float32) for _ in range(2))
    found = []
    for values in (captured, copy):
        flight = flight_of(values, base, residual if feedback else None)
        encoded = flight.encode(fmt, base)
        left_out = b"" if flight.next_residual is None else flight.next_residual.tobytes()
        found.append((encoded.scales.tobytes(), encoded.codes.tobytes(), left_out))
    assert found[0] == found[1]
    assert bool(found[0][2]) == feedback


@pytest.mark.usefixtures("no_tensor_is_small")
def test_a_value_that_cannot_be_encoded_is_found_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    binding = bind(model)
    with torch.no_grad():
        model[1].bias[3] = math.nan
    base = np.zeros(binding.spans[0].length, np.float32)
    flight = flight_of(binding.capture(0), base)
    with pytest.raises(UnencodableValue) as caught:
        flight.encode(Format.INT4, base)
    assert "'1.bias'" in str(binding.non_finite(0, caught.value.index))


def test_capture_follows_the_logical_order_of_permuted_tensors() -> None:
    model = nn.Conv2d(3, 4, 2, bias=False).to(memory_format=torch.channels_last)
    binding = bind(model)
    expected = model.weight.detach().contiguous().view(-1)
    np.testing.assert_array_equal(flat(binding)[: expected.numel()], expected)
    theta = np.arange(64, dtype=np.float32)
    binding.adopt(0, theta)
    np.testing.assert_array_equal(model.weight.detach().contiguous().view(-1), theta[:48])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mix_is_alpha_local_plus_the_rest_global(alpha: float) -> None:
    model = nn.Linear(8, 8, bias=False)
    binding = bind(model)
    local, theta = flat(binding), normal(np.random.default_rng(1))
    binding.mix(0, theta, alpha)
    np.testing.assert_allclose(flat(binding), alpha * local + (1 - alpha) * theta, rtol=1e-5, atol=1e-6)
    if alpha == 0.0:
        np.testing.assert_array_equal(flat(binding), theta)


def test_bf16_parameters_do_not_send_their_rounding() -> None:
    model = nn.Linear(8, 8, bias=False).bfloat16()
    binding = bind(model)
    base = normal(np.random.default_rng(2))  # not representable in bf16
    binding.adopt(0, base)
    assert not delta_of(binding, 0, base).any()
    plain = base - flat(binding)
    assert np.abs(plain).max() > 0


def test_a_rebase_keeps_all_local_progress() -> None:
    model = nn.Linear(8, 8, bias=False)
    binding = bind(model)
    random = np.random.default_rng(3)
    old, new, progress = normal(random), normal(random), normal(random) * 0.01
    binding.adopt(0, old + progress)
    delta = delta_of(binding, 0, old)
    binding.shift(0, binding.rebase_change(0, old, new, None))
    np.testing.assert_allclose(delta_of(binding, 0, new), delta, atol=1e-6)


def test_a_late_merge_takes_out_what_was_counted_and_nothing_else() -> None:
    model = nn.Linear(8, 8, bias=False)
    binding = bind(model)
    random = np.random.default_rng(4)
    old, new, pushed, later = normal(random), normal(random), normal(random) * 0.01, normal(random) * 0.01
    binding.adopt(0, old + pushed)
    contribution = encode_fragment(Format.INT4, delta_of(binding, 0, old))
    binding.adopt(0, old + pushed + later)
    whole = delta_of(binding, 0, old)
    binding.shift(0, binding.rebase_change(0, old, new, contribution))
    left = delta_of(binding, 0, new)
    np.testing.assert_allclose(left, whole - decode_fragment(contribution), atol=1e-6)


def test_with_error_feedback_a_late_merge_leaves_only_the_later_steps() -> None:
    """What the code left out is in the residual; it must not stay in the local values as well."""
    model = nn.Linear(8, 8, bias=False)
    binding = bind(model)
    random = np.random.default_rng(5)
    old, new, pushed, later, residual = (normal(random) * s for s in (1.0, 1.0, 0.01, 0.01, 0.005))
    binding.adopt(0, old + pushed)
    whole = delta_of(binding, 0, old) + residual
    contribution = encode_fragment(Format.INT4, whole)
    left_out = whole - decode_fragment(contribution)
    binding.adopt(0, old + pushed + later)
    binding.shift(0, binding.rebase_change(0, old, new, contribution, left_out - residual))
    np.testing.assert_allclose(delta_of(binding, 0, new), -later, atol=1e-6)


def test_bf16_rebase_moves_by_representable_steps() -> None:
    model = nn.Linear(8, 8, bias=False).bfloat16()
    binding = bind(model)
    random = np.random.default_rng(6)
    old, new = normal(random), normal(random)
    binding.adopt(0, old)
    binding.shift(0, binding.rebase_change(0, old, new, None))
    np.testing.assert_array_equal(flat(binding), torch.from_numpy(new).bfloat16().float())


def test_state_dict_has_the_models_names_dtypes_and_ties() -> None:
    model = Tied().bfloat16()
    binding = bind(model, fragments=2)
    bases = [np.full(f.length, f.index + 1, np.float32) for f in binding.layout.scheduled]
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
        binding.seed_values(0, binding.capture(0))
    assert "'weight'" in str(non_finite(binding.layout.fragments[0], 14))


class Statistics(nn.Module):
    """A linear layer, BatchNorm, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("mean", torch.full((2,), 0.25, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.ones(4), persistent=False)
        self.register_buffer("precise", torch.ones(4, dtype=torch.float64))
        self.register_buffer("empty", torch.ones(0, 4))
        self.register_buffer("nothing", None)


def buffers_of(binding: Binding) -> int:
    (fragment,) = (f.index for f in binding.layout.scheduled if f.role is Role.BUFFER)
    return fragment


def test_persistent_floating_point_buffers_follow_the_parameters_in_the_models_order() -> None:
    manifest = bind(Statistics()).manifest
    trained = ["linear.weight", "linear.bias", "norm.weight", "norm.bias"]
    averaged = ["mean", "norm.running_mean", "norm.running_var"]
    assert [(t.name, t.role) for t in manifest.tensors] == [
        *((name, Role.TRAINED) for name in trained),
        *((name, Role.BUFFER) for name in averaged),
    ]
    assert [t.dtype for t in manifest.tensors[4:]] == ["bfloat16", "float32", "float32"]


def test_buffers_are_a_fragment_between_the_trained_ones_and_the_frozen_one() -> None:
    model = Statistics()
    model.linear.requires_grad_(False)
    layout = bind(model, fragments=2).layout
    assert [f.role for f in layout.fragments] == [Role.TRAINED, Role.TRAINED, Role.BUFFER, Role.FROZEN]


def test_buffers_go_out_and_come_back_and_the_others_stay() -> None:
    model = Statistics()
    model.norm(torch.randn(8, 5))
    binding = bind(model)
    fragment = buffers_of(binding)
    values = flat(binding, fragment)
    np.testing.assert_array_equal(values[64:69], model.norm.running_mean)
    np.testing.assert_array_equal(values[128:133], model.norm.running_var)
    np.testing.assert_array_equal(binding.seed_values(fragment, binding.capture(fragment)), values)
    theta = np.arange(192, dtype=np.float32) + 1 / 1024
    binding.adopt(fragment, theta)
    assert model.mean.tolist() == [1 / 1024, 1.0]  # bfloat16
    np.testing.assert_array_equal(model.norm.running_mean, theta[64:69])
    np.testing.assert_array_equal(model.norm.running_var, theta[128:133])
    assert model.norm.num_batches_tracked == 1
    assert model.precise.tolist() == model.scratch.tolist() == [1.0] * 4
    own = [i for s in binding.layout.fragments[fragment].slots for i in range(s.offset, s.end)]
    assert not delta_of(binding, fragment, theta)[own].any()


def test_state_dict_has_the_global_buffers_and_the_local_rest() -> None:
    model = Statistics()
    model.norm(torch.randn(8, 5))
    binding = bind(model)
    bases = [np.full(f.length, 7, np.float32) for f in binding.layout.scheduled]
    state = binding.state_dict(bases)
    assert list(state) == list(model.state_dict())
    assert state["norm.running_var"].tolist() == [7.0] * 5
    assert state["mean"].dtype == torch.bfloat16
    assert state["norm.num_batches_tracked"] == 1
    assert state["precise"].tolist() == [1.0] * 4
    model.load_state_dict(state)
    with pytest.raises(ValueError, match="shorter"):
        binding.state_dict(bases[:-1])


def test_a_buffer_that_its_module_replaces_is_followed() -> None:
    model = Statistics()
    binding = bind(model)
    fragment, former = buffers_of(binding), model.mean
    model.mean = model.mean * 0.5
    assert flat(binding, fragment)[:2].tolist() == [0.125, 0.125]
    binding.adopt(fragment, np.full(192, 3.0, np.float32))
    assert model.mean.tolist() == [3.0, 3.0]
    assert former.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("now", [torch.zeros(3), None])
def test_a_buffer_that_changes_its_shape_is_refused_by_name(now: torch.Tensor | None) -> None:
    model = Statistics()
    binding = bind(model)
    model.mean = now
    with pytest.raises(UnsupportedModel, match=r"'mean' had the shape \[2\].*persistent=False"):
        binding.capture(buffers_of(binding))


def test_buffers_that_share_storage_are_one_tensor() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[2].running_mean = model[1].running_mean
    model[2].running_var = model[1].running_var.view(2)
    by_name = {t.name: t for t in bind(model).manifest.tensors}
    assert by_name["1.running_mean"].tied == ("2.running_mean",)
    assert by_name["1.running_var"].tied == ("2.running_var",)
    assert not {"2.running_mean", "2.running_var"} & set(by_name)


def test_a_module_used_twice_has_its_buffers_once() -> None:
    norm = nn.BatchNorm1d(2)
    binding = bind(nn.Sequential(nn.Linear(2, 2), norm, norm))
    assert [(t.name, t.tied) for t in binding.manifest.tensors if t.role is Role.BUFFER] == [
        ("1.running_mean", ("2.running_mean",)),
        ("1.running_var", ("2.running_var",)),
    ]


def test_a_buffer_that_is_a_parameter_or_a_part_of_one_is_no_buffer() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("alias", model.weight.detach())
    model.register_buffer("row", model.weight.detach()[0])
    binding = bind(model)
    assert [(t.name, t.tied) for t in binding.manifest.tensors] == [("weight", ("alias",)), ("bias", ())]
    assert binding.layout.num_scheduled == binding.layout.num_trained == 1
    state = binding.state_dict([np.ones(binding.layout.fragments[0].length, np.float32)])
    assert torch.equal(state["alias"], state["weight"])


def test_buffers_of_a_compiled_model_have_their_plain_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    binding = bind(torch.compile(model, backend="eager"))
    assert [s.tensor.name for s in binding.layout.fragments[1].slots] == ["1.running_mean", "1.running_var"]
    state = binding.state_dict([np.full(f.length, 5, np.float32) for f in binding.layout.scheduled])
    assert state["_orig_mod.1.running_mean"].tolist() == [5.0, 5.0]


def test_a_buffer_of_infinities_is_named_with_a_way_out() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    binding = bind(model)
    with pytest.raises(NonFiniteParameter, match="buffer 'mask'.*persistent=False"):
        binding.seed_values(1, binding.capture(1))
