"""The global parameters of a run: theta, the outer optimizer's state, versions, and what is published of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Encoded, Format, UnencodableValue, digest, flush_, pack, worth_level
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import NonFiniteParameter, SnapshotExpired
from diloco_proto.frame_messages import frame_message
from diloco_proto.manifest import Fragment, Layout, Role
from diloco_proto.wire import codec_to_pb

from .outer import DELAYED, FragmentState, OuterSettings, commit

KEPT_UPDATES = 1
"""Published updates of a fragment that are kept in memory whatever their size; who is further behind than the
kept ones takes a snapshot."""

KEPT_SHARE = 0.25
"""More of them are kept while together they have less than this share of the bytes of the fragment's snapshot."""

KEPT_SHARE_DELAYED = 1.0
"""Likewise with delayed-nesterov, where a worker falls behind by one version a period for each of the others.
Beyond that a snapshot is smaller anyway."""

BUFFERS = OuterSettings(optimizer="sgd", lr=1.0, momentum=0.0, downlink=Format.FP32)
"""Buffers are averaged, not trained: theta becomes the mean of the workers' own values."""

BUFFER_STEP = 1 / 3
"""With delayed-nesterov a contribution takes this share of w/N of the way. With the whole of it, since each is made
from a base about N versions old, theta overshoots by half of the way: a variance would become negative. Up to 1/e of
it does not overshoot."""

_STEP = Format.FP32.spec.frame_blocks
"""Blocks in a frame of a snapshot."""


@dataclass(frozen=True, slots=True)
class Update:
    """One published update, as it goes to every worker: each message serialized once."""

    version: int
    """The version it leads to."""
    digest: int
    messages: tuple[bytes, ...]
    """Serialized PullReply with one frame each."""
    item: pb.Item

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.messages))


