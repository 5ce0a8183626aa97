"""The only place that touches the file system: the store's files, as paths under one root.

What the store may rely on, and tests take away otherwise: a write is on disk after `File.sync`, an entry of a
directory (a file made, renamed or removed) after `Files.sync_dir` of that directory, and a rename is all or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .errors import StateInUse

_IOV_MAX = min(1024, os.sysconf("SC_IOV_MAX"))
"""Buffers that one system call takes."""


class File(Protocol):
    """An open file. All methods raise OSError."""

    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes:
        """Less than `size` only at the end of the file."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill the buffer of bytes; returns how many there were."""

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        """All of the buffers, one after another. After an error any part of them may be written."""

    def truncate(self, size: int) -> None: ...

    def sync(self) -> None:
        """What was written is on disk when this returns. After an error nobody knows what is."""

    def close(self) -> None: ...


class Lock(Protocol):
    def release(self) -> None: ...


class Files(Protocol):
    """The files under a root; a path is relative to it, "" the root itself. All methods raise OSError."""

    @property
    def root(self) -> Path:
        """For messages, and for other programs to read from."""

    def open(self, path: str, *, create: bool = False) -> File:
        """For reading and writing. `create`: it must not exist."""

    def exists(self, path: str) -> bool: ...

    def size(self, path: str) -> int: ...

    def listdir(self, path: str) -> list[str]:
        """Sorted; none if there is no such directory."""

    def mkdir(self, path: str) -> None:
        """Nothing happens if it exists."""

    def rename(self, old: str, new: str) -> None: ...

    def remove(self, path: str) -> None:
        """A file, or an empty directory."""

    def sync_dir(self, path: str) -> None:
        """The directory's entries are on disk when this returns; ".." is the directory that holds the root."""

    def lock(self, path: str) -> Lock:
        """Held until released, or until this process ends. Raises StateInUse."""

    def free_bytes(self) -> int: ...


class OsFile:
    """A file of the operating system."""

    def __init__(self, path: Path, create: bool) -> None:
        self._fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        while len(data) < size:
            more = os.pread(self._fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        first = 0
        while first < len(views):
            count = os.pwritev(self._fd, views[first : first + _IOV_MAX], offset)
            if count == 0:
                raise OSError(errno.EIO, "nothing was written")
            offset += count
            while first < len(views) and count >= views[first].nbytes:
                count -= views[first].nbytes
                first += 1
            if count:
                views[first] = views[first][count:]

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        _sync(self._fd)
        _forget(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _forget(fd: int) -> None:
    """What was written is hardly read again. Its pages serve what is written next: on a virtual machine fresh ones may
    cost several times what the writing does. The last page stays, for what is appended to it."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            whole = os.fstat(fd).st_size // mmap.PAGESIZE * mmap.PAGESIZE
            if whole:
                os.posix_fadvise(fd, 0, whole, os.POSIX_FADV_DONTNEED)


def _sync(fd: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS, where fsync leaves the data in the drive's own cache
    if full is not None:
        fcntl.fcntl(fd, full)
    else:
        os.fsync(fd)


class OsLock:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        os.close(self._fd)


class OsFiles:
    """The files of a directory of the operating system, readable by their owner only."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    @property
    def root(self) -> Path:
        return self._root

    def open(self, path: str, *, create: bool = False) -> File:
        return OsFile(self._root / path, create)

    def exists(self, path: str) -> bool:
        return (self._root / path).exists()

    def size(self, path: str) -> int:
        return (self._root / path).stat().st_size

    def listdir(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self._root / path))
        except FileNotFoundError:
            return []

    def mkdir(self, path: str) -> None:
        (self._root / path).mkdir(mode=0o700, parents=not path, exist_ok=True)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._root / old, self._root / new)

    def remove(self, path: str) -> None:
        target = self._root / path
        if target.is_dir():
            target.rmdir()
        else:
            target.unlink()

    def sync_dir(self, path: str) -> None:
        fd = os.open(self._root / path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _sync(fd)
        finally:
            os.close(fd)

    def lock(self, path: str) -> Lock:
        fd = os.open(self._root / path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise StateInUse(
                f"another server (process {holder}) works in {self._root}; stop it first, or give this one its own "
                "--state-dir"
            ) from error
        except OSError:
            os.close(fd)
            raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return OsLock(fd)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free


def read_all(files: Files, path: str) -> bytes:
    file = files.open(path)
    try:
        return file.read(0, file.size())
    finally:
        file.close()


def write_atomically(files: Files, path: str, data: bytes) -> None:
    """After it returns, or is cut off, the file has its old content or the new.

    Which of them is certain only once its directory is synced.
    """
    temporary = f"{path}.tmp"
    if files.exists(temporary):
        files.remove(temporary)
    file = files.open(temporary, create=True)
    try:
        file.write(0, [data])
        file.sync()
    finally:
        file.close()
    files.rename(temporary, path)


def remove_tree(files: Files, path: str) -> None:
    """A directory of files, and no directories."""
    for name in files.listdir(path):
        files.remove(f"{path}/{name}")
    files.remove(path)
