"""Files in memory that lose whatever POSIX allows to be lost.

A write is certain only after a sync of its file, an entry of a directory only after a sync of the directory. Of all
else a power loss keeps a random part: of each write nothing, everything or any range of it, whatever became of those
before it; of each entry made, renamed or removed either the old state or the new. A kill keeps all.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from diloco_server.store.files import File, Lock

_BETWEEN = ("_sync", "<lambda>")
"""Functions that only pass a sync on."""


class Inode:
    """A file: what is on disk, what a reader sees, and the writes between them."""

    def __init__(self, content: bytes = b"") -> None:
        self.disk = bytearray(content)
        self.seen = bytearray(content)
        self.pending: list[tuple[int, bytes | None]] = []
        """Writes (offset, data) and truncations (size, None)."""

    def change(self, offset: int, data: bytes | None) -> None:
        _apply(self.seen, offset, data)
        self.pending.append((offset, data))

    def sync(self) -> None:
        for offset, data in self.pending:
            _apply(self.disk, offset, data)
        self.pending.clear()

    def copy(self) -> Inode:
        twin = Inode()
        twin.disk, twin.seen, twin.pending = bytearray(self.disk), bytearray(self.seen), list(self.pending)
        return twin

    def survivor(self, random: Random) -> Inode:
        content = bytearray(self.disk)
        for offset, data in random.sample(self.pending, len(self.pending)):
            fate = random.random()
            if fate < 0.3:
                continue
            if fate < 0.4 and data is not None:  # its length, without its content
                _apply(content, max(len(content), offset + len(data)), b"")
                continue
            if fate < 0.65 and data:
                begin = random.randrange(len(data)) if fate < 0.5 else 0
                end = random.randint(begin, len(data))
                offset, data = offset + begin, data[begin:end]
            _apply(content, offset, data)
        return Inode(bytes(content))


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    if data is None:
        del content[offset:]
    else:
        content[offset : offset + len(data)] = data


class Directory:
    """Likewise, with entries. A pending change belongs to a rename into another directory if they have the same tag."""

    def __init__(self) -> None:
        self.disk: dict[str, Node] = {}
        self.seen: dict[str, Node] = {}
        self.pending: list[tuple[object, dict[str, Node | None]]] = []

    def change(self, entries: dict[str, Node | None], tag: object = None) -> None:
        _set(self.seen, entries)
        self.pending.append((tag if tag is not None else object(), entries))

    def sync(self) -> None:
        self.disk = dict(self.seen)
        self.pending.clear()


Node = Inode | Directory


def _set(entries: dict[str, Node], changes: dict[str, Node | None]) -> None:
    for name, node in changes.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class FaultyFile:
    def __init__(self, files: FaultyFiles, path: str, inode: Inode) -> None:
        self._files, self._path, self._inode = files, path, inode

    def size(self) -> int:
        return len(self._inode.seen)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._inode.seen[offset : offset + size])

    def read_into(self, offset: int, buffer: memoryview) -> int:
        data = self.read(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        data = b"".join(buffers)
        try:
            self._files.operation("write", self._path)
        except OSError as error:
            part = data[: len(data) * 2 // 3]
            if error.errno == errno.ENOSPC and part:
                self._inode.change(offset, part)
            raise
        self._inode.change(offset, data)

    def truncate(self, size: int) -> None:
        self._files.operation("truncate", self._path)
        self._inode.change(size, None)

    def sync(self) -> None:
        try:
            self._files.operation("sync", self._path)
        except OSError:
            self._inode.pending.clear()  # the system takes for written what is not
            raise
        if self._files.syncs("file", self._path):
            self._inode.sync()

    def close(self) -> None:
        pass


class NoLock:
    def release(self) -> None:
        pass


class FaultyFiles:
    """See the module. `on_operation(name, path)` is called before each change and may raise; of a sync whose site is in
    `switched_off` nothing happens."""

    def __init__(
        self,
        *,
        on_operation: Callable[[str, str], None] | None = None,
        switched_off: frozenset[str] = frozenset(),
    ) -> None:
        self.on_operation = on_operation
        self.switched_off = switched_off
        self.sites: set[str] = set()
        """Where in the code a sync was called for."""
        self.world = Directory()

    # -- crashes --

    def kill(self) -> FaultyFiles:
        """What another process finds after this one was killed."""
        memo: dict[int, Any] = {}

        def copy(node: Node) -> Node:
            if id(node) not in memo:
                if isinstance(node, Inode):
                    memo[id(node)] = node.copy()
                else:
                    twin = memo[id(node)] = Directory()
                    twin.disk = {name: copy(child) for name, child in node.disk.items()}
                    twin.seen = {name: copy(child) for name, child in node.seen.items()}
                    twin.pending = [
                        (tag, {name: child and copy(child) for name, child in entries.items()})
                        for tag, entries in node.pending
                    ]
            return memo[id(node)]

        return self._image(copy(self.world))

    def power_loss(self, random: Random) -> FaultyFiles:
        """What is found after the power failed."""
        memo: dict[int, Any] = {}
        coins: dict[object, bool] = {}

        def survivor(node: Node) -> Node:
            if id(node) not in memo:
                if isinstance(node, Inode):
                    memo[id(node)] = node.survivor(random)
                else:
                    entries = dict(node.disk)
                    for tag, changes in node.pending:
                        if coins.setdefault(tag, random.random() < 0.5):
                            _set(entries, changes)
                    twin = memo[id(node)] = Directory()
                    twin.seen = {name: survivor(child) for name, child in entries.items()}
                    twin.disk = dict(twin.seen)
            return memo[id(node)]

        return self._image(survivor(self.world))

    def settle(self) -> None:
        """All that was done so far reaches the disk."""

        def walk(node: Node) -> None:
            node.sync()
            for child in node.seen.values() if isinstance(node, Directory) else ():
                walk(child)

        walk(self.world)

    def _image(self, world: Node) -> FaultyFiles:
        image = FaultyFiles(switched_off=self.switched_off)
        assert isinstance(world, Directory)
        image.world, image.sites = world, self.sites
        return image

    def operation(self, name: str, path: str) -> None:
        if self.on_operation is not None:
            self.on_operation(name, path)

    def syncs(self, kind: str, path: str) -> bool:
        """Whether this call of the code is not switched off."""
        frame = sys._getframe(2)
        while frame.f_code.co_name in _BETWEEN:
            assert frame.f_back is not None
            frame = frame.f_back
        where = frame.f_code.co_qualname
        site = f"{where}: {kind} {re.sub('[0-9]+', 'N', path.rpartition('/')[2]) or 'root'}"
        self.sites.add(site)
        return site not in self.switched_off

    # -- Files --

    @property
    def root(self) -> Path:
        return Path("/faulty")

    def _locate(self, path: str) -> tuple[Directory, str]:
        *parents, name = ["state", *path.split("/")] if path else ["state"]
        directory = self.world
        for part in parents:
            node = directory.seen.get(part)
            if not isinstance(node, Directory):
                raise _error(errno.ENOENT)
            directory = node
        return directory, name

    def _node(self, path: str) -> Node | None:
        try:
            directory, name = self._locate(path)
        except FileNotFoundError:
            return None
        return directory.seen.get(name)

    def _directory(self, path: str) -> Directory | None:
        node = self.world if path == ".." else self._node(path)
        return node if isinstance(node, Directory) else None

    def open(self, path: str, *, create: bool = False) -> File:
        directory, name = self._locate(path)
        inode = directory.seen.get(name)
        if create:
            if inode is not None:
                raise _error(errno.EEXIST)
            self.operation("create", path)
            inode = Inode()
            directory.change({name: inode})
        if not isinstance(inode, Inode):
            raise _error(errno.ENOENT)
        return FaultyFile(self, path, inode)

    def exists(self, path: str) -> bool:
        return self._node(path) is not None

    def is_directory(self, path: str) -> bool:
        return self._directory(path) is not None

    def size(self, path: str) -> int:
        node = self._node(path)
        assert isinstance(node, Inode)
        return len(node.seen)

    def listdir(self, path: str) -> list[str]:
        directory = self._directory(path)
        return sorted(directory.seen) if directory is not None else []

    def mkdir(self, path: str) -> None:
        directory, name = self._locate(path)
        if name not in directory.seen:
            self.operation("mkdir", path)
            directory.change({name: Directory()})

    def rename(self, old: str, new: str) -> None:
        (source, before), (target, after) = self._locate(old), self._locate(new)
        node = source.seen[before]
        if isinstance(node, Directory) and after in target.seen:
            raise _error(errno.ENOTEMPTY)
        self.operation("rename", new)
        if source is target:
            source.change({before: None, after: node})
        else:
            tag = object()
            source.change({before: None}, tag)
            target.change({after: node}, tag)

    def remove(self, path: str) -> None:
        directory, name = self._locate(path)
        node = directory.seen.get(name)
        if node is None:
            raise _error(errno.ENOENT)
        if isinstance(node, Directory) and node.seen:
            raise _error(errno.ENOTEMPTY)
        self.operation("remove", path)
        directory.change({name: None})

    def sync_dir(self, path: str) -> None:
        self.operation("sync", path)
        directory = self._directory(path)
        assert directory is not None
        if self.syncs("directory", path):
            self._moved_out(directory)
            directory.sync()

    def _moved_out(self, target: Directory) -> None:
        """What is on disk in its new directory has left its old one."""
        tags = {id(tag) for tag, _ in target.pending}

        def walk(directory: Directory) -> None:
            if directory is not target:
                for tag, entries in list(directory.pending):
                    if id(tag) in tags and None in entries.values():
                        _set(directory.disk, entries)
                        directory.pending.remove((tag, entries))
            for node in {**directory.disk, **directory.seen}.values():
                if isinstance(node, Directory):
                    walk(node)

        walk(self.world)

    def lock(self, path: str) -> Lock:
        return NoLock()

    def free_bytes(self) -> int:
        return 0


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
