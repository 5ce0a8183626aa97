"""A snapshot that is being written, one fragment at a time, under a temporary name."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Fragment, Layout

from . import state_pb2 as pb
from . import tensors
from .errors import StorageFailed, explain
from .faults import FaultPoints
from .files import File, Files, remove_tree
from .tensors import Place

THETA = "theta.safetensors"
OUTER = "outer.safetensors"
STATE = "state.pb"
TEMPORARY = "tmp-"

STATE_HEAD = struct.Struct("<8sQQ")
"""Of state.pb: magic, xxh3 of the message, its length."""
STATE_MAGIC = b"DILOCOS1"

_LONGEST = "9" * 20
"""Room for a version in the header, which is written last."""


class Draft:
    """Made by `Snapshots.begin`. Add every fragment of the layout once, in any order, then finish.

    Any thread may call, one at a time. A method that raises StorageFailed has discarded the draft.
    """

    def __init__(self, files: Files, faults: FaultPoints, number: int, name: str, layout: Layout, run_id: str) -> None:
        self.number = number
        self.name = name
        """Of the directory, once it is finished."""
        self._files = files
        self._faults = faults
        self._layout = layout
        self._run_id = run_id
        self._places, self._starts = theta_places(layout)
        self._theta_room = len(self._theta_header([_LONGEST] * len(layout.fragments)))
        every = {f"{a}.{f.index}": Place((f.length,), 1 << 62) for f in layout.fragments for a in _OUTER}
        self._outer_room = len(tensors.pack_header(every, {}))
        self._outer: dict[str, Place] = {}
        self._outer_end = 0
        self._states: dict[int, pb.FragmentState] = {}
        self._kept = False
        self._files_open: list[File] = []
        with self._storing():
            if files.exists(self.path):
                remove_tree(files, self.path)
            files.mkdir(self.path)
            self._theta_file = self._create(THETA)
            self._outer_file = self._create(OUTER)

    @property
    def path(self) -> str:
        return f"snapshots/{TEMPORARY}{self.name}"

    def _create(self, name: str) -> File:
        file = self._files.open(f"{self.path}/{name}", create=True)
        self._files_open.append(file)
        return file

    def add(
        self,
        state: pb.FragmentState,
        theta: Floats,
        momentum: Floats | None = None,
        residual: Floats | None = None,
        buffer: Floats | None = None,
    ) -> None:
        """A fragment: `state.arrays` is filled in, the arrays are float32[fragment.length]. Heavy.

        Raises StorageFailed.
        """
        fragment = self._layout.fragments[state.fragment]
        assert fragment.index not in self._states
        mine = pb.FragmentState()
        mine.CopyFrom(state)
        del mine.arrays[:]
        with self._storing():
            self._add_theta(fragment, theta)
            mine.arrays.append(_digest("theta", theta))
            padding = np.concatenate([theta[gap] for gap in gaps(fragment)] or [theta[:0]])
            mine.padding = padding.tobytes() if padding.any() else b""
            self._faults.reach("mid_snapshot")
            for name, array in zip(_OUTER, (momentum, residual, buffer), strict=True):
                if array is not None:
                    self._add_outer(f"{name}.{fragment.index}", array)
                    mine.arrays.append(_digest(name, array))
        self._states[fragment.index] = mine

    def _add_theta(self, fragment: Fragment, theta: Floats) -> None:
        data = theta.data.cast("B")
        buffers = [data[4 * slot.offset : 4 * slot.end] for slot in fragment.slots]
        self._theta_file.write(self._theta_room + self._starts[fragment.index], buffers)

    def _add_outer(self, name: str, array: Floats) -> None:
        place = self._outer[name] = Place(array.shape, self._outer_end)
        self._outer_file.write(self._outer_room + place.begin, [array.data.cast("B")])
        self._outer_end += place.nbytes

    def _theta_header(self, versions: list[str], room: int = 0) -> bytes:
        metadata = {"format": "pt", "run_id": self._run_id}
        metadata |= {f"version.{i}": version for i, version in enumerate(versions)}
        slots = (slot for fragment in self._layout.fragments for slot in fragment.slots)
        metadata |= {f"tied.{s.tensor.name}": ",".join(s.tensor.tied) for s in slots if s.tensor.tied}
        return tensors.pack_header(self._places, metadata, room)

    def finish(self, snapshot: pb.Snapshot) -> Path:
        """All fragments are there: it becomes a snapshot, on disk when this returns. `fragments` and
        `saved_at` are filled in.

        Raises StorageFailed.
        """
        self.prepare(snapshot)
        with self._storing():
            self._faults.reach("before_rename")
            self._files.rename(self.path, f"snapshots/{self.name}")
            self._kept = True
            self._faults.reach("after_rename")
            self._files.sync_dir("snapshots")
        return self._files.root / "snapshots" / self.name

    def prepare(self, snapshot: pb.Snapshot) -> None:
        """All of its files are on disk when this returns; only its name is missing."""
        missing = sorted(f.index for f in self._layout.fragments if f.index not in self._states)
        assert not missing, f"fragments {missing} were not added"
        del snapshot.fragments[:]
        snapshot.fragments.extend(state for _, state in sorted(self._states.items()))
        snapshot.saved_at = time.time()
        message = snapshot.SerializeToString()
        with self._storing():
            versions = [str(state.version) for state in snapshot.fragments]
            self._theta_file.write(0, [self._theta_header(versions, self._theta_room)])
            self._outer_file.write(0, [tensors.pack_header(self._outer, {}, self._outer_room)])
            self._create(STATE).write(0, [STATE_HEAD.pack(STATE_MAGIC, _xxh3(message), len(message)), message])
            for file in self._files_open:
                file.sync()
            self._files.sync_dir(self.path)
            self._close()

    def keep(self) -> None:
        """From now on its directory belongs to somebody else: `discard` leaves it."""
        self._kept = True

    def discard(self) -> None:
        """Give it up. Nothing happens if it was finished or discarded."""
        self._close()
        if not self._kept:
            with contextlib.suppress(OSError):
                remove_tree(self._files, self.path)

    def _close(self) -> None:
        while self._files_open:
            self._files_open.pop().close()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            where = self._files.root / self.path
            raise StorageFailed(explain(f"write {where}", error, self._files.free_bytes())) from error


_OUTER = ("momentum", "residual", "buffer")


def theta_places(layout: Layout) -> tuple[dict[str, Place], list[int]]:
    """Of all tensors, fragment by fragment without their padding; and where each fragment begins."""
    places, starts, begin = {}, [], 0
    for fragment in layout.fragments:
        starts.append(begin)
        for slot in fragment.slots:
            place = places[slot.tensor.name] = Place(slot.tensor.shape, begin)
            begin += place.nbytes
    return places, starts


def gaps(fragment: Fragment) -> list[slice]:
    """The padding after each tensor. It is not always 0: some formats have no code for 0."""
    ends = [*(slot.offset for slot in fragment.slots[1:]), fragment.length]
    return [slice(slot.end, end) for slot, end in zip(fragment.slots, ends, strict=True)]


def _digest(name: str, array: Floats) -> pb.ArrayDigest:
    return pb.ArrayDigest(name=name, xxh3=_xxh3(array.data.cast("B")))


def _xxh3(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)
