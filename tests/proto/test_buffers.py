"""Buffers that come back by themselves."""

from __future__ import annotations

import gc
import threading

import numpy as np

from diloco_proto.buffers import Buffers
from diloco_proto.codec import Format


def address(values) -> int:
    return values.ctypes.data


def test_a_buffer_is_lent_again_once_no_view_of_it_is_left() -> None:
    buffers = Buffers(2)
    first = buffers.floats(100_000)
    assert (first.dtype, first.shape, first.flags.writeable) == (np.float32, (100_000,), True)
    place, view = address(first), first[100:200]
    del first
    second = buffers.floats(100_000)
    assert address(second) != place, "a view of it is in use"
    view[:] = 3
    del view
    assert address(buffers.floats(99_000)) == place, "a little smaller, as a fragment may be"


def test_no_more_wait_than_were_asked_for_and_only_for_their_own_size() -> None:
    buffers = Buffers(2)
    lent = [buffers.take(100_000) for _ in range(4)]
    lent.clear()
    assert len(buffers._spare) == 2
    assert len(buffers.take(100)) == 100
    assert buffers.take(0).size == 0
    assert len(buffers.take(200_000)) == 200_000


def test_of_encoded_blocks() -> None:
    encoded = Buffers(2).encoded(Format.INT4, 1000)
    assert (encoded.scales.size, encoded.codes.size, encoded.num_blocks) == (1000, 32_000, 1000)
    assert Buffers(2).encoded(Format.FP32, 10).scales.size == 0


def test_loans_may_end_in_any_thread() -> None:
    buffers = Buffers(3)

    def use() -> None:
        for number in range(300):
            mine = buffers.take(1 << 14)
            mine[:] = number % 251
            assert (mine == number % 251).all()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert 1 <= len(buffers._spare) <= 3
