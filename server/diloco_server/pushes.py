"""What pushes announce, checked against the run, and the assemblies that they fill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from diloco_proto import outer_pb2 as pb
from diloco_proto.buffers import Buffers
from diloco_proto.codec import Format, decode_fragment, kernels
from diloco_proto.errors import ConnectionClosed, InvalidContribution, TooMuchInFlight
from diloco_proto.manifest import Fragment, Layout, Role

from .assembly import Assembly, Place, Work, frame_places
from .parameters import Seed, prepare_seed
from .round import Key

MOST_WORK = 1 << 40
"""Tokens, and steps, of one contribution: far beyond what anybody computes, so that their sum over a run stays a number
that fits its fields."""

LEAST_IN_FLIGHT = 1 << 30
"""Bytes of incomplete contributions for which there is room at least, however small the model."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A push whose header is in order."""

    header: pb.PushHeader
    fragment: Fragment
    format: Format
    places: tuple[Place, ...]

    @property
    def key(self) -> Key:
        return Key(self.fragment.index, self.header.base_version, self.header.worker_id)

    @property
    def frames(self) -> dict[int, int]:
        """First block of each frame -> its xxh3."""
        return {p.first_block: p.digest for p in self.places}


@dataclass(frozen=True, slots=True)
class Ticket:
    """One push that the server is ready to receive."""

    announced: Announcement
    assembly: Assembly

    @property
    def header(self) -> pb.PushHeader:
        return self.announced.header

    @property
    def places(self) -> tuple[Place, ...]:
        return self.announced.places

    @contextmanager
    def filling(self) -> Iterator[None]:
        """A stream brings frames within the block."""
        self.assembly.streams += 1
        try:
            yield
        finally:
            self.assembly.streams -= 1

    def prepare(self) -> Seed | float | None:
        """What is to be computed from a push that is complete: the seed, or a contribution's L2 norm.

        None while it is not. Heavy; any thread may run it. Raises NonFiniteParameter.
        """
        if not self.assembly.complete:
            return None
        encoded = self.assembly.encoded()
        if self.header.purpose == pb.PURPOSE_SEED:
            return prepare_seed(self.assembly.fragment, decode_fragment(encoded))
        return math.sqrt(kernels.sum_of_squares(encoded.format, encoded.scales, encoded.codes))


@dataclass(slots=True)
class _Filling:
    """An assembly, and the generation of the process that it comes from."""

    generation: int
    assembly: Assembly


KEPT_BUFFERS = 16
"""Of contributions, for those of the next rounds."""


