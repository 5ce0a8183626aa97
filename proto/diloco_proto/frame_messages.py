"""The messages that carry a frame, written and read by hand.

PushRequest and PullReply have it in field 2: on the wire the byte 0x12, a varint of the length, and the frame
(protobuf's encoding, section "Length-Delimited Records"). Protobuf would copy a frame when the message is made,
measured, serialized and parsed, and each time that the field is read; here it is copied once, into the message, and
read where it lies. All other messages, and frames in any other legal encoding, go through protobuf.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from . import outer_pb2 as pb
from .packed import Packed

FRAME_FIELD = 0x12

Data = bytes | bytearray | memoryview


class _Message(Protocol):
    def SerializeToString(self) -> bytes: ...  # noqa: N802


class _Carrier(Protocol):
    """A kind of message that may carry a frame."""

    @property
    def frame(self) -> bytes: ...
    def HasField(self, name: str) -> bool: ...  # noqa: N802


C = TypeVar("C", bound=_Carrier)


def frame_message(frame: Data | Packed) -> bytes:
    """The serialized PushRequest or PullReply of a frame."""
    return b"".join((_head(len(frame)), *(frame.pieces if isinstance(frame, Packed) else (frame,))))


def frame_message_bytes(frame_bytes: int) -> int:
    """The size of such a message, by that of its frame."""
    return len(_head(frame_bytes)) + frame_bytes


def read_push(data: bytes) -> pb.PushRequest | memoryview:
    """A push's message: the frame that it carries, or the message without one. Raises protobuf's DecodeError."""
    frame = _frame_of(data)
    return _parsed(pb.PushRequest.FromString(data)) if frame is None else frame


def read_pull(data: bytes) -> pb.PullReply | memoryview:
    """A pull's, likewise."""
    frame = _frame_of(data)
    return _parsed(pb.PullReply.FromString(data)) if frame is None else frame


def serialized(message: _Message | bytes) -> bytes:
    """A serializer for calls: what is bytes is serialized already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _parsed(message: C) -> C | memoryview:
    return memoryview(message.frame) if message.HasField("frame") else message


def _frame_of(data: bytes) -> memoryview | None:
    """The frame, if the message is as `frame_message` writes it; else protobuf has to say."""
    if not data or data[0] != FRAME_FIELD:
        return None
    length, shift = 0, 0
    for at in range(1, min(len(data), 6)):
        length |= (data[at] & 0x7F) << shift
        shift += 7
        if data[at] < 0x80:
            return memoryview(data)[at + 1 :] if at + 1 + length == len(data) else None
    return None


def _head(length: int) -> bytes:
    head = bytearray((FRAME_FIELD,))
    while length > 0x7F:
        head.append(0x80 | (length & 0x7F))
        length >>= 7
    head.append(length)
    return bytes(head)
