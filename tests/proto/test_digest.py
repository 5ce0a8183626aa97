"""The digest: against numpy, additive over ranges, and awake to every change."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from codec_cases import vectors
from hypothesis import given
from hypothesis import strategies as st

from diloco_proto.codec import BLOCK, digest
from diloco_proto.codec.digest import KEYS, digest_reference
from diloco_proto.codec.formats import Floats


def splitmix64(count: int) -> list[int]:
    """The published generator, with seed 0."""
    state, mask, out = 0, 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        out.append(z ^ (z >> 31))
    return out


def test_keys_are_splitmix64() -> None:
    assert splitmix64(1) == [0xE220A8397B1DCDAF]  # the generator's published first output
    assert KEYS.tolist() == [z >> 32 for z in splitmix64(64)]


def by_the_formula(x: Floats, first_block: int) -> int:
    mask, total = 2**64 - 1, 0
    keys = KEYS.tolist()
    for b, block in enumerate(x.view(np.uint32).reshape(-1, BLOCK).tolist(), first_block):
        v = [(word + key) % 2**32 for word, key in zip(block, keys, strict=True)]
        z = sum(v[j] * v[j + 32] for j in range(32)) + (b + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        total += z ^ (z >> 31)
    return total & mask


@given(x=vectors(), first=st.one_of(st.integers(0, 5), st.integers(0, 2**32)))
def test_kernel_numpy_and_formula_agree(x: Floats, first: int) -> None:
    assert digest(x, first) == digest_reference(x, first) == by_the_formula(x, first)


def test_known_values() -> None:
    assert digest(np.empty(0, np.float32)) == 0
    assert digest(np.zeros(128, np.float32)) == 8922047414076231603


@given(x=vectors(max_blocks=6), data=st.data())
def test_digests_of_ranges_add_up(x: Floats, data: st.DataObject) -> None:
    blocks = x.size // BLOCK
    cuts = sorted({0, blocks, *data.draw(st.lists(st.integers(0, blocks), max_size=3))})
    parts = [digest(x[a * BLOCK : b * BLOCK], a) for a, b in pairwise(cuts)]
    assert sum(parts) % 2**64 == digest(x)


@pytest.mark.parametrize("fill", ["zeros", "normal"])
def test_every_bit_matters(fill: str) -> None:
    x = np.zeros(128, np.float32) if fill == "zeros" else np.random.default_rng(0).standard_normal(128).astype("f4")
    seen = {digest(x)}
    words = x.view(np.uint32)
    for i in range(words.size):
        for bit in range(32):
            words[i] ^= np.uint32(1 << bit)
            seen.add(digest(x))
            words[i] ^= np.uint32(1 << bit)
    assert len(seen) == 1 + words.size * 32


@given(x=vectors(max_blocks=4), data=st.data())
def test_the_order_of_blocks_and_values_matters(x: Floats, data: st.DataObject) -> None:
    rows = x.view(np.uint32).reshape(-1, BLOCK)
    a, b = (data.draw(st.integers(0, len(rows) - 1)) for _ in range(2))
    swapped = rows.copy()
    swapped[[a, b]] = swapped[[b, a]]
    if not np.array_equal(swapped, rows):
        assert digest(swapped.view(np.float32).ravel()) != digest(x)
    i, j = (data.draw(st.integers(0, BLOCK - 1)) for _ in range(2))
    moved = rows.copy()
    moved[a, [i, j]] = moved[a, [j, i]]
    if not np.array_equal(moved, rows):
        assert digest(moved.view(np.float32).ravel()) != digest(x)
