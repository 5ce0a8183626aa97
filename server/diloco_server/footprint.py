"""Keeps the daemon's memory what it uses. What is done for that is done on Linux with glibc."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_M_MMAP_THRESHOLD = -3

LARGE = 256 << 10
"""Bytes; blocks of that size and more, such as frames, go back to the system when they are freed."""

COMPILER = "llvmlite"
"""In the name of its library: the largest that is loaded, and idle once the kernels are."""


def return_large_blocks() -> None:
    """glibc raises its own threshold as soon as one such block is freed, and keeps the next ones: of a hundred
    megabytes of frames under way most would stay, scattered over the arenas of all threads."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE)


def check_fits(needed: int) -> None:
    """Raises MemoryError for more bytes than this machine has: that much zeroed memory is often given, and missed only
    when it is used."""
    try:
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return  # not told here
    if needed > present > 0:
        raise MemoryError(f"{needed} bytes, of {present}")


def put_compiler_away() -> None:
    """Let go of the pages of the compiler's library: code and constants, nothing that was ever written. Should it be
    needed again they come back from its file."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int
    try:
        described = Path("/proc/self/smaps").read_text()
    except OSError:
        return
    for start, end in _unwritten(described):
        madvise(start, end - start, mmap.MADV_DONTNEED)


def _unwritten(smaps: str) -> Iterator[tuple[int, int]]:
    """Where the library is mapped without the right to write, and each page is as it is in the file."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
        head, *fields = mapping.splitlines()
        bounds, rights, *_ = head.split()
        unwritten = any(re.fullmatch(r"Anonymous:\s+0 kB", f) for f in fields)
        if COMPILER in head.rpartition("/")[2] and "w" not in rights and unwritten:
            start, _, end = bounds.partition("-")
            yield int(start, 16), int(end, 16)
