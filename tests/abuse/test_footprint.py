"""What the daemon does to stay small."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diloco_server.footprint import _unwritten, check_fits

SMAPS = """\
7f0000000000-7f0000001000 r-xp 00000000 fe:00 7 /x/llvmlite/binding/libllvmlite.so
Rss:                   4 kB
Anonymous:             0 kB
7f0000001000-7f0000002000 r--p 00001000 fe:00 7 /x/llvmlite/binding/libllvmlite.so
Anonymous:             4 kB
7f0000002000-7f0000003000 rw-p 00002000 fe:00 7 /x/llvmlite/binding/libllvmlite.so
Anonymous:             0 kB
7f0000003000-7f0000004000 r-xp 00000000 fe:00 8 /usr/lib/libc.so.6
Anonymous:             0 kB
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
Anonymous:             0 kB
"""


def test_only_pages_that_are_as_in_the_file_are_let_go() -> None:
    assert list(_unwritten(SMAPS)) == [(0x7F0000000000, 0x7F0000001000)]


def test_the_compiler_works_after_it_was_put_away() -> None:
    code = (
        "import numba; from diloco_server.footprint import give_back, put_compiler_away, reuse_blocks; "
        "reuse_blocks(); numba.njit(lambda x: x + 1)(1); put_compiler_away(); give_back(); "
        "print(numba.njit(lambda x: x * 3)(14))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "42\n"


def test_more_than_the_machine_has_does_not_fit() -> None:
    check_fits(1 << 20)
    with pytest.raises(MemoryError):
        check_fits(1 << 70)
