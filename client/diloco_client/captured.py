"""The local values of one fragment, as a contribution takes them from the model. Pure, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from diloco_proto.codec import BLOCK, Encoded, UnencodableValue, encode_difference
from diloco_proto.codec.formats import Floats


class Captured(Protocol):
    """The local values of one fragment as they were when they were captured."""

    def wait(self) -> Floats:
        """float32[length], a copy, once it is complete."""
        ...


@dataclass(frozen=True, slots=True)
class InPlace:
    """No copy: the values where they lie, in host memory. To be encoded, or copied, before the training goes on."""

    tensors: Sequence[tuple[int, Floats]]
    """Where each tensor begins, always with a block, and its values; between them are zeros."""
    length: int

    def wait(self) -> Floats:
        flat = np.zeros(self.length, np.float32)
        for begin, values in self.pieces():
            flat[begin : begin + values.size] = values
        return flat

    def pieces(self) -> Iterator[tuple[int, Floats]]:
        """The same, in whole blocks: what fills none is copied."""
        for begin, values in self.tensors:
            whole = values.size // BLOCK * BLOCK
            if whole:
                yield begin, values[:whole]
            if whole < values.size:
                last = np.zeros(BLOCK, np.float32)
                last[: values.size - whole] = values[whole:]
                yield begin + whole, last


def encode_captured(
    local: Captured, base: Floats, into: Encoded, residual: Floats | None = None, left_out: Floats | None = None
) -> None:
    """Encode (base - local) + residual, and what that leaves out, as `encode_difference`. Raises UnencodableValue."""
    for begin, values in local.pieces() if isinstance(local, InPlace) else ((0, local.wait()),):
        end = begin + values.size
        part = into.part(begin // BLOCK, end // BLOCK)
        before, after = (None if a is None else a[begin:end] for a in (residual, left_out))
        bad = encode_difference(into.format, base[begin:end], values, part.scales, part.codes, before, after)
        if bad >= 0:
            raise UnencodableValue(begin + bad)
