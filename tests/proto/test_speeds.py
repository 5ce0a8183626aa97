"""Which transfers tell of a link's speed, and what follows from it."""

from __future__ import annotations

from diloco_proto.codec import Format, worth_level
from diloco_proto.speeds import KEPT, LEAST_BYTES, Speeds


def test_the_last_long_transfers_count() -> None:
    speeds = Speeds()
    assert speeds.slowest is speeds.fastest is None
    speeds.note(LEAST_BYTES - 1, 1.0)
    assert speeds.slowest is speeds.fastest is None
    for seconds in (1.0, 4.0, 2.0):
        speeds.note(2 * LEAST_BYTES, seconds)
    assert (speeds.slowest, speeds.fastest) == (LEAST_BYTES / 2, 2 * LEAST_BYTES)
    for _ in range(KEPT):
        speeds.note(LEAST_BYTES, 0.01)
    assert speeds.slowest == speeds.fastest == 100 * LEAST_BYTES
    speeds.note(LEAST_BYTES, 0.0)


def test_compression_is_left_out_on_fast_links_only() -> None:
    for fmt in Format:
        assert worth_level(fmt, None) == worth_level(fmt, 10e6) is not None
        assert worth_level(fmt, 1e9) is None
