"""Frames written and read by hand, against protobuf."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Format, encode_fragment, frame_blocks, frame_checksum, pack, pack_frames
from diloco_proto.frame_messages import frame_message, frame_message_bytes, read_pull, read_push, serialized

SIZES = [0, 1, 127, 128, 16383, 16384, 1 << 20, (1 << 21) - 1, 1 << 21]


@pytest.mark.parametrize("size", SIZES)
def test_a_message_is_the_one_that_protobuf_writes(size: int) -> None:
    frame = bytes(range(256)) * (size // 256) + bytes(size % 256)
    message = frame_message(frame)
    assert message == pb.PushRequest(frame=frame).SerializeToString() == pb.PullReply(frame=frame).SerializeToString()
    assert len(message) == frame_message_bytes(size)
    assert read_push(message) == read_pull(message) == frame
    assert frame_message(memoryview(frame)) == message


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("fmt", list(Format), ids=lambda f: f.label)
def test_a_frame_goes_from_what_was_encoded_into_its_message(fmt: Format, level: int | None) -> None:
    blocks = fmt.spec.frame_blocks + 3
    encoded = encode_fragment(fmt, np.random.default_rng(0).standard_normal(blocks * BLOCK, dtype=np.float32))
    packed, data = pack(encoded, 5, level), pack_frames(encoded, 5, level)
    assert [bytes(p) for p in packed] == data
    assert [len(p) for p in packed] == [len(d) for d in data]
    assert [frame_message(p) for p in packed] == [frame_message(d) for d in data]
    for read in (frame_blocks, frame_checksum):
        assert [read(p) for p in packed] == [read(d) for d in data]
    if level is None:
        assert all(np.shares_memory(np.frombuffer(p.codes, np.uint8), encoded.codes) for p in packed)


@pytest.mark.parametrize("message", [pb.PushRequest(header=pb.PushHeader(fragment=3)), pb.PushRequest()])
def test_a_message_without_a_frame_is_a_message(message: pb.PushRequest) -> None:
    assert read_push(message.SerializeToString()) == message
    assert serialized(message) == message.SerializeToString()
    assert serialized(b"as it is") == b"as it is"


@given(st.binary(max_size=40), st.booleans())
def test_whatever_arrives_is_read_as_protobuf_reads_it(data: bytes, framed: bool) -> None:
    data = b"\x12" + data if framed else data
    for read, kind in ((read_push, pb.PushRequest), (read_pull, pb.PullReply)):
        try:
            message = kind.FromString(data)
        except DecodeError:
            with pytest.raises(DecodeError):
                read(data)
        else:
            assert read(data) == (message.frame if message.HasField("frame") else message)
