"""Memory that is used again. The system's fresh pages cost more time than what is done with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from .codec.formats import Bytes, Encoded, Floats, Format

Allocate = Callable[[int], Bytes]
"""uint8[n], not initialised."""


def _plain(nbytes: int) -> Bytes:
    return np.empty(nbytes, np.uint8)


class Buffers:
    """Lends arrays. Each comes back by itself once nothing refers to it, nor to a view of it: whoever has one need not
    know. Any thread."""

    def __init__(self, kept: int, allocate: Allocate = _plain) -> None:
        """So many wait to be lent again; when there are more, those that have waited longest are given up."""
        self._kept = kept
        self._allocate = allocate
        self._spare: deque[Bytes] = deque(maxlen=kept)

    def take(self, nbytes: int) -> Bytes:
        """uint8[nbytes], not initialised."""
        capacity = _capacity(nbytes)
        buffer = self._fitting(capacity)
        loan = _Loan(self._allocate(capacity) if buffer is None else buffer, self._spare)
        values: Bytes = np.asarray(loan)
        return values[:nbytes]

    def floats(self, length: int) -> Floats:
        """float32[length], likewise."""
        return self.take(4 * length).view(np.float32)

    def encoded(self, fmt: Format, num_blocks: int) -> Encoded:
        """Scales and codes of so many blocks, likewise."""
        scales = num_blocks * fmt.spec.scale_bytes
        both = self.take(scales + num_blocks * fmt.spec.code_bytes)
        return Encoded(fmt, both[:scales], both[scales:])

    def _fitting(self, capacity: int) -> Bytes | None:
        for _ in range(self._kept):  # each step is atomic: a loan may end at any moment, in any thread
            try:
                buffer = self._spare.popleft()
            except IndexError:
                return None
            if buffer.size == capacity:
                return buffer
            self._spare.append(buffer)
        return None


class _Loan:
    """What all views of a lent buffer refer to."""

    def __init__(self, buffer: Bytes, spare: deque[Bytes]) -> None:
        self._buffer = buffer
        self._spare = spare

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return dict(self._buffer.__array_interface__)

    def __del__(self) -> None:
        self._spare.append(self._buffer)


def _capacity(nbytes: int) -> int:
    """At most a quarter more, so that fragments of about one size share their buffers; what is not used of it takes no
    memory. Whole pages, at least one."""
    step = max(4096, 1 << max(0, nbytes.bit_length() - 3))
    return max(1, -(-nbytes // step)) * step
