"""What can be wrong with somebody else's data: values that no format holds, bytes that are no frame."""

from __future__ import annotations


class UnencodableValue(ValueError):
    """A value is NaN, infinite or of magnitude 2^126 or more; `index` is its place in the flat array."""

    def __init__(self, index: int) -> None:
        super().__init__(f"value {index} is NaN, infinite, or of magnitude 2^126 or more")
        self.index = index


class CorruptFrame(ValueError):
    """Bytes that are not a frame, or a frame whose scales or codes are not legal in its format."""
