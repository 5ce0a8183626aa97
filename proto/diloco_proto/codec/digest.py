"""The digest of a fragment's float32 values, by which server and workers make sure that they hold the same.

A sum over the blocks of 64 values, so that the digests of ranges can be added, whoever holds them:

    digest = sum over blocks b of mix(h_b + (b + 1) * 0x9E3779B97F4A7C15)                             mod 2^64
    h_b    = sum over j < 32 of ((v[j] + K[j]) mod 2^32) * ((v[j+32] + K[j+32]) mod 2^32)             mod 2^64

b counts from the beginning of the fragment, v are the block's float32 bits as uint32; h is NH of UMAC
(RFC 4418) and mix the finaliser of splitmix64 (Steele, Lea, Flood 2014):

    mix(z): z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) * 0x94D049BB133111EB;  z ^ z >> 31

The keys K[0..63] are the upper 32 bits of the first 64 outputs of splitmix64 with seed 0:
K[i] = mix((i + 1) * 0x9E3779B97F4A7C15) >> 32. The digest finds accidents, not forgeries: K is public.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from diloco_proto.codec.formats import BLOCK, Floats
from diloco_proto.codec.native import ADDRESS, INT64, UINT64, carray, kernel, pointer

GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
MIX_2: Final = np.uint64(0x94D049BB133111EB)


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, elementwise."""
    z = (z ^ z >> np.uint64(30)) * MIX_1
    z = (z ^ z >> np.uint64(27)) * MIX_2
    return z ^ z >> np.uint64(31)


KEYS: Final = (mix(np.arange(1, BLOCK + 1, dtype=np.uint64) * GAMMA) >> np.uint64(32)).astype(np.uint32)


def digest(x: Floats, first_block: int = 0) -> int:
    """The digest, in [0, 2^64), of float32[n], n a multiple of 64, that begins at block `first_block`."""
    assert x.dtype == np.float32
    assert x.size % BLOCK == 0
    assert x.flags.c_contiguous
    return int(sum_blocks(x.ctypes.data, x.size // BLOCK, first_block))


def digest_reference(x: Floats, first_block: int = 0) -> int:
    """The digest in plain numpy."""
    words = x.view(np.uint32).reshape(-1, BLOCK) + KEYS
    low, high = words[:, :32].astype(np.uint64), words[:, 32:].astype(np.uint64)
    blocks = np.arange(first_block + 1, first_block + 1 + len(words), dtype=np.uint64)
    return int(np.sum(mix(np.sum(low * high, axis=1, dtype=np.uint64) + blocks * GAMMA), dtype=np.uint64))


@kernel(UINT64, ADDRESS, INT64, INT64)
def sum_blocks(x_at: int, blocks: int, first_block: int) -> np.uint64:
    """The digest of `blocks` blocks."""
    words = carray(pointer(x_at), blocks * 64, np.uint32)
    total = np.uint64(0)
    for b in range(blocks):
        o = b * 64
        h = np.uint64(0)
        for j in range(32):
            low = np.uint32(words[o + j] + KEYS[j])
            high = np.uint32(words[o + j + 32] + KEYS[j + 32])
            h += np.uint64(low) * np.uint64(high)
        z = h + np.uint64(first_block + b + 1) * GAMMA
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
        total += z ^ (z >> np.uint64(31))
    return total