@dataclass(slots=True)
class Snapshot:
    """theta of one fragment at one version, held still for its readers."""

    fragment: int
    version: int
    num_blocks: int
    digest: int
    theta: Floats | None
    """None once it has expired: a reader that stands still keeps no array alive."""
    readers: int = 0

    @property
    def num_frames(self) -> int:
        return -(-self.num_blocks // _STEP)


@dataclass(frozen=True, slots=True)
class Seed:
    """theta of one fragment at version 0, ready to be taken over."""

    theta: Floats
    digest: int


def prepare_seed(fragment: Fragment, theta: Floats) -> Seed:
    """Flush magnitudes under 2^-100, in place. Heavy; touches nothing else, so any thread may run it.

    Raises NonFiniteParameter, naming the tensor, for NaN, Inf or a magnitude of 2^126 and more.
    """
    bad = flush_(theta)
    if bad >= 0:
        raise NonFiniteParameter(f"tensor {fragment.tensor_at(bad)!r} holds NaN, Inf or a magnitude of 2^126 and more")
    return Seed(theta, digest(theta))


@dataclass(slots=True)
class _Global:
    """One fragment's global state."""

    fragment: Fragment
    settings: OuterSettings
    state: FragmentState
    version: int = 0
    digest: int = 0
    updates: deque[Update] = field(default_factory=deque)
    """The newest, up to `version`."""
    updates_bytes: int = 0
    last_update_bytes: int = 0
    """Also after it is gone."""
    snapshot: Snapshot | None = None
    """Of the current version, if somebody reads it."""
    old_snapshot: Snapshot | None = None

    @property
    def snapshot_bytes(self) -> int:
        return self.fragment.num_blocks * Format.FP32.spec.code_bytes

    def make_room(self, share: float, nbytes: int) -> None:
        """For an update of that size: of the older ones those stay that together with it have less than this share of a
        snapshot."""
        while len(self.updates) >= KEPT_UPDATES and self.updates_bytes + nbytes >= share * self.snapshot_bytes:
            self.updates_bytes -= self.updates.popleft().nbytes

    def keep(self, update: Update, share: float) -> None:
        self.make_room(share, update.nbytes)
        self.updates.append(update)
        self.updates_bytes += update.nbytes
        self.last_update_bytes = update.nbytes


class Parameters:
    """Owns every fragment's FragmentState. `commit` may run in a thread; callers keep it apart from `pin`."""

    def __init__(self, layout: Layout, settings: OuterSettings) -> None:
        self._delayed = settings.optimizer == DELAYED
        self._kept_share = KEPT_SHARE_DELAYED if self._delayed else KEPT_SHARE
        self.reader_speed: float | None = None
        """Bytes a second that the slowest reader takes; None while unknown."""
        self._globals = []
        for fragment in layout.fragments:
            its = BUFFERS if fragment.role is Role.BUFFER else settings
            self._globals.append(_Global(fragment, its, _empty_state(fragment, its)))

    def version(self, fragment: int) -> int:
        return self._globals[fragment].version

    def digest(self, fragment: int) -> int:
        return self._globals[fragment].digest

    def versions(self) -> list[pb.FragmentVersion]:
        return [pb.FragmentVersion(fragment=i, version=g.version, digest=g.digest) for i, g in enumerate(self._globals)]

    def last_update_bytes(self, fragment: int) -> int:
        return self._globals[fragment].last_update_bytes

    def seed(self, fragment: int, seed: Seed) -> None:
        """theta becomes version 0."""
        target = self._globals[fragment]
        assert seed.theta.size == target.fragment.length
        target.state.theta, target.digest = seed.theta, seed.digest

    def state(self, fragment: int) -> FragmentState:
        """The arrays themselves: to be read while nothing commits."""
        return self._globals[fragment].state

    def restore(self, fragment: int, version: int, digest: int, arrays: dict[str, Floats]) -> FragmentState:
        """Take these arrays over as the fragment's state at `version`; returns it."""
        target = self._globals[fragment]
        assert {n for n, a in target.state.arrays().items() if a.size} == arrays.keys()
        assert all(a.size == target.fragment.length for a in arrays.values())
        for name, array in arrays.items():
            setattr(target.state, name, array)
        target.version, target.digest = version, digest
        return target.state

    def make_room(self, fragment: int, *, all_have: bool = False) -> None:
        """For the update of a round that is decided, which is expected to be as large as the last: what it replaces
        goes before it is made, so that they are not both in memory. `all_have`: no worker needs what there is."""
        target = self._globals[fragment]
        target.make_room(0.0 if all_have else self._kept_share, target.last_update_bytes)

    def commit(
        self,
        fragment: int,
        payloads: Sequence[Encoded],
        weights: Sequence[float],
        threads: Executor | None = None,
        *,
        scales: Sequence[float] | None = None,
        delay: int = 1,
    ) -> tuple[Update, bool]:
        """One outer step; returns the update and whether the payloads were counted. See `outer.commit`.

        When the step would overflow, the update is zero and nothing was counted.
        """
        target = self._globals[fragment]
        if self._delayed and target.settings is BUFFERS:
            (weight,), (scale,) = weights, scales or (1.0,)
            weights, scales = (1.0,), (BUFFER_STEP * scale * weight / delay,)
        if target.snapshot is not None:
            # Its readers go on from the old array; the step is made on a copy.
            target.state.theta = target.state.theta.copy()
        fmt = target.settings.downlink
        messages = _Messages(target.fragment, fmt, worth_level(fmt, self.reader_speed))
        counted, value = True, target.digest
        try:
            commit(
                *(target.state, payloads, weights, target.settings, messages.take, threads),
                blocks=fmt.spec.frame_blocks,
                scales=scales,
                delay=delay,
            )
            value = target.state.digest
        except UnencodableValue:
            counted = False
            messages.take_zeros()
        item = pb.Item(
            kind=pb.ITEM_UPDATE,
            version=target.version + 1,
            codec=codec_to_pb(fmt),
            frames=len(messages.made),
            digest=value,
        )
        return Update(target.version + 1, value, tuple(messages.made), item), counted

    def publish(self, fragment: int, update: Update) -> None:
        """The committed step becomes the fragment's version; from now on readers get it."""
        target = self._globals[fragment]
        assert update.version == target.version + 1
        target.version = update.version
        target.digest = update.digest
        target.keep(update, self._kept_share)
        if target.snapshot is not None:
            if target.old_snapshot is not None:
                # One old copy at a time: memory stays bounded however slow a reader is.
                target.old_snapshot.theta = None
            target.old_snapshot, target.snapshot = target.snapshot, None

    def updates_since(self, fragment: int, version: int) -> list[Update] | None:
        """Updates that lead from `version` to now, or None for who had better take a snapshot.

        That is when some of them are no longer kept, or when several together are as large as a snapshot.
        """
        target = self._globals[fragment]
        count = target.version - version
        if count < 0 or count > len(target.updates):
            return None
        wanted = list(target.updates)[len(target.updates) - count :]
        if count > 1 and sum(u.nbytes for u in wanted) >= target.snapshot_bytes:
            return None
        return wanted

    def pin(self, fragment: int, version: int | None = None) -> Snapshot:
        """The fragment as it is now, or as it was at this version if other readers still hold that; held still until
        `unpin`."""
        target = self._globals[fragment]
        old = target.old_snapshot
        if old is not None and old.version == version and old.theta is not None:
            old.readers += 1
            return old
        if target.snapshot is None:
            theta, blocks = target.state.theta, target.fragment.num_blocks
            target.snapshot = Snapshot(fragment, target.version, blocks, target.digest, theta)
        target.snapshot.readers += 1
        return target.snapshot

    def unpin(self, snapshot: Snapshot) -> None:
        target = self._globals[snapshot.fragment]
        snapshot.readers -= 1
        if snapshot.readers == 0:
            if target.snapshot is snapshot:
                target.snapshot = None
            elif target.old_snapshot is snapshot:
                target.old_snapshot = None


def snapshot_frames(snapshot: Snapshot, first: int, stop: int | None = None) -> Iterator[bytes]:
    """Serialized PullReply of each fp32 frame from frame `first` on, or up to frame `stop`, made one at a time.

    Raises SnapshotExpired when the fragment moved on twice meanwhile.
    """
    for number in range(first, snapshot.num_frames if stop is None else stop):
        yield snapshot_frame(snapshot, number * _STEP, (number + 1) * _STEP)


def snapshot_frame(snapshot: Snapshot, first: int, stop: int) -> bytes:
    """Serialized PullReply of blocks `first` up to `stop`, or to the end; no more than a frame takes.

    Raises SnapshotExpired when the fragment moved on twice meanwhile.
    """
    theta = snapshot.theta
    if theta is None:
        raise SnapshotExpired(
            f"version {snapshot.version} of fragment {snapshot.fragment} was overtaken while it was read"
        )
    values = theta[first * BLOCK : stop * BLOCK]
    encoded = Encoded(Format.FP32, np.empty(0, np.uint8), values.view(np.uint8))
    return frame_message(pack(encoded, first)[0])


def snapshot_item(snapshot: Snapshot, first: int, stop: int | None = None) -> pb.Item:
    """The announcement of `snapshot_frames`."""
    return pb.Item(
        kind=pb.ITEM_SNAPSHOT,
        version=snapshot.version,
        codec=pb.CODEC_FP32,
        frames=max(0, (snapshot.num_frames if stop is None else stop) - first),
        digest=snapshot.digest,
    )


class _Messages:
    """The serialized PullReplies of an update, a frame each."""

    def __init__(self, fragment: Fragment, fmt: Format, level: int | None) -> None:
        self._blocks = fragment.num_blocks
        self._format = fmt
        self._level = level
        self.made = [b""] * -(-fragment.num_blocks // fmt.spec.frame_blocks)

    def take(self, first: int, frame: Encoded) -> None:
        (packed,) = pack(frame, first, self._level)
        self.made[first // self._format.spec.frame_blocks] = frame_message(packed)

    def take_zeros(self) -> None:
        """An update that changes nothing."""
        spec = self._format.spec
        for first in range(0, self._blocks, spec.frame_blocks):
            count = min(spec.frame_blocks, self._blocks - first)
            zeros = (np.zeros(count * width, np.uint8) for width in (spec.scale_bytes, spec.code_bytes))
            self.take(first, Encoded(self._format, *zeros))


def _empty_state(fragment: Fragment, settings: OuterSettings) -> FragmentState:
    def zeros() -> Floats:
        return np.zeros(fragment.length, np.float32)

    if fragment.role is Role.FROZEN:
        return FragmentState(zeros(), None, np.zeros(0, np.float32))
    momentum = None if settings.optimizer == "sgd" else zeros()
    return FragmentState(zeros(), momentum, zeros(), zeros() if settings.optimizer == DELAYED else None)
