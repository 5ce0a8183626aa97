"""The model of an island: its tensors may be sharded over the ranks (DTensor) in any way, or replicated on each.

What a rank owns of a fragment is a range of its flat values (`Island.bounds`), which has nothing to do with how the
tensors are sharded. So every tensor is put together within the island, one at a time, when values go out (`capture`),
and a few at a time, up to BUNDLE, when they come back in: from the ranges of all ranks, of which each rank then takes
its shard. Collective: every rank calls the same methods in the same order.

Buffers go out as the mean over the ranks, each of which has seen other data (BatchNorm).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from diloco_proto.codec.formats import Floats
from diloco_proto.errors import UnsupportedModel
from diloco_proto.manifest import Layout, Role, Slot

from ..binding import Binding, plain_dtype
from ..spans import Span
from .dtensors import DTensor, FSDPModule, Replicate
from .ranks import Island

BUNDLE = 1 << 24
"""Values that are put together at once, 64 MiB; a larger tensor goes alone."""


class IslandBinding(Binding):
    """A Binding of which each rank of `island` holds its own spans."""

    def __init__(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], island: Island) -> None:
        self._island = island
        self._fsdp = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._reshard()
        super().__init__(model, optimizers)

    def _reshard(self) -> None:
        """Between forward and backward FSDP keeps some parameters whole, the root's even after a forward alone. They
        would not learn of what is written to the shards."""
        for module in self._fsdp:
            module.reshard()

    def _spans(self, layout: Layout) -> list[Span]:
        spans = []
        for fragment in layout.fragments:
            first, stop = self._island.bounds(fragment.num_blocks)[self._island.rank :][:2]
            spans.append(Span(fragment, first, stop - first))
        return spans

    def _place(self, tensor: torch.Tensor) -> tuple[object, ...]:
        return (id(tensor),) if isinstance(tensor, DTensor) else super()._place(tensor)

    def _storage(self, tensor: torch.Tensor) -> tuple[object, ...]:
        return (id(tensor),) if isinstance(tensor, DTensor) else super()._storage(tensor)

    def _common_device(self, fragment: int) -> torch.device:
        return self._island.device

    def _in_place(self, fragment: int) -> bool:
        return False  # tensors are put together one at a time

    # -- out --

    def _local(self, fragment: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(begin, end, values) of each tensor within the span; all ranks put all tensors together."""
        span = self.spans[fragment]
        mine = {piece.slot.offset: piece for piece in span.pieces()}
        self._check_buffers(span)
        for slot in span.fragment.slots:
            piece = mine.get(slot.offset)
            tensor = self._tensor(slot.tensor)
            if isinstance(tensor, DTensor):
                with self._island.together():
                    tensor = _assembled(tensor)
            elif slot.tensor.role is Role.BUFFER:
                tensor = self._island.mean(tensor)
            if piece is not None:
                size = piece.end - piece.begin
                yield piece.begin, piece.end, tensor.reshape(-1)[piece.skipped : piece.skipped + size]
            del tensor  # one whole tensor at a time

    def _check_buffers(self, span: Span) -> None:
        """Raises UnsupportedModel on all ranks if one of them has replaced a buffer by one of another shape."""
        if span.fragment.role is not Role.BUFFER:
            return
        failed: UnsupportedModel | None = None
        try:
            for slot in span.fragment.slots:
                self._tensor(slot.tensor)
        except UnsupportedModel as error:
            failed = error
        self._island.agree(failed)

    # -- in --

    def _on_device(self, fragment: int, flat: Floats) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(this rank's shard of a tensor, its values), for every tensor; from the `flat` of all ranks."""
        self._reshard()
        for slot, values in self._whole(fragment, flat):
            tensor = self._tensor(slot.tensor)
            if isinstance(tensor, DTensor):
                mine = _shard_of(tensor, values).to(tensor.to_local().device)
                del values
                yield tensor.to_local(), mine
                del mine
            else:
                values = values.to(tensor.device)
                yield tensor, values
                del values

    def _whole(self, fragment: int, flat: Floats) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Each tensor's values, float32 in its full shape on the island's device."""
        span = self.spans[fragment]
        self._check_buffers(span)
        bounds = [64 * b for b in self._island.bounds(span.fragment.num_blocks)]
        for slots in _bundles(span.fragment.slots):
            start, stop = slots[0].offset, slots[-1].end
            values = torch.empty(stop - start, dtype=torch.float32, device=self._island.device)
            pieces: list[tuple[torch.Tensor, int]] = []
            for rank in range(self._island.size):
                begin, end = max(start, bounds[rank]), min(stop, bounds[rank + 1])
                if begin < end:
                    pieces.append((values[begin - start : end - start], rank))
                    if rank == self._island.rank:
                        pieces[-1][0].copy_(torch.from_numpy(flat[begin - span.start : end - span.start]))
            self._island.broadcast(pieces)
            pieces.clear()
            for slot in slots:
                yield slot, values[slot.offset - start : slot.end - start].view(slot.tensor.shape)
            del values  # before the next ones are put together

    # -- around --

    @torch.no_grad()
    def put_back(self, values: Mapping[str, torch.Tensor]) -> None:
        self._reshard()
        super().put_back(values)

    @torch.no_grad()
    def state_dict(self, bases: Sequence[Floats]) -> dict[str, torch.Tensor]:
        """As a plain worker's; a tensor that the model's state has as a DTensor is one, its local part on the CPU."""
        theta: dict[str, torch.Tensor] = {}
        for fragment, base in zip(self.layout.scheduled, bases, strict=True):
            for slot, values in self._whole(fragment.index, base):
                tensor = self._tensor(slot.tensor)
                mine = _shard_of(tensor, values) if isinstance(tensor, DTensor) else values
                for name in (slot.tensor.name, *slot.tensor.tied):
                    theta[name] = mine.to("cpu", plain_dtype(slot.tensor), copy=True)
                del mine, values
        return self._filled(theta)

    def _as_in_state(self, value: Any, theta: torch.Tensor) -> torch.Tensor:
        if not isinstance(value, DTensor):
            return theta
        held: Any = value.detach().to("cpu", copy=True)  # from_local would move θ to the device of the mesh
        held.to_local().copy_(theta)
        return held  # type: ignore[no-any-return]


def _bundles(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """Slots that follow one another, together up to BUNDLE values."""
    bundle: list[Slot] = []
    for slot in slots:
        if bundle and slot.end - bundle[0].offset > BUNDLE:
            yield bundle
            bundle = []
        bundle.append(slot)
    if bundle:
        yield bundle


def _assembled(tensor: DTensor) -> torch.Tensor:
    """The whole tensor, on the device of its mesh; shards that are offloaded to the CPU go there first."""
    kind = tensor.device_mesh.device_type
    if tensor.to_local().device.type != kind:
        tensor = DTensor.from_local(
            tensor.to_local().to(kind),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    return tensor.full_tensor()


def _shard_of(tensor: DTensor, values: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor's values this rank's shard; nothing is sent for it."""
    mesh = tensor.device_mesh
    whole = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    mine: DTensor = whole.redistribute(mesh, tensor.placements)
    return mine.to_local()
