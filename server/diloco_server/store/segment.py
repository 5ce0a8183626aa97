"""The format of a segment, a file of the journal.

    header    magic 8 · format version u32 · 0 u32 · number u64 · end of the previous segment u64 · nonce 16 · 0 u64
              · xxh3 u64
    record    mark u32 · kind u32 · bytes of the message u32 · bytes of the blob u32 · xxh3 u64 · message · blob

Integers are little-endian. A record's checksum covers the segment's nonce, the record's offset, the first 16 bytes of
its head, message and blob: what lies in another place, or in a segment of which these bytes were once a part, does not
verify.

A header is on disk before the segment has its first record, and all of the previous segment before that. A record of
kind BARRIER begins the first write after a sync: all before it was on disk. It can be found by a search, since nobody
outside knows the nonce. So what does not verify and lies before a barrier, or before the end that the next segment
names, was damaged later; what lies after the last barrier may be a write that a crash cut off.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from .errors import StateMismatch
from .files import File, Files

FORMAT_VERSION = 1
HEADER_BYTES = 64
RECORD = 1
BARRIER = 2

_MAGIC = b"DILOCOJ\0"
_HEADER = struct.Struct("<8sIIQQ16sQ")
_MARK = 0x4452_4C44
_HEAD = struct.Struct("<IIII")
_WHERE = struct.Struct("<16sQ")
_SUM = struct.Struct("<Q")
HEAD_BYTES = _HEAD.size + _SUM.size
_BARRIER_MARK = b"\xb7BARRIER"
_SCAN = 1 << 20

MAX_BYTES = 1 << 26
"""Bytes of a message or a blob; a length beyond is damage."""


@dataclass(frozen=True, slots=True)
class Header:
    """Of a segment."""

    number: int
    previous_end: int
    """Bytes of the previous segment that count; what lies beyond was cut."""
    nonce: bytes

    @classmethod
    def fresh(cls, number: int, previous_end: int) -> Header:
        return cls(number, previous_end, secrets.token_bytes(16))

    def pack(self) -> bytes:
        body = _HEADER.pack(_MAGIC, FORMAT_VERSION, 0, self.number, self.previous_end, self.nonce, 0)
        return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))

    @classmethod
    def unpack(cls, data: bytes, number: int) -> Header | None:
        """None if it does not verify. Raises StateMismatch for a newer format."""
        if len(data) < HEADER_BYTES or _SUM.unpack_from(data, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(
            data[: _HEADER.size]
        ):
            return None
        magic, version, _, own, previous_end, nonce, _ = _HEADER.unpack_from(data)
        if magic == _MAGIC and version > FORMAT_VERSION:
            raise StateMismatch(
                f"the journal has format {version}, this version of diloco knows {FORMAT_VERSION}: install a newer one"
            )
        return cls(own, previous_end, nonce) if magic == _MAGIC and own == number else None


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as read."""

    kind: int
    message: bytes
    blob: memoryview
    end: int
    """Offset of the next one."""


JOURNAL = "journal"


def path_of(number: int, directory: str = JOURNAL) -> str:
    return f"{directory}/{number:08d}.log"


def numbers(files: Files, directory: str = JOURNAL) -> list[int]:
    """The segments there are, in order."""
    names = (name.removesuffix(".log") for name in files.listdir(directory) if name.endswith(".log"))
    return sorted(int(name) for name in names if name.isdecimal())


def pack_head(header: Header, offset: int, kind: int, message: bytes, blob: bytes | memoryview) -> bytes:
    """What goes before message and blob, if the record is written at `offset`."""
    head = _HEAD.pack(_MARK, kind, len(message), len(blob))
    return head + _SUM.pack(_checksum(header, offset, head, message, blob))


def pack_barrier(header: Header, offset: int) -> bytes:
    """A whole record: all of the segment before `offset` is on disk."""
    message = _BARRIER_MARK + header.nonce
    return pack_head(header, offset, BARRIER, message, b"") + message


def _checksum(header: Header, offset: int, head: bytes, message: bytes, blob: bytes | memoryview) -> int:
    state = xxhash.xxh3_64(_WHERE.pack(header.nonce, offset) + head + message)
    state.update(blob)
    return state.intdigest()


def read_entry(file: File, header: Header, offset: int, end: int) -> Entry | None:
    """The record at `offset` of a segment of `end` bytes; None if nothing verifies there."""
    head = file.read(offset, HEAD_BYTES) if offset + HEAD_BYTES <= end else b""
    if len(head) < HEAD_BYTES:
        return None
    mark, kind, message_bytes, blob_bytes = _HEAD.unpack_from(head)
    after = offset + HEAD_BYTES + message_bytes + blob_bytes
    if mark != _MARK or max(message_bytes, blob_bytes) > MAX_BYTES or after > end:
        return None
    body = file.read(offset + HEAD_BYTES, message_bytes + blob_bytes)
    message, blob = body[:message_bytes], memoryview(body)[message_bytes:]
    expected = _SUM.unpack_from(head, _HEAD.size)[0]
    if len(body) < message_bytes + blob_bytes or expected != _checksum(
        header, offset, head[: _HEAD.size], message, blob
    ):
        return None
    return Entry(kind, message, blob, after)


def find_barrier(file: File, header: Header, start: int, end: int) -> int | None:
    """Offset of a barrier at `start` or later that verifies; None if there is none."""
    needle = _BARRIER_MARK + header.nonce
    for base in range(start, end, _SCAN):
        window = file.read(base, min(_SCAN + HEAD_BYTES + len(needle), end - base))
        for found in _all(window, needle):
            offset = base + found - HEAD_BYTES
            if offset >= start:
                entry = read_entry(file, header, offset, end)
                if entry is not None and entry.kind == BARRIER:
                    return offset
    return None


def _all(text: bytes, needle: bytes) -> Iterator[int]:
    found = text.find(needle)
    while found >= 0:
        yield found
        found = text.find(needle, found + 1)
