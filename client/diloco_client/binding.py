"""A torch model seen as flat fragments: which tensors take part, and how values go out of them and back in.

`capture`, `mix`, `shift` and `adopt` run on the training thread: copies and one elementwise pass. `delta` runs on the
courier's threads; `rebase_change`, which is only needed off schedule, on the training thread too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from diloco_proto.codec import Encoded, accumulate, flush_
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import MasterWeights, NonFiniteParameter, UnsupportedModel
from diloco_proto.manifest import DTYPES, Fragment, Layout, Manifest, Role, TensorSpec

_MASTER_ATTRIBUTES = (
    "fp32_from_fp16_groups",
    "fp32_groups",
    "shard_fp32_from_float16_groups",
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "_master_params",
    "master_params",
    "master_param_groups",
)


@dataclass(frozen=True, slots=True)
class Captured:
    """A copy of one fragment's local values, float32[length] in host memory, complete once `ready` has passed."""

    values: torch.Tensor
    ready: torch.cuda.Event | None

    def wait(self) -> Floats:
        if self.ready is not None:
            self.ready.synchronize()
        values: Floats = self.values.numpy()
        return values


class Binding:
    """The parameters of a model that take part in a run.

    Trained are those that require a gradient and that one of `optimizers` holds; the others are frozen and
    travel with the snapshot only. Tied parameters (one storage, several names) are one tensor.

    Raises UnsupportedModel, or MasterWeights for an optimizer that works on copies.
    """

    def __init__(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._model = model
        self._optimizers = tuple(optimizers)
        self._tensors: dict[str, torch.Tensor] = {}
        self._fragments: list[list[tuple[int, int, torch.Tensor]]] = []
        self._side_streams: dict[torch.device, torch.cuda.Stream] = {}
        self.manifest = self._build_manifest()
        self.check_optimizers()

    def _build_manifest(self) -> Manifest:
        held = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        names: dict[tuple[object, ...], list[str]] = {}
        roles: dict[str, Role] = {}
        for raw_name, parameter in self._model.named_parameters(remove_duplicate=False):
            name = _plain_name(raw_name)
            same = names.setdefault(_place(parameter), [])
            same.append(name)
            if len(same) == 1:
                self._tensors[name] = parameter
                roles[name] = Role.FROZEN
            if parameter.requires_grad and id(parameter) in held:
                roles[same[0]] = Role.TRAINED
        specs = [
            TensorSpec(
                first,
                tuple(self._tensors[first].shape),
                _dtype_name(self._tensors[first]),
                roles[first],
                tuple(tied),
            )
            for first, *tied in names.values()
            if roles[first] is Role.TRAINED or _dtype_name(self._tensors[first]) in DTYPES
        ]
        if not any(role is Role.TRAINED for role in roles.values()):
            raise UnsupportedModel(
                "none of the model's parameters is both trainable (requires_grad) and held by the optimizer: pass the "
                "optimizer that trains this model, after the model has been moved to its device"
            )
        self._frozen = {
            id(p): _plain_name(n) for n, p in self._model.named_parameters() if roles.get(_plain_name(n)) is Role.FROZEN
        }
        return Manifest(tuple(specs))

    def check_optimizers(self) -> None:
        """Raises MasterWeights if an optimizer keeps its own copy of the parameters.

        Called at join and again after the first step, when optimizers have made their state.
        """
        ours = {id(t) for t in self._model.parameters()}
        for optimizer in self._optimizers:
            kind = type(optimizer).__name__
            for attribute in _MASTER_ATTRIBUTES:
                if getattr(optimizer, attribute, None):
                    raise MasterWeights(_master_message(kind, f"it has `{attribute}`"))
            if getattr(optimizer, "master_weights", False) is True:
                raise MasterWeights(_master_message(kind, "it was made with master_weights=True"))
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if id(parameter) not in ours:
                    raise self._foreign_parameter(kind, parameter)
                if parameter.requires_grad and id(parameter) in self._frozen:
                    raise UnsupportedModel(
                        f"{self._frozen[id(parameter)]!r} was frozen when this worker joined and is trained now: it "
                        "would differ between workers. Unfreeze it, and give it to the optimizer, before join"
                    )
            for state in optimizer.state.values():
                masters = [k for k, v in state.items() if "master" in str(k) and isinstance(v, torch.Tensor)]
                if masters:
                    raise MasterWeights(_master_message(kind, f"its state holds {masters[0]!r}"))

    def _foreign_parameter(self, kind: str, parameter: torch.Tensor) -> UnsupportedModel:
        """The error for a parameter that the optimizer steps and the model does not have."""
        shape = list(parameter.shape)
        if any(p.shape == parameter.shape for p in self._model.parameters()):
            return MasterWeights(
                _master_message(kind, f"it steps a {shape} tensor that is not one of the model's parameters")
            )
        return UnsupportedModel(
            f"the optimizer {kind} steps a {shape} tensor that is no parameter of the model given to join: pass one "
            "module that holds all that the optimizer trains"
        )

    def attach(self, layout: Layout) -> None:
        """Settle where each tensor lies in its fragment."""
        self.layout = layout
        self._fragments = [
            [(slot.offset, slot.end, self._tensors[slot.tensor.name]) for slot in fragment.slots]
            for fragment in layout.fragments
        ]
        self._rounded = [[s for s in fragment.slots if s.tensor.dtype != "float32"] for fragment in layout.fragments]

    # -- training thread --

    @torch.no_grad()
    def capture(self, fragment: int) -> Captured:
        """Copy the fragment's local values. On CUDA the training stream only runs a copy on the device; the way
        to the host goes over a stream of its own into pinned memory."""
        with record_function("diloco::capture"):
            tensors = self._fragments[fragment]
            device = self._common_device(fragment)
            length = self.layout.fragments[fragment].length
            if device.type != "cuda":
                values = host_buffer(length, pinned=False, zero=True)
                _fill(values, tensors)
                return Captured(values, None)
            flat = torch.zeros(length, dtype=torch.float32, device=device)
            _fill(flat, tensors)
            values = host_buffer(length, pinned=True)
            side = self._side_streams.get(device)
            if side is None:
                side = self._side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                values.copy_(flat, non_blocking=True)
                flat.record_stream(side)
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record(side)
            return Captured(values, ready)

    @torch.no_grad()
    def mix(self, fragment: int, theta: torch.Tensor, alpha: float) -> None:
        """local ← α·local + (1 − α)·θ, the merge of a contribution that was counted on schedule."""
        with record_function("diloco::apply"):
            for local, value in self._on_device(fragment, theta):
                if local.dtype == torch.float32:
                    local.lerp_(value, 1.0 - alpha)
                else:
                    local.copy_(local.float().lerp_(value, 1.0 - alpha))

    @torch.no_grad()
    def shift(self, fragment: int, change: torch.Tensor) -> None:
        """local ← local + change, with change from `rebase_change`: all local progress stays."""
        with record_function("diloco::apply"):
            for local, value in self._on_device(fragment, change):
                if local.dtype == torch.float32:
                    local.add_(value)
                else:
                    local.copy_(local.float().add_(value))

    @torch.no_grad()
    def adopt(self, fragment: int, theta: torch.Tensor) -> None:
        """local ← θ, rounded to each parameter's dtype."""
        for local, value in self._on_device(fragment, theta):
            local.copy_(value)

    # -- any thread --

    def seed_values(self, fragment: int) -> torch.Tensor:
        """The local values as they become version 0: float32, magnitudes under 2^-100 flushed.

        Raises NonFiniteParameter, naming the tensor.
        """
        captured = self.capture(fragment)
        bad = flush_(captured.wait())
        if bad >= 0:
            raise non_finite(self.layout.fragments[fragment], bad)
        return captured.values

    def delta(self, fragment: int, base: torch.Tensor, captured: Captured) -> Floats:
        """Δ = round(θ_base) − θ_local as float32[length]; `round` is to each parameter's dtype, so that a bf16
        parameter does not send its own rounding as a gradient."""
        local = captured.wait()
        np.subtract(self.rounded(fragment, base).numpy(), local, out=local)
        return local

    def rebase_change(
        self, fragment: int, old: torch.Tensor, new: torch.Tensor, counted: Encoded | None
    ) -> torch.Tensor:
        """What to add to the local values when the base moves from `old` to `new` off schedule.

        Not counted: round(new) − round(old). Counted, but late: the counted contribution is taken out as well, so
        that every later step, and nothing else, is left for the next Δ.
        """
        change = self.rounded(fragment, new) - self.rounded(fragment, old)
        if counted is not None:
            accumulate(counted.format, counted.scales, counted.codes, 1.0, change.numpy())
        return change

    def rounded(self, fragment: int, theta: torch.Tensor) -> torch.Tensor:
        """θ with each tensor rounded to its parameter's dtype; the same object if all are float32."""
        if not self._rounded[fragment]:
            return theta
        result = theta.clone()
        for slot in self._rounded[fragment]:
            dtype = self._tensors[slot.tensor.name].dtype
            result[slot.offset : slot.end] = theta[slot.offset : slot.end].to(dtype)
        return result

    def state_dict(self, bases: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's state_dict with θ in place of the trained parameters: names and dtypes are the model's own."""
        theta: dict[str, torch.Tensor] = {}
        for fragment in self.layout.trained:
            for slot in fragment.slots:
                value = bases[fragment.index][slot.offset : slot.end].reshape(slot.tensor.shape)
                dtype = self._tensors[slot.tensor.name].dtype
                for name in (slot.tensor.name, *slot.tensor.tied):
                    theta[name] = value.to(dtype, copy=True)
        state: dict[str, Any] = self._model.state_dict()
        return {
            name: theta[_plain_name(name)] if _plain_name(name) in theta else _detached(value)
            for name, value in state.items()
        }

    def pinned(self, fragment: int) -> bool:
        """Whether host buffers of this fragment go to a CUDA device."""
        return self._common_device(fragment).type == "cuda"

    def _common_device(self, fragment: int) -> torch.device:
        return self._fragments[fragment][0][2].device

    def _on_device(self, fragment: int, flat: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """(local tensor, its values from `flat` on its device), with one transfer a device."""
        copies: dict[torch.device, torch.Tensor] = {}
        for offset, end, local in self._fragments[fragment]:
            if local.device not in copies:
                copies[local.device] = flat.to(local.device, non_blocking=True)
            yield local, copies[local.device][offset:end].view(local.shape)


def host_buffer(length: int, *, pinned: bool, zero: bool = False) -> torch.Tensor:
    """float32[length] in host memory."""
    make = torch.zeros if zero else torch.empty
    return make(length, dtype=torch.float32, device="cpu", pin_memory=pinned)


def non_finite(fragment: Fragment, index: int) -> NonFiniteParameter:
    return NonFiniteParameter(
        f"tensor {fragment.tensor_at(index)!r} holds NaN, Inf or a magnitude of 2^126 and more: training has diverged "
        "on this worker. Nothing of it was sent; lower the inner learning rate or clip gradients, and start it again"
    )


def _fill(flat: torch.Tensor, tensors: Iterable[tuple[int, int, torch.Tensor]]) -> None:
    for offset, end, local in tensors:
        flat[offset:end].view(local.shape).copy_(local, non_blocking=flat.is_cuda)


def _plain_name(name: str) -> str:
    """The name without the prefix that torch.compile puts before it."""
    return name.replace("_orig_mod.", "")


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where a tensor's values lie: the same for tied parameters."""
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _detached(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _master_message(kind: str, why: str) -> str:
    return (
        f"the optimizer {kind} keeps its own copy of the parameters ({why}) and would undo every merge of global "
        "parameters. Use one that steps the model's parameters in place, such as torch.optim.AdamW, with autocast"
    )
