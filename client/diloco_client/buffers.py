"""Host memory that is used again. The system's fresh pages cost more time than what is done with them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diloco_proto.codec.formats import Floats

KEPT = 2
"""Spare buffers: one for what is captured next, one for what arrives next."""


class Buffers:
    """Lends arrays. Each comes back by itself once nothing refers to it, nor to a view of it: whoever has one need not
    know. Any thread."""

    def __init__(self) -> None:
        self._spare: deque[_Buffer] = deque(maxlen=KEPT)

    def take(self, length: int, *, pinned: bool) -> Floats:
        """float32[length], not initialised; `pinned`: such as a CUDA device copies from and to on its own."""
        buffer = self._fitting(length, pinned) or _Buffer.new(length, pinned)
        values: Floats = np.asarray(_Loan(buffer, self._spare))
        return values[:length]

    def _fitting(self, length: int, pinned: bool) -> _Buffer | None:
        for _ in range(KEPT):  # each step is atomic: a loan may end at any moment, in any thread
            try:
                buffer = self._spare.popleft()
            except IndexError:
                return None
            if (len(buffer.values), buffer.pinned) == (_capacity(length), pinned):
                return buffer
            self._spare.append(buffer)
        return None


@dataclass(frozen=True, slots=True)
class _Buffer:
    values: Floats
    pinned: bool

    @classmethod
    def new(cls, length: int, pinned: bool) -> _Buffer:
        if pinned:
            return cls(torch.empty(_capacity(length), dtype=torch.float32, pin_memory=True).numpy(), True)
        return cls(np.empty(_capacity(length), np.float32), False)  # numpy asks for large pages, torch does not


class _Loan:
    """What all views of a lent buffer refer to."""

    def __init__(self, buffer: _Buffer, spare: deque[_Buffer]) -> None:
        self._buffer = buffer
        self._spare = spare

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return dict(self._buffer.values.__array_interface__)

    def __del__(self) -> None:
        self._spare.append(self._buffer)


def _capacity(length: int) -> int:
    """At most a quarter more, so that fragments of about one size share their buffers. What is not used of it takes
    no memory."""
    step = 1 << max(0, length.bit_length() - 3)
    return -(-length // step) * step
