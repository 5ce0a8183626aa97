"""Frames of a contribution come in one by one, from one stream or several, in any order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_proto.codec import BLOCK, Encoded, Format, decode_fragment, encode_fragment, pack_frames, read_frame
from diloco_proto.errors import InvalidContribution
from diloco_proto.manifest import Fragment, Manifest, Pattern, Role, TensorSpec, build_layout
from diloco_server.assembly import Assembly, Place, frame_places

BLOCKS = 3 * Format.FP32.spec.frame_blocks + 10
VALUES = np.random.default_rng(5).standard_normal(BLOCKS * BLOCK).astype(np.float32)


def fragment_of(blocks: int = BLOCKS) -> Fragment:
    manifest = Manifest((TensorSpec("w", (blocks * BLOCK,), "float32", Role.TRAINED),))
    return build_layout(manifest, 1, Pattern.STRIDED).fragments[0]


def encoded(first: int = 0, stop: int = BLOCKS, scale: float = 1.0) -> Encoded:
    return encode_fragment(Format.FP32, np.float32(scale) * VALUES[first * BLOCK : stop * BLOCK])


def stream(parts: list[tuple[int, int]], scale: float = 1.0) -> tuple[list[Place], list[bytes]]:
    """The places and frames of a stream that brings these parts (first block, blocks)."""
    frames = [f for first, n in parts for f in pack_frames(encoded(first, first + n, scale), first, level=None)]
    return frame_places(fragment_of(), Format.FP32, parts, [read_frame(f).checksum for f in frames]), frames


@settings(deadline=None, max_examples=25)
@given(st.sets(st.integers(1, BLOCKS - 1), max_size=3), st.randoms(use_true_random=False))
def test_parts_in_any_order_make_the_whole(cuts: set[int], random) -> None:
    bounds = [0, *sorted(cuts), BLOCKS]
    assembly = Assembly(fragment_of(), Format.FP32)
    arrivals = []
    for first, stop in pairwise(bounds):
        places, frames = stream([(first, stop - first)])
        assert assembly.claim(places)
        arrivals += zip(places, frames, strict=True)
    random.shuffle(arrivals)
    for place, frame in arrivals:
        assert not assembly.complete
        assembly.add(place, read_frame(frame))
    assert assembly.complete
    assert np.array_equal(decode_fragment(assembly.encoded()), VALUES)
    assert assembly.frames == {p.first_block: p.digest for p, _ in arrivals}


def test_one_stream_may_bring_several_parts() -> None:
    places, frames = stream([(0, 5), (100, BLOCKS - 100)])
    assert [(p.first_block, p.num_blocks) for p in places][:2] == [(0, 5), (100, Format.FP32.spec.frame_blocks)]
    assembly = Assembly(fragment_of(), Format.FP32)
    assert assembly.claim(places)
    for place, frame in zip(places, frames, strict=True):
        assembly.add(place, read_frame(frame))
    assert not assembly.complete, "blocks 5 to 100 are missing"


def test_a_stream_that_comes_again_sends_only_what_is_missing() -> None:
    places, frames = stream([(0, BLOCKS)])
    assembly = Assembly(fragment_of(), Format.FP32)
    assert assembly.claim(places)
    assert assembly.held(places) == []
    for i in (0, 2):
        assembly.add(places[i], read_frame(frames[i]))
    assert assembly.claim(places)
    assert assembly.held(places) == [0, 2]


def test_other_bytes_or_another_grid_are_not_taken_in() -> None:
    assembly = Assembly(fragment_of(), Format.FP32)
    assert assembly.claim(stream([(0, BLOCKS)])[0])
    assert not assembly.claim(stream([(0, BLOCKS)], scale=2.0)[0])
    assert not assembly.claim(stream([(7, 20)])[0])
    assert assembly.claim(stream([(0, BLOCKS)])[0]), "a refused claim changes nothing"


def test_a_frame_that_was_not_announced() -> None:
    places, frames = stream([(0, BLOCKS)])
    _, others = stream([(0, BLOCKS)], scale=2.0)
    assembly = Assembly(fragment_of(), Format.FP32)
    assert assembly.claim(places)
    with pytest.raises(InvalidContribution, match="the frame at block 0 is not the one announced"):
        assembly.add(places[0], read_frame(others[0]))
    with pytest.raises(InvalidContribution, match=r"expected fp32 blocks 0 to 4096, got fp32 4096 to 8192"):
        assembly.add(places[0], read_frame(frames[1]))
    bf16 = pack_frames(encode_fragment(Format.BF16, VALUES[: 4096 * BLOCK]))[0]
    with pytest.raises(InvalidContribution, match="got bf16"):
        assembly.add(places[0], read_frame(bf16))
    assert assembly.held(places) == []


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [(0, 0)],
        [(0, BLOCKS + 1)],
        [(BLOCKS, 1)],
        [(5, 5), (0, 5)],
        [(0, 6), (5, 5)],
        [(0, 5), (0, 5)],
        [(2**32 - 1, 2**32 - 1)],
    ],
)
def test_parts_that_cannot_be(parts: list[tuple[int, int]]) -> None:
    with pytest.raises(InvalidContribution, match="fragment 0"):
        frame_places(fragment_of(), Format.FP32, parts, [1] * len(parts))


@pytest.mark.parametrize("count", [0, 3, 5])
def test_as_many_digests_as_frames(count: int) -> None:
    with pytest.raises(InvalidContribution, match=f"make 4 frames, but {count} digests"):
        frame_places(fragment_of(), Format.FP32, [(0, BLOCKS)], [1] * count)
