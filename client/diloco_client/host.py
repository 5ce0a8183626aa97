"""From tensors, wherever they are, into flat host memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from diloco_proto.buffers import Buffers
from diloco_proto.codec.formats import Bytes, Floats

KEPT_BUFFERS = 2
"""One for what is captured next, where that is copied, and one for what arrives next."""


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Captured: a copy in host memory, float32[length], complete once `ready` has passed."""

    values: torch.Tensor
    ready: torch.cuda.Event | None

    def wait(self) -> Floats:
        if self.ready is not None:
            self.ready.synchronize()
        values: Floats = self.values.numpy()
        return values


class Host:
    """Buffers of one process, and what is copied into them."""

    def __init__(self) -> None:
        self._memory = Buffers(KEPT_BUFFERS)
        self._pinned = Buffers(KEPT_BUFFERS, _pinned)
        self._side_streams: dict[torch.device, torch.cuda.Stream] = {}

    def buffer(self, length: int, device: torch.device) -> Floats:
        """float32[length], not initialised, for what comes from or goes to this device. Any thread."""
        return (self._pinned if device.type == "cuda" else self._memory).floats(length)

    def copy(self, tensors: Iterable[tuple[int, int, torch.Tensor]], length: int, device: torch.device) -> HostCopy:
        """A copy of the tensors, each at (offset, end), and zeros between them. On CUDA the current stream only runs a
        copy on the device; the way to the host goes over a stream of its own into pinned memory."""
        values = torch.from_numpy(self.buffer(length, device))
        if device.type != "cuda":
            _fill(values, tensors)
            return HostCopy(values, None)
        flat = torch.empty(length, dtype=torch.float32, device=device)
        _fill(flat, tensors)
        side = self._side_streams.get(device)
        if side is None:
            side = self._side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            values.copy_(flat, non_blocking=True)
            flat.record_stream(side)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(side)
        return HostCopy(values, ready)


def seen(tensor: torch.Tensor) -> Floats:
    """The values of a contiguous float32 tensor in host memory, not copied. Not by Tensor.numpy(), after which a tensor
    can never be resized."""
    values: Floats = np.from_dlpack(tensor.detach().view(-1))  # type: ignore[assignment]
    return values


def _pinned(nbytes: int) -> Bytes:
    """From where a CUDA device copies on its own."""
    values: Bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return values


def _fill(flat: torch.Tensor, tensors: Iterable[tuple[int, int, torch.Tensor]]) -> None:
    """What lies between the tensors becomes 0."""
    filled = 0
    for begin, end, local in tensors:
        if filled < begin:
            flat[filled:begin].zero_()
        flat[begin:end].view(local.shape).copy_(local, non_blocking=flat.is_cuda)
        filled = end
        del local  # else it lasts until the next tensor is put together
    if filled < len(flat):
        flat[filled:].zero_()
