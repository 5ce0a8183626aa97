"""Snapshots: all that a run has come to, in a directory named after the rounds it had committed.

    snapshots/0000000123/theta.safetensors    the global parameters under the model's own names, for any tool
                         outer.safetensors    momentum.N, residual.N, buffer.N of fragment N, flat and padded
                         state.pb             a Snapshot message, with a checksum of itself and of every array

A directory under that name is complete: it was written under another one (`draft`). When a number is taken again,
since the run was stopped before its next round, the name gets a suffix: 0000000123-2 counts then.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Fragment, Layout

from . import state_pb2 as pb
from . import tensors
from .draft import OUTER, STATE, STATE_HEAD, STATE_MAGIC, TEMPORARY, THETA, Draft, gaps
from .errors import CorruptSnapshot, NoSnapshot, StorageFailed, explain
from .faults import NO_FAULTS, FaultPoints
from .files import File, Files, remove_tree
from .replay import NO_JOURNAL

log = logging.getLogger("diloco.server")

REMOVED = "removed-"
_NAME = re.compile(r"(\d{10,})(?:-(\d+))?")

T = TypeVar("T")

Numbers = list[int]
Names = list[tuple[int, int, str]]
Messages = list[pb.Snapshot]


class Snapshots:
    """All snapshots of a state directory. Methods may be called from any thread."""

    def __init__(self, files: Files, faults: FaultPoints = NO_FAULTS) -> None:
        self._files = files
        self._faults = faults

    def list(self) -> Numbers:
        """The numbers of those that are kept, ascending."""
        return sorted({number for number, _, _ in self.names()})

    def latest(self) -> int | None:
        return max(self.list(), default=None)

    def path(self, number: int) -> Path:
        """The directory. Raises NoSnapshot."""
        return self._files.root / self._path(number)

    def names(self) -> Names:
        """Number, how many times it was taken, and name of each directory; ascending."""
        found = []
        for name in self._files.listdir("snapshots"):
            match = _NAME.fullmatch(name)
            if match:
                found.append((int(match[1]), int(match[2] or 1), name))
        return sorted(found)

    def _path(self, number: int) -> str:
        names = [name for n, _, name in self.names() if n == number]
        if not names:
            kept = ", ".join(map(str, self.list())) or "none"
            raise NoSnapshot(f"there is no snapshot {number} in {self._files.root}; kept are: {kept}")
        return f"snapshots/{names[-1]}"

    # -- writing --

    def begin(self, number: int, layout: Layout, run_id: str) -> Draft:
        """A snapshot after so many committed rounds. Raises StorageFailed."""
        times = max((t for n, t, _ in self.names() if n == number), default=0)
        name = f"{number:010d}" + (f"-{times + 1}" if times else "")
        return Draft(self._files, self._faults, number, name, layout, run_id)

    def prune(self, keep: int) -> Numbers:
        """Remove all but the newest `keep` (at least 1); returns the numbers that are gone. Raises StorageFailed."""
        before = self.list()
        kept = before[-max(1, keep) :]
        newest = {n: name for n, _, name in self.names()}
        unwanted = [name for n, _, name in self.names() if n not in kept or newest[n] != name]
        try:
            for name in unwanted:
                self._files.rename(f"snapshots/{name}", f"snapshots/{REMOVED}{name}")
            if unwanted:
                # Else a crash could bring the name back after the files are gone.
                self._files.sync_dir("snapshots")
        except OSError as error:
            raise StorageFailed(explain(f"remove old snapshots from {self._files.root}", error)) from error
        for name in unwanted:
            self._remove(f"{REMOVED}{name}")
        return [n for n in before if n not in kept]

    def remove_temporaries(self) -> None:
        """What was not finished, or half removed, when the last server died."""
        for name in self._files.listdir("snapshots"):
            if name.startswith((TEMPORARY, REMOVED)):
                self._remove(name)

    def _remove(self, name: str) -> None:
        try:
            remove_tree(self._files, f"snapshots/{name}")
        except OSError as error:
            log.warning("%s", explain(f"remove {self._files.root}/snapshots/{name}", error))

    # -- reading --

    def read(self, number: int) -> pb.Snapshot:
        """All but the arrays. Raises NoSnapshot or CorruptSnapshot."""

        def parse(file: File) -> pb.Snapshot:
            data = file.read(0, file.size())
            if len(data) < STATE_HEAD.size:
                raise ValueError("the file is too short")
            magic, expected, length = STATE_HEAD.unpack_from(data)
            message = data[STATE_HEAD.size :]
            if magic != STATE_MAGIC or length != len(message) or expected != xxhash.xxh3_64_intdigest(message):
                raise ValueError("its checksum does not fit")
            return pb.Snapshot.FromString(message)

        return self._reading(number, STATE, parse)

    def load_arrays(self, number: int, fragment: Fragment, names: Collection[str] | None = None) -> dict[str, Floats]:
        """float32[fragment.length] of each array of the fragment, or of those named: theta, momentum, residual,
        buffer. Raises NoSnapshot or CorruptSnapshot.
        """
        state = next((s for s in self.read(number).fragments if s.fragment == fragment.index), pb.FragmentState())
        digests = {a.name: a.xxh3 for a in state.arrays}
        arrays = {}
        for name in digests if names is None else names:
            if name not in digests:
                raise NoSnapshot(f"snapshot {number} holds no {name} of fragment {fragment.index}")
            array = np.zeros(fragment.length, np.float32)
            if name == "theta" and state.padding:
                _fill_padding(array, fragment, np.frombuffer(state.padding, np.float32))
            self._load(number, fragment, name, array, digests[name])
            arrays[name] = array
        return arrays

    def _load(self, number: int, fragment: Fragment, name: str, array: Floats, expected: int) -> None:
        if name == "theta":
            parts = [(slot.tensor.name, slot.tensor.shape, slot.offset, slot.end) for slot in fragment.slots]
        else:
            parts = [(f"{name}.{fragment.index}", (fragment.length,), 0, fragment.length)]

        def fill(file: File) -> None:
            header = tensors.read_header(file)
            data = array.data.cast("B")
            for tensor, shape, first, end in parts:
                place = header.places.get(tensor)
                if place is None or place.shape != shape:
                    raise ValueError(f"it does not hold {tensor!r} with shape {list(shape)}")
                file.read_into(header.data + place.begin, data[4 * first : 4 * end])
            if xxhash.xxh3_64_intdigest(data) != expected:
                raise ValueError(f"the values of {name} of fragment {fragment.index} are not what was written")

        self._reading(number, THETA if name == "theta" else OUTER, fill)

    def _reading(self, number: int, name: str, parse: Callable[[File], T]) -> T:
        path = f"{self._path(number)}/{name}"
        try:
            with contextlib.closing(self._files.open(path)) as file:
                return parse(file)
        except (OSError, ValueError) as error:
            self._path(number)  # raises NoSnapshot if it was removed meanwhile
            why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            raise CorruptSnapshot(f"{self._files.root / path} is damaged: {why}. {self._instead(number)}") from error

    def _instead(self, number: int) -> str:
        older = max((n for n in self.list() if n < number), default=None)
        if older is None:
            return "There is no older snapshot: put back a copy of the directory"
        return (
            f"Put back a copy, or move {self._files.root / self._path(number)} away: the server then begins from "
            f"snapshot {older} and replays the journal from there"
        )

    def oldest_segment(self) -> int:
        """The first segment of the journal that one of the kept snapshots needs; 0 if none of them says so."""
        return min((s.first_segment for s in self._readable() if s.first_segment != NO_JOURNAL), default=0)

    def newest_segment(self) -> int:
        """The highest of their first segments; 0 if there is none."""
        return max((s.first_segment for s in self._readable() if s.first_segment != NO_JOURNAL), default=0)

    def _readable(self) -> Messages:
        found = []
        for number in self.list():
            try:
                found.append(self.read(number))
            except CorruptSnapshot as error:
                log.warning("%s", error)
        return found


def _fill_padding(theta: Floats, fragment: Fragment, values: Floats) -> None:
    begin = 0
    for gap in gaps(fragment):
        size = gap.stop - gap.start
        theta[gap] = values[begin : begin + size]
        begin += size
