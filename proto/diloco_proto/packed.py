"""A frame that has not been put together yet. Apart from the codec, for those who only carry it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Packed:
    """A frame before its bytes are put together: they are copied once, to where they go."""

    head: bytes
    """All 32 bytes of it."""
    scales: bytes | memoryview
    """Stored bytes; where not compressed, a view of what was encoded."""
    codes: bytes | memoryview
    """Likewise."""

    @property
    def pieces(self) -> tuple[bytes | memoryview, ...]:
        return self.head, self.scales, self.codes

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)
