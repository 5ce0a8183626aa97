"""Buffers that come back by themselves."""

from __future__ import annotations

import gc
import threading

import numpy as np
import torch

from diloco_client.buffers import KEPT, Buffers


def address(values) -> int:
    return values.ctypes.data


def test_a_buffer_is_lent_again_once_no_view_of_it_is_left() -> None:
    buffers = Buffers()
    first = buffers.take(1000, pinned=False)
    assert (first.dtype, first.shape, first.flags.writeable) == (np.float32, (1000,), True)
    place, view = address(first), torch.from_numpy(first[100:200])
    del first
    second = buffers.take(1000, pinned=False)
    assert address(second) != place, "a view of it is in use"
    view.fill_(3)
    del view
    assert address(buffers.take(990, pinned=False)) == place, "a little smaller, as a fragment may be"


def test_no_more_than_two_wait_and_only_for_their_own_size() -> None:
    buffers = Buffers()
    lent = [buffers.take(1000, pinned=False) for _ in range(4)]
    lent.clear()
    assert len(buffers._spare) == KEPT
    assert len(buffers.take(100, pinned=False)) == 100
    assert buffers.take(0, pinned=False).size == 0
    assert len(buffers.take(2000, pinned=False)) == 2000


def test_loans_may_end_in_any_thread() -> None:
    buffers = Buffers()

    def use() -> None:
        for number in range(300):
            mine = buffers.take(1 << 12, pinned=False)
            mine[:] = number
            assert (mine == number).all()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert len(buffers._spare) == KEPT
