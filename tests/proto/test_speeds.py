"""Which transfers tell of a link's speed, and what follows from it."""

from __future__ import annotations

from diloco_proto.codec import Format, worth_level
from diloco_proto.speeds import KEPT, KEPT_OF_MANY, LEAST_BYTES, Speeds


def test_of_each_link_the_fastest_of_the_last_long_transfers_counts() -> None:
    speeds = Speeds()
    assert speeds.slowest is None
    speeds.note(LEAST_BYTES - 1, 1.0)
    assert speeds.slowest is None
    for seconds in (1.0, 4.0, 2.0):
        speeds.note(2 * LEAST_BYTES, seconds)
    assert speeds.slowest == 2 * LEAST_BYTES
    speeds.note(2 * LEAST_BYTES, 8.0, "another")
    assert speeds.slowest == LEAST_BYTES / 4
    speeds.note(2 * LEAST_BYTES, 4.0, "another")
    assert speeds.slowest == LEAST_BYTES / 2
    for _ in range(KEPT):
        speeds.note(LEAST_BYTES, 0.01)
    assert speeds.slowest == 100 * LEAST_BYTES
    speeds.note(LEAST_BYTES, 0.0)


def test_among_many_links_none_is_forgotten() -> None:
    speeds = Speeds(KEPT_OF_MANY)
    for _ in range(10):
        speeds.note(LEAST_BYTES, 1.0, "slow")
        for number in range(63):
            speeds.note(LEAST_BYTES, 0.01, f"fast {number}")
        assert speeds.slowest == LEAST_BYTES


def test_compression_is_left_out_on_fast_links_only() -> None:
    for fmt in Format:
        assert worth_level(fmt, None) == worth_level(fmt, 10e6) is not None
        assert worth_level(fmt, 1e9) is None
