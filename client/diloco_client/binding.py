"""A torch model seen as flat fragments: which tensors take part, and how values go out of them and back in.

A fragment's values are one numpy float32[length] everywhere but in the model. (On a rank of an island they are those of
its span; see `island.binding`.) `capture`, `mix`, `shift` and `adopt` run on the training thread: one pass over
the values; so does `rebase_change`, which is only needed off schedule.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from diloco_proto.codec import Encoded, accumulate, flush_
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import NonFiniteParameter, UnsupportedModel
from diloco_proto.manifest import DTYPES, Fragment, Layout, Manifest, Role, TensorSpec

from .captured import Captured, InPlace
from .host import Host, seen
from .optimizers import check_optimizers
from .spans import Span

SMALL = 1 << 13
"""Values of a tensor, in the mean, below which a call for each costs more than to copy them all."""

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing put before the names of what they wrap."""


@dataclass(slots=True)
class _Found:
    """A tensor of the model, by all its names."""

    tensor: torch.Tensor
    role: Role
    names: list[str]


class Binding:
    """The parameters and buffers of a model that take part in a run.

    Trained are the parameters that require a gradient and that one of `optimizers` holds; the others are frozen and
    travel with the snapshot only. Buffers are averaged: those of the model's state (persistent) in a floating-point
    dtype; others stay local. Tied tensors (one storage, several names) are one tensor.

    Raises UnsupportedModel, or MasterWeights for an optimizer that works on copies.
    """

    def __init__(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._model = model
        self._replicated = _has_replicas(model)
        self._optimizers = tuple(map(weakref.ref, optimizers))
        self._parameters: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, tuple[torch.nn.Module, str]] = {}
        self._frozen: dict[int, str] = {}
        self._host = Host()
        self.manifest = self._build_manifest()
        self.check_optimizers()

    def _build_manifest(self) -> Manifest:
        found: dict[tuple[object, ...], _Found] = {}
        self._find_parameters(found)
        self._find_buffers(found)
        return Manifest(
            tuple(
                TensorSpec(f.names[0], tuple(f.tensor.shape), _dtype_name(f.tensor), f.role, tuple(f.names[1:]))
                for f in found.values()
                if f.role is not Role.FROZEN or _dtype_name(f.tensor) in DTYPES
            )
        )

    def _find_parameters(self, found: dict[tuple[object, ...], _Found]) -> None:
        held = {id(p) for optimizer in self._living() for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            entry = found.setdefault(self._place(parameter), _Found(parameter, Role.FROZEN, []))
            entry.names.append(self._plain_name(name))
            if parameter.requires_grad and id(parameter) in held:
                entry.role = Role.TRAINED
        if not any(f.role is Role.TRAINED for f in found.values()):
            raise UnsupportedModel(
                "none of the model's parameters is both trainable (requires_grad) and held by the optimizer: pass the "
                "optimizer that trains this model, after the model has been moved to its device"
            )
        self._parameters = {f.names[0]: f.tensor for f in found.values()}
        self._frozen = {id(f.tensor): f.names[0] for f in found.values() if f.role is Role.FROZEN}

    def _plain_name(self, name: str) -> str:
        """The name without what torch's wrappers put into it."""
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        return name.removeprefix("module.") if self._replicated else name

    def _place(self, tensor: torch.Tensor) -> tuple[object, ...]:
        """Where a tensor's values lie: the same for tied tensors."""
        return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())

    def _storage(self, tensor: torch.Tensor) -> tuple[object, ...]:
        return tensor.device, tensor.untyped_storage().data_ptr()

    def _find_buffers(self, found: dict[tuple[object, ...], _Found]) -> None:
        """A buffer that is a parameter is a further name of it; a view of one is left to the parameter."""
        of_parameters = {self._storage(parameter) for parameter in self._model.parameters()}
        for path, module in self._model.named_modules(remove_duplicate=False):
            for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                if key in module._non_persistent_buffers_set or not _averaged(buffer):
                    continue
                name = self._plain_name(f"{path}.{key}" if path else key)
                if self._place(buffer) in found:
                    found[self._place(buffer)].names.append(name)
                elif self._storage(buffer) not in of_parameters:
                    found[self._place(buffer)] = _Found(buffer, Role.BUFFER, [name])
                    self._buffers[name] = (module, key)

    def check_optimizers(self) -> None:
        """Raises MasterWeights if an optimizer keeps its own copy of the parameters.

        Called at join and again after the first step, when optimizers have made their state.
        """
        check_optimizers(self._model, self._living(), self._frozen)

    def _living(self) -> list[torch.optim.Optimizer]:
        """Its optimizers, without those that the trainer has given up for others."""
        return [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]

    @property
    def trained(self) -> list[torch.Tensor]:
        """The tensors that the optimizers train."""
        return [self._parameters[t.name] for t in self.manifest.tensors if t.role is Role.TRAINED]

    def attach(self, layout: Layout) -> None:
        """Settle where each tensor lies in its fragment."""
        self.layout = layout
        self.spans = self._spans(layout)
        self._rounded = [[p for p in span.pieces() if p.slot.tensor.dtype != "float32"] for span in self.spans]

    def _spans(self, layout: Layout) -> list[Span]:
        """What of each fragment this process holds."""
        return [Span.whole(fragment) for fragment in layout.fragments]

    # -- training thread --

    @torch.no_grad()
    def capture(self, fragment: int) -> Captured:
        """The fragment's local values: where they are if host memory has them as they are encoded, else a copy."""
        span = self.spans[fragment]
        if self._in_place(fragment):
            return InPlace([(b, seen(t)) for b, _, t in self._local(fragment)], span.length)
        with record_function("diloco::capture"):
            return self._host.copy(self._local(fragment), span.length, self._common_device(fragment))

    @torch.no_grad()
    def mix(self, fragment: int, theta: Floats, alpha: float) -> None:
        """local ← α·local + (1 − α)·θ, the merge of a contribution that was counted on schedule."""
        with record_function("diloco::apply"):
            for local, value in self._on_device(fragment, theta):
                if local.dtype == torch.float32:
                    local.lerp_(value, 1.0 - alpha)
                else:
                    local.copy_(local.float().lerp_(value, 1.0 - alpha))
                del value  # else it lasts until the next tensor is put together

    @torch.no_grad()
    def shift(self, fragment: int, change: Floats) -> None:
        """local ← local + change, with change from `rebase_change`: all local progress stays."""
        with record_function("diloco::apply"):
            for local, value in self._on_device(fragment, change):
                if local.dtype == torch.float32:
                    local.add_(value)
                else:
                    local.copy_(local.float().add_(value))
                del value

    @torch.no_grad()
    def adopt(self, fragment: int, theta: Floats) -> None:
        """local ← θ, rounded to each tensor's dtype."""
        for local, value in self._on_device(fragment, theta):
            local.copy_(value)
            del value

    @torch.no_grad()
    def local_values(self) -> dict[str, torch.Tensor]:
        """Copies of all trained parameters and averaged buffers, by name, each on its device."""
        return {
            slot.tensor.name: self._tensor(slot.tensor).detach().clone()
            for fragment in self.layout.scheduled
            for slot in fragment.slots
        }

    @torch.no_grad()
    def put_back(self, values: Mapping[str, torch.Tensor]) -> None:
        """Local values as `local_values` gave them."""
        for fragment in self.layout.scheduled:
            for slot in fragment.slots:
                self._tensor(slot.tensor).copy_(values[slot.tensor.name])

    # -- any thread --

    def use_device(self) -> None:
        """Of a thread that begins: what it does with CUDA happens on the model's device, not on the first."""
        device = self._common_device(0)
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def seed_values(self, fragment: int, captured: Captured) -> Floats:
        """The local values as they become version 0: float32, magnitudes under 2^-100 flushed, in place.

        Raises NonFiniteParameter, naming the tensor.
        """
        values = captured.wait()
        bad = flush_(values)
        if bad >= 0:
            raise self.non_finite(fragment, bad)
        return values

    def rebase_change(
        self, fragment: int, old: Floats, new: Floats, counted: Encoded | None, correction: Floats | None = None
    ) -> Floats:
        """What to add to the local values when the base moves from `old` to `new` off schedule.

        Not counted: round(new) − round(old). Counted, but late: the counted contribution c is taken out as well, so
        that every later step, and nothing else, is left for the next Δ. With error feedback c carries the former
        residual e and leaves e' behind, so what it took from the local values is decode(c) − e + e': `correction`
        is e' − e, float32[length].
        """
        change = np.subtract(self.rounded(fragment, new), self.rounded(fragment, old))
        if counted is not None:
            accumulate(counted.format, counted.scales, counted.codes, 1.0, change)
        if correction is not None:
            change += correction
        return change

    def rounded(self, fragment: int, theta: Floats) -> Floats:
        """θ with each tensor rounded to its dtype; the same object if all are float32."""
        if not self._rounded[fragment]:
            return theta
        result = theta.copy()
        for piece in self._rounded[fragment]:
            values = torch.from_numpy(result[piece.begin : piece.end])
            values.copy_(values.to(plain_dtype(piece.slot.tensor)))
        return result

    def state_dict(self, bases: Sequence[Floats]) -> dict[str, torch.Tensor]:
        """The model's state_dict with θ in place of the trained parameters and averaged buffers: names and dtypes are
        the model's own. `bases` are those of the layout's scheduled fragments."""
        theta: dict[str, torch.Tensor] = {}
        for fragment, base in zip(self.layout.scheduled, bases, strict=True):
            for slot in fragment.slots:
                value = torch.from_numpy(base[slot.offset : slot.end]).reshape(slot.tensor.shape)
                for name in (slot.tensor.name, *slot.tensor.tied):
                    theta[name] = value.to(plain_dtype(slot.tensor), copy=True)
        return self._filled(theta)

    def _filled(self, theta: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's state_dict with these values in it, by the manifest's names."""
        filled: dict[str, torch.Tensor] = {}
        state: dict[str, Any] = self._model.state_dict()
        for name, value in state.items():
            known = theta.get(self._plain_name(name))
            filled[name] = _detached(value) if known is None else self._as_in_state(value, known)
        return filled

    def _as_in_state(self, value: Any, theta: torch.Tensor) -> torch.Tensor:
        """θ of a tensor in the place of the `value` that the model's state has of it."""
        return theta

    def non_finite(self, fragment: int, index: int) -> NonFiniteParameter:
        """The error for value `index` of what this process holds of the fragment."""
        span = self.spans[fragment]
        return non_finite(span.fragment, span.start + index)

    def host_buffer(self, fragment: int) -> Floats:
        """Of the length that this process holds of the fragment, not initialised. Any thread."""
        return self._host.buffer(self.spans[fragment].length, self._common_device(fragment))

    def _common_device(self, fragment: int) -> torch.device:
        return self._tensor(self.layout.fragments[fragment].slots[0].tensor).device

    def _tensor(self, spec: TensorSpec) -> torch.Tensor:
        """The model's own tensor. A buffer is looked up anew: modules may replace theirs."""
        if spec.role is not Role.BUFFER:
            return self._parameters[spec.name]
        module, key = self._buffers[spec.name]
        buffer = getattr(module, key, None)
        if not isinstance(buffer, torch.Tensor) or buffer.shape != spec.shape:
            now = list(buffer.shape) if isinstance(buffer, torch.Tensor) else buffer
            raise UnsupportedModel(
                f"buffer {spec.name!r} had the shape {list(spec.shape)} when this worker joined and is {now} now: it "
                "cannot be averaged between workers. Keep its shape, or register it with persistent=False"
            )
        return buffer

    def _in_place(self, fragment: int) -> bool:
        """Of many small tensors a copy takes less: each is encoded by itself."""
        slots = self.layout.fragments[fragment].slots
        return self.spans[fragment].length >= SMALL * len(slots) and all(
            t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous()
            for _, _, t in self._local(fragment)
        )

    def _local(self, fragment: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(offset, end, local tensor) of each tensor of the fragment."""
        for slot in self.layout.fragments[fragment].slots:
            yield slot.offset, slot.end, self._tensor(slot.tensor)

    def _on_device(self, fragment: int, flat: Floats) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(local tensor, its values from `flat` on its device), with one transfer a device."""
        copies: dict[torch.device, torch.Tensor] = {}
        for offset, end, local in self._local(fragment):
            if local.device not in copies:
                copies[local.device] = torch.from_numpy(flat).to(local.device, non_blocking=True)
            yield local, copies[local.device][offset:end].view(local.shape)


def non_finite(fragment: Fragment, index: int) -> NonFiniteParameter:
    kind, advice = "tensor", ""
    if fragment.role is Role.BUFFER:
        kind, advice = "buffer", ". If it is a constant, such as a mask, register it with persistent=False"
    return NonFiniteParameter(
        f"{kind} {fragment.tensor_at(index)!r} holds NaN, Inf or a magnitude of 2^126 and more: training has diverged "
        "on this worker. Nothing of it was sent; lower the inner learning rate or clip gradients, and start it "
        f"again{advice}"
    )


def _has_replicas(model: torch.nn.Module) -> bool:
    """Whether the model, or what torch.compile has compiled of it, is wrapped in DistributedDataParallel."""
    inner = getattr(model, "_orig_mod", model)
    return isinstance(inner, torch.nn.parallel.DistributedDataParallel)


def _averaged(buffer: torch.Tensor) -> bool:
    """Whether a buffer of the model's state has a mean that means something."""
    return _dtype_name(buffer) in DTYPES and buffer.layout is torch.strided and buffer.numel() > 0


def plain_dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _detached(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