class Pushes:
    """The incomplete contributions and seeds of one model, by key: one a worker and fragment, and together no more
    than `max_bytes`. What nobody is filling makes room for what somebody wants to."""

    def __init__(self, layout: Layout, uplink: Format) -> None:
        self._layout = layout
        self._uplink = uplink
        self._assemblies: dict[Key, _Filling] = {}
        self._memory = Buffers(KEPT_BUFFERS)
        self.next_serial = 1
        parameters = sum(f.num_blocks for f in layout.fragments)
        self.max_bytes = max(LEAST_IN_FLIGHT, parameters * Format.FP32.spec.code_bytes)
        """As many as theta has."""

    def read(self, header: pb.PushHeader) -> Announcement:
        """Check a header. Raises InvalidContribution, naming the worker and what it should have sent."""
        fragment = self._fragment(header)
        fmt = self._format(header, fragment)
        parts = [(p.first_block, p.num_blocks) for p in header.parts]
        return Announcement(header, fragment, fmt, tuple(frame_places(fragment, fmt, parts, header.frame_digests)))

    def claim(self, announced: Announcement) -> Ticket:
        """Make room for the announced frames, beside those that other streams of the same contribution bring.

        Raises InvalidContribution when the streams of one contribution disagree on the work behind it,
        TooMuchInFlight when there is no room, and ConnectionClosed for what the worker has given up.
        """
        header, key = announced.header, announced.key
        filling = self._assemblies.get(key)
        assembly = filling.assembly if filling is not None and filling.generation == header.generation else None
        if assembly is None or not assembly.claim(announced.places):
            # Nothing incomplete was ever acknowledged: a worker that starts over may bring other bytes. Nor may parts
            # of two processes be mixed.
            memory = None
            if header.purpose == pb.PURPOSE_CONTRIBUTION:  # parameters come once
                memory = self._memory.encoded(announced.format, announced.fragment.num_blocks)
            assembly = Assembly(announced.fragment, announced.format, Work.of(header), self.next_serial, memory)
            fits = assembly.claim(announced.places)
            assert fits, "the frames of one stream do not overlap"
            self._make_room(key, assembly)
            self._assemblies[key] = _Filling(header.generation, assembly)
            self.next_serial += 1
        elif assembly.work != Work.of(header):
            raise InvalidContribution(
                f"worker {key.worker_id!r}, fragment {key.fragment}: one part says {assembly.work}, another "
                f"{Work.of(header)}; all parts must say the same"
            )
        return Ticket(announced, assembly)

    def holds(self, ticket: Ticket) -> bool:
        """Whether the ticket's assembly is still the one that counts under its key."""
        filling = self._assemblies.get(ticket.announced.key)
        return filling is not None and filling.assembly is ticket.assembly

    def take(self, ticket: Ticket) -> None:
        """The assembly is complete and leaves."""
        self._drop(ticket.announced.key)

    def drop_older(self, fragment: int, version: int) -> None:
        """What is against an older base, and was not complete by now, is of no use."""
        gone = [k for k in self._assemblies if k.fragment == fragment and k.base_version < version]
        for key in gone:
            self._drop(key)

    def serials(self) -> set[int]:
        """Of all that are incomplete."""
        return {f.assembly.serial for f in self._assemblies.values()}

    def clear(self) -> None:
        for key in list(self._assemblies):
            self._drop(key)

    @property
    def nbytes(self) -> int:
        """Of all that are incomplete."""
        return sum(f.assembly.nbytes for f in self._assemblies.values())

    def _drop(self, key: Key) -> None:
        self._assemblies.pop(key).assembly.closed = True

    def _make_room(self, key: Key, assembly: Assembly) -> None:
        """For a contribution that begins. A worker begins another to a fragment only once it knows the fate of the one
        before, so what there is of that, or of the same with other bytes, goes."""
        rivals = [k for k in self._assemblies if (k.fragment, k.worker_id) == (key.fragment, key.worker_id)]
        if any(k.base_version > key.base_version for k in rivals):
            raise ConnectionClosed(
                f"worker {key.worker_id!r} has begun a newer contribution to fragment {key.fragment}"
            )
        for rival in rivals:
            self._drop(rival)
        idle = [k for k, f in self._assemblies.items() if not f.assembly.streams]
        while self._assemblies and self.nbytes + assembly.nbytes > self.max_bytes:
            if not idle:
                raise TooMuchInFlight(
                    f"contributions of {self.nbytes >> 20} MiB are on their way, and with this one they would be more "
                    f"than the {self.max_bytes >> 20} MiB that this server takes at once; later there is room"
                )
            self._drop(idle.pop(0))  # the oldest; its worker sends it again from the start

    def _fragment(self, header: pb.PushHeader) -> Fragment:
        who = f"worker {header.worker_id!r}"
        if header.purpose == pb.PURPOSE_SEED:
            if header.base_version != 0:
                raise InvalidContribution(f"{who} pushed a seed as version {header.base_version}; it is version 0")
            count = len(self._layout.fragments)
        elif header.purpose == pb.PURPOSE_CONTRIBUTION:
            if header.tokens < 1 or header.steps < 1:
                raise InvalidContribution(f"{who} pushed a contribution without any step or token behind it")
            if max(header.tokens, header.steps) > MOST_WORK:
                raise InvalidContribution(
                    f"{who} pushed a contribution of {header.tokens} tokens and {header.steps} steps; "
                    f"the most of either is {MOST_WORK}"
                )
            if header.since_version > header.base_version:
                raise InvalidContribution(
                    f"{who} pushed steps taken since version {header.since_version} of fragment {header.fragment} "
                    f"against the older version {header.base_version}"
                )
            count = self._layout.num_scheduled
        else:
            raise InvalidContribution(f"{who} pushed with unknown purpose {header.purpose}")
        if header.fragment >= count:
            raise InvalidContribution(f"{who} pushed fragment {header.fragment}; this run has {count}")
        return self._layout.fragments[header.fragment]

    def _format(self, header: pb.PushHeader, fragment: Fragment) -> Format:
        exact = header.purpose == pb.PURPOSE_SEED or fragment.role is Role.BUFFER
        wanted = Format.FP32 if exact else self._uplink
        if int(header.codec) != wanted:
            raise InvalidContribution(
                f"worker {header.worker_id!r} pushed codec {header.codec} for fragment {fragment.index}; this run "
                f"takes {wanted.label}"
            )
        return wanted
