"""Frames: what is packed comes back, and nothing else gets through."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
import zstandard
from codec_cases import vectors
from hypothesis import given
from hypothesis import strategies as st

from diloco_proto.codec import (
    CorruptFrame,
    Encoded,
    Format,
    Frame,
    contribution_digest,
    encode_fragment,
    frame_checksum,
    is_intact,
    pack_frames,
    read_frame,
    worth_level,
)
from diloco_proto.codec.frames import HEADER_BYTES

FORMATS = pytest.mark.parametrize("fmt", list(Format), ids=lambda f: f.label)


def gaussian(fmt: Format, blocks: int, seed: int = 0) -> Encoded:
    return encode_fragment(fmt, np.random.default_rng(seed).standard_normal(blocks * 64, np.float32))


def reseal(frame: bytes | bytearray) -> bytes:
    """The frame with the checksum that its bytes should have, so that other checks must find what is wrong."""
    checksum = xxhash.xxh3_64_intdigest(bytes(frame[:24]) + bytes(frame[32:]))
    return bytes(frame[:24]) + struct.pack("<Q", checksum) + bytes(frame[32:])


def patched(frame: bytes, offset: int, layout: str, value: int) -> bytes:
    data = bytearray(frame)
    struct.pack_into(layout, data, offset, value)
    return reseal(data)


def build(fmt: Format, blocks: int, flags: int, scales: bytes, codes: bytes) -> bytes:
    """A sealed frame with any body."""
    head = struct.pack("<4sBBHIIII", b"DLF1", fmt, flags, 0, 0, blocks, len(scales), len(codes))
    return reseal(head + bytes(8) + scales + codes)


@FORMATS
@given(x=vectors(), first=st.integers(0, 2**32 - 3), level=st.sampled_from([None, 1, -5, 3]))
def test_round_trip(fmt: Format, x: np.ndarray, first: int, level: int | None) -> None:
    encoded = encode_fragment(fmt, x)
    (data,) = pack_frames(encoded, first, level)
    frame = read_frame(data)
    assert (frame.format, frame.first_block, frame.num_blocks) == (fmt, first, encoded.num_blocks)
    assert np.array_equal(frame.scales, encoded.scales)
    assert np.array_equal(frame.codes, encoded.codes)
    assert frame.checksum == frame_checksum(data) == contribution_digest([data]) == contribution_digest([frame])
    assert len(data) <= HEADER_BYTES + encoded.nbytes


@FORMATS
def test_frames_lie_on_the_grid(fmt: Format) -> None:
    limit = fmt.spec.frame_blocks
    encoded = Encoded(
        fmt,
        np.zeros((2 * limit + 3) * fmt.spec.scale_bytes, np.uint8),
        np.zeros((2 * limit + 3) * fmt.spec.code_bytes, np.uint8),
    )
    frames = [read_frame(f) for f in pack_frames(encoded, first_block=7)]
    assert [(f.first_block, f.num_blocks) for f in frames] == [(7, limit), (7 + limit, limit), (7 + 2 * limit, 3)]
    assert pack_frames(Encoded(fmt, encoded.scales[:0], encoded.codes[:0])) == []


def test_the_header_is_as_documented() -> None:
    encoded = gaussian(Format.INT4, 3)
    (data,) = pack_frames(encoded, 5, level=None)
    assert data[:24] == b"DLF1" + bytes([4, 0, 0, 0]) + struct.pack("<IIII", 5, 3, 3, 96)
    assert data[24:32] == struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:24] + data[32:]))
    assert data[32:] == encoded.scales.tobytes() + encoded.codes.tobytes()


def test_sections_are_compressed_apart_and_only_where_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 64 * 64).astype(np.int8)
    noise[noise == -128] = 0
    encoded = Encoded(Format.INT8, np.full(64, 127, np.uint8), noise.view(np.uint8))
    (data,) = pack_frames(encoded)
    assert data[5] == 1  # scales compressed, codes not
    encoded = Encoded(Format.INT8, np.arange(100, 164, dtype=np.uint8), np.zeros(64 * 64, np.uint8))
    (data,) = pack_frames(encoded)
    assert data[5] == 2
    assert np.array_equal(read_frame(data).scales, encoded.scales)


@pytest.mark.parametrize(("fmt", "width"), [(Format.FP32, 4), (Format.BF16, 2)], ids=["fp32", "bf16"])
def test_floats_are_compressed_in_planes(fmt: Format, width: int) -> None:
    encoded = gaussian(fmt, 4096)
    (data,) = pack_frames(encoded)
    assert data[5] == 2
    planes = np.frombuffer(zstandard.decompress(data[HEADER_BYTES:]), np.uint8).reshape(width, -1)
    for significance in range(width):
        assert np.array_equal(planes[significance], encoded.codes[significance::width])
    assert np.array_equal(read_frame(data).codes, encoded.codes)
    apart = sum(_entropy(plane) for plane in planes)
    assert 8 * len(data) / (4096 * 64) < 1.03 * apart


def _entropy(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / symbols.size
    return float(-(shares * np.log2(shares)).sum())


def test_an_intact_frame_is_not_summed_again() -> None:
    (data,) = pack_frames(gaussian(Format.INT4, 4), level=None)
    broken = bytearray(data)
    broken[-1] ^= 0x10
    assert not is_intact(broken)
    with pytest.raises(CorruptFrame, match="checksum"):
        read_frame(broken)
    assert read_frame(broken, intact=True).codes[-1] != read_frame(data).codes[-1]
    assert read_frame(data, intact=True).checksum == read_frame(data).checksum


@FORMATS
def test_fast_links_get_no_compression(fmt: Format) -> None:
    assert worth_level(fmt, None) == worth_level(fmt, 1e6) == 1
    assert worth_level(fmt, 1e9) is None


def test_what_was_not_compressed_is_not_copied() -> None:
    (data,) = pack_frames(gaussian(Format.E3M0, 8), level=None)
    frame = read_frame(data)
    raw = np.frombuffer(data, np.uint8)
    assert np.shares_memory(frame.codes, raw)
    assert np.shares_memory(frame.scales, raw)
    assert frame.encoded.num_blocks == 8


@pytest.mark.parametrize("level", [None, 1])
def test_every_changed_byte_is_noticed(level: int | None) -> None:
    (data,) = pack_frames(gaussian(Format.INT3, 4), level=level)
    assert bool(data[5]) == (level is not None)
    for i in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            broken = bytearray(data)
            broken[i] ^= flip
            with pytest.raises(CorruptFrame):
                read_frame(broken)


def test_truncated_and_extended_frames_are_noticed() -> None:
    (data,) = pack_frames(gaussian(Format.INT4, 2))
    for length in range(len(data)):
        with pytest.raises(CorruptFrame):
            read_frame(data[:length])
    with pytest.raises(CorruptFrame, match=r"has \d+ bytes, its header says"):
        read_frame(data + b"\0")


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (0, "<B", ord("E"), "begins with b'ELF1'"),
        (4, "<B", 0, "unknown format 0"),
        (4, "<B", 10, "unknown format 10"),
        (5, "<B", 4, "unknown flags 0x4"),
        (5, "<B", 1, "compressed scales"),
        (5, "<B", 2, "compressed codes"),
        (6, "<H", 1, "reserved"),
        (8, "<I", 2**32 - 1, "beyond 2\\^32"),
        (12, "<I", 0, "0 blocks"),
        (12, "<I", 3, "stores 2 bytes of scales, needs 3"),
        (12, "<I", 2**15 + 1, "allows 1 to 32768"),
        (4, "<B", 8, "needs 32"),
        (16, "<I", 3, "header says"),
        (20, "<I", 2**32 - 1, "header says"),
    ],
)
def test_lying_headers(offset: int, layout: str, value: int, message: str) -> None:
    (data,) = pack_frames(gaussian(Format.INT4, 2), level=None)
    with pytest.raises(CorruptFrame, match=message):
        read_frame(patched(data, offset, layout, value))


def test_sections_that_trade_bytes_are_noticed() -> None:
    (data,) = pack_frames(gaussian(Format.INT4, 2), level=None)
    moved = patched(patched(data, 16, "<I", 3), 20, "<I", 63)
    with pytest.raises(CorruptFrame, match="stores 3 bytes of scales, needs 2"):
        read_frame(moved)


def test_zstd_bombs_are_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = bytes(1 << 24)
    bomb = zstandard.ZstdCompressor().compress(zeros)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(zeros)
    assert len(bomb) < 1 << 12
    blocks = Format.INT4.spec.frame_blocks

    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("decompressed")

    monkeypatch.setattr("diloco_proto.codec.frames.zstandard.ZstdDecompressor", never)
    for body in (bomb, silent):
        with pytest.raises(CorruptFrame, match=r"declares \d+ bytes, needs 1048576"):
            read_frame(build(Format.INT4, blocks, 2, bytes(blocks), body))


@pytest.mark.parametrize("spoil", ["other size", "two frames", "cut", "no frame", "checksum of zstd"])
def test_zstd_sections_that_do_not_hold_what_they_say(spoil: str) -> None:
    codes = bytes(64 * 32)
    compressor = zstandard.ZstdCompressor(write_checksum=spoil == "checksum of zstd")
    body = compressor.compress(codes)
    if spoil == "other size":  # the header of one frame on the block of a shorter one
        shorter = compressor.compress(codes[:-32])
        size = zstandard.frame_header_size(body)
        body = body[:size] + shorter[zstandard.frame_header_size(shorter) :]
    elif spoil == "two frames":
        body += compressor.compress(codes)
    elif spoil == "cut":
        body = body[:-1]
    elif spoil == "no frame":
        body = b"\x28\xb5\x2f\xfd"
    else:
        body = body[:-1] + bytes([body[-1] ^ 1])
    with pytest.raises(CorruptFrame, match="zstd frame of codes"):
        read_frame(build(Format.INT4, 64, 2, bytes(64), body))


def test_illegal_scales_and_codes_do_not_get_through() -> None:
    scales = np.full(2, Format.INT4.spec.max_scale + 1, np.uint8).tobytes()
    with pytest.raises(CorruptFrame, match="scale byte 252"):
        read_frame(build(Format.INT4, 2, 0, scales, bytes(64)))
    with pytest.raises(CorruptFrame, match="fp32 codes"):
        read_frame(build(Format.FP32, 1, 0, b"", np.full(64, np.inf, "<f4").tobytes()))
    with pytest.raises(CorruptFrame, match="ternary codes"):
        read_frame(build(Format.TERNARY, 2, 0, b"\x7f\x7f", bytes(31) + b"\x80"))


def test_digest_of_a_contribution_is_the_sum_over_its_parts() -> None:
    encoded = gaussian(Format.INT4, 10)
    spec = Format.INT4.spec
    parts = []
    for first, last in ((0, 4), (4, 10)):
        part = Encoded(
            Format.INT4, encoded.scales[first:last], encoded.codes[first * spec.code_bytes : last * spec.code_bytes]
        )
        parts.append(pack_frames(part, first))
    assert contribution_digest(parts[0] + parts[1]) == sum(map(contribution_digest, parts)) % 2**64
    assert contribution_digest(parts[1] + parts[0]) == contribution_digest(parts[0] + parts[1])
    assert contribution_digest([]) == 0
    with pytest.raises(CorruptFrame):
        contribution_digest([b"short"])


def test_frames_are_read_from_any_buffer() -> None:
    (data,) = pack_frames(gaussian(Format.FP32, 2), level=None)
    padded = bytearray(b"x" + data)
    frames: list[Frame] = [read_frame(buffer) for buffer in (data, bytearray(data), memoryview(padded)[1:])]
    assert len({f.checksum for f in frames}) == 1
    assert all(np.array_equal(f.codes, frames[0].codes) for f in frames)
