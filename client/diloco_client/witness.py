"""Tells whether anything but the inner optimizer has changed what is trained, such as a script that ends by loading its
best checkpoint: the difference to θ is then no outer gradient.

A few values of each tensor are compared, on their own devices. The training waits for none of it: a result is read when
somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

TENSORS, SAMPLES = 512, 16
"""Tensors that are looked at, and values of each, spread over all there are: it costs less than a millisecond a step.
Whatever loads, averages or scales a model changes nearly all of them."""

CHANGED_NOW = (
    "the parameters were changed since the last inner step, and not by the optimizer (was a checkpoint loaded?): that "
    "is no training, and is not pushed, nor what else was not pushed yet"
)
CHANGED_BEFORE = (
    "the parameters were changed between two inner steps, and not by the optimizer: what they are now goes into the "
    "run as this worker's training. This is said once"
)


class Witness:
    """Of the trained tensors of this process. `stepped` is called after each inner step and what is merged then,
    `begins` before the optimizers' next steps."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        plain = (torch.Tensor, torch.nn.Parameter)
        known = [t for t in tensors if type(t) in plain or hasattr(t, "to_local")]
        self._tensors = known[:: -(-len(known) // TENSORS) or 1]
        self._places: list[int] = []
        self._samples: list[list[torch.Tensor]] = []
        self._after: list[torch.Tensor] | None = None
        self._steps = 0
        self._told = False
        self._changed = torch.zeros((), dtype=torch.int64)
        """Of these steps those before which values had changed; on the device of the first tensor."""

    @torch.no_grad()
    def stepped(self) -> None:
        """The values are as the optimizers, or a merge, have left them."""
        self._after = self._look()

    @torch.no_grad()
    def begins(self) -> None:
        """The next inner step begins; of several calls the first one counts."""
        if self._after is not None:
            differ = _differ(self._look(), self._after)
            self._changed = self._changed.to(differ.device) + differ
            self._steps += 1
            self._after = None

    @torch.no_grad()
    def changed_now(self) -> bool:
        """The values are no longer those of the last step. False in a training that has them changed before most steps,
        such as one that clips weights: that is part of it. Waits for the device."""
        return self._after is not None and not self._mostly and bool(_differ(self._look(), self._after))

    def changed_at_times(self) -> bool:
        """The values were changed before some steps, but not before most; true but once. Waits for the device."""
        if self._told or self._mostly or not self._changed:
            return False
        self._told = True
        return True

    @property
    def _mostly(self) -> bool:
        return 2 * int(self._changed) > self._steps

    def _look(self) -> list[torch.Tensor]:
        """Samples of all tensors, in one for each device."""
        local = [t.to_local() if hasattr(t, "to_local") else t for t in self._tensors]  # a DTensor, or plain
        places = [t.data_ptr() for t in local]
        if places != self._places:
            self._places, self._samples = places, _by_device(_sample(t) for t in local if t.numel())
        return [torch.cat(samples) for samples in self._samples]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of some of its values, wherever they lie."""
    count, every = min(SAMPLES, tensor.numel()), max(1, tensor.numel() // SAMPLES)
    return tensor.detach().as_strided((count,), (every,), tensor.storage_offset())


def _by_device(samples: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.device, list[torch.Tensor]] = {}
    for sample in samples:
        groups.setdefault(sample.device, []).append(sample)
    return list(groups.values())


def _differ(now: Sequence[torch.Tensor], then: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether any bit does, as a tensor on the device of the first. A model that went to other devices is as good as
    changed."""
    if [(t.device, t.dtype) for t in now] != [(t.device, t.dtype) for t in then] or not now:
        return torch.tensor(bool(now))
    bits = [(a.view(torch.uint8) != b.view(torch.uint8)).any() for a, b in zip(now, then, strict=True)]
    return torch.stack([b.to(bits[0].device) for b in bits]).any()
