"""Keeps the daemon's memory what it uses. What is done for that is done on Linux with glibc."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

LARGE = 8 << 20
"""Bytes; blocks of that size and more go back to the system when they are freed. Frames are below."""

SPARE = 4 << 20
"""Bytes of freed memory that an arena may keep at its end."""

COMPILER = "llvmlite"
"""In the name of its library: the largest that is loaded, and idle once the kernels are."""


def reuse_blocks() -> None:
    """Frames come and go by the thousand: taken from the system each time and given back, their pages would cost ten
    times what it takes to copy them (docs/log.md). So they are kept for the next, until `give_back`."""
    if (mallopt := _libc("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, SPARE)


def give_back() -> None:
    """Give the system what is free by now, of all threads' arenas: after a round most of what its frames took."""
    if (malloc_trim := _libc("malloc_trim")) is not None:
        malloc_trim(0)


def _libc(name: str) -> Any:
    """A function of glibc's, if that is there."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


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
