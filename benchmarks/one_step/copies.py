"""What capture and apply take, against the plain memory copies that they cannot do without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from diloco_client.binding import Binding
from diloco_client.captured import encode_captured
from diloco_proto.buffers import Buffers
from diloco_proto.codec import BLOCK, Format
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Pattern, build_layout

LERP = 12 / 8
"""Bytes that local ← α·local + (1 − α)·θ touches, against those of a copy of as many values."""


def bind(model: torch.nn.Module, fragments: int) -> Binding:
    binding = Binding(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    binding.attach(build_layout(binding.manifest, fragments, Pattern.STRIDED))
    return binding


def on_cpu(binding: Binding, repeats: int) -> dict[str, float]:
    """`capture` and `apply` of the fragments as multiples of a copy between memory that was used before, by torch, with
    as many threads: of the fragment's bytes, and of as many as the merge touches."""
    memory = Buffers(1)
    taken: dict[str, list[float]] = {"capture": [], "apply": []}
    for _ in range(repeats):
        for fragment in binding.layout.scheduled:
            source, sink = torch.ones(fragment.length), torch.zeros(fragment.length)
            copy = _seconds(lambda source=source, sink=sink: sink.copy_(source))  # type: ignore[misc]
            theta = binding.capture(fragment.index).wait()
            index = fragment.index
            capture = _seconds(lambda p=index, theta=theta: _capture_and_encode(binding, p, theta, memory))  # type: ignore[misc]
            merge = _seconds(lambda index=fragment.index, theta=theta: binding.mix(index, theta, 0.5))  # type: ignore[misc]
            taken["capture"].append(capture / copy)
            taken["apply"].append(merge / (LERP * copy))
    return {name: statistics.median(ratios) for name, ratios in taken.items()}


def _capture_and_encode(binding: Binding, fragment: int, theta: Floats, memory: Buffers) -> None:
    """As the training thread does it where the parameters lie in host memory."""
    encode_captured(binding.capture(fragment), theta, memory.encoded(Format.INT4, theta.size // BLOCK))


def on_cuda(parameters: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Of one fragment:

    capture   the speed at which it comes to the host, against a plain copy into pinned memory
    stream    seconds on the training stream, as a multiple of a plain copy on the device
    call      seconds that the call takes of the training thread
    apply     seconds on the training stream, as a multiple of a plain copy from pinned memory and the merge's own
    """
    side = int(parameters**0.5)
    model = torch.nn.Linear(side, side, bias=False, device="cuda", dtype=dtype)
    binding = bind(model, 1)
    length = binding.layout.fragments[0].length
    device, device_too = (torch.ones(length, device="cuda") for _ in range(2))
    pinned = torch.ones(length, pin_memory=True)
    theta = binding.host_buffer(0)
    np.copyto(theta, 0.0)
    rounds = []
    for _ in range(repeats + 1):
        down = _on_stream(lambda: pinned.copy_(device, non_blocking=True))
        up = _on_stream(lambda: device.copy_(pinned, non_blocking=True))
        across = _on_stream(lambda: device_too.copy_(device))
        merging = _on_stream(lambda: model.weight.data.copy_(model.weight.data.float().lerp_(device[:1], 0.5)))
        capture, call, whole = _capture(binding)
        apply = _on_stream(lambda: binding.mix(0, theta, 0.5))
        rounds.append(
            {"capture": down / whole, "stream": capture / across, "call": call, "apply": apply / (up + merging)}
        )
    return {name: statistics.median(r[name] for r in rounds[1:]) for name in rounds[0]}


def _capture(binding: Binding) -> tuple[float, float, float]:
    """Seconds on the training stream; in the call; from the call until all is in host memory."""
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began = time.perf_counter()
    first.record()
    copy = binding.capture(0)
    called = time.perf_counter() - began
    last.record()
    copy.wait()
    whole = time.perf_counter() - began
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, called, whole


def _on_stream(work: Callable[[], object]) -> float:
    """Seconds of the current stream."""
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


DTYPES: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
