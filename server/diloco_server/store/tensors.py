"""Safetensors files, written a tensor at a time: the format's own writer wants all of them in memory.

    u64 bytes of the header · header: JSON, name -> {dtype, shape, data_offsets}, padded with spaces · data

Offsets count from the first byte of data, and the tensors fill it without holes. (huggingface.co/docs/safetensors)
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from .files import File

_LENGTH = struct.Struct("<Q")
_ALIGN = 64
_MAX_HEADER = 100_000_000
"""What other readers of the format take."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a float32 tensor lies in the data."""

    shape: tuple[int, ...]
    begin: int
    """Bytes from the first of the data."""

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


def pack_header(places: Mapping[str, Place], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The file up to its data: `room` bytes, or as many as it takes, in whole units of 64."""
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, place in places.items():
        offsets = [place.begin, place.begin + place.nbytes]
        content[name] = {"dtype": "F32", "shape": list(place.shape), "data_offsets": offsets}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    total = room or -(-(_LENGTH.size + len(text)) // _ALIGN) * _ALIGN
    assert _LENGTH.size + len(text) <= total
    return _LENGTH.pack(total - _LENGTH.size) + text.ljust(total - _LENGTH.size, b" ")


@dataclass(frozen=True, slots=True)
class Header:
    """As read."""

    places: dict[str, Place]
    metadata: dict[str, str]
    data: int
    """Offset of the data in the file."""


def read_header(file: File) -> Header:
    """Raises ValueError for what is no header, or holds tensors that are not float32 or lie outside of the file."""
    size = file.size()
    length = file.read(0, _LENGTH.size)
    if len(length) < _LENGTH.size:
        raise ValueError("the file is too short")
    (count,) = _LENGTH.unpack(length)
    data = _LENGTH.size + count
    if count > _MAX_HEADER or data > size:
        raise ValueError("its header is longer than the file")
    places = {}
    try:
        content = json.loads(file.read(_LENGTH.size, count))
        metadata = dict(content.pop("__metadata__", {}))
        for name, entry in content.items():
            begin, end = entry["data_offsets"]
            place = places[name] = Place(tuple(map(int, entry["shape"])), int(begin))
            if entry["dtype"] != "F32" or end - begin != place.nbytes or begin < 0 or data + end > size:
                raise ValueError(f"tensor {name!r} has an impossible place in it")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"its header cannot be read: {error!r}") from error
    return Header(places, metadata, data)
