"""A toy trainer that keeps book: which inner steps its local parameters hold beyond the base (promise 5).

Steps move by what the arithmetic of a merge does, judged by what the server really did, and values are compared with
what they must be. Nothing is taken from the Replica's own books.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diloco_client.flights import Arrival, Base, Flight
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Encoded, Format, reference
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Layout, Manifest, Role
from diloco_server.config import RunConfig

from .broken import BrokenPromise
from .ledger import Ledger, Pushed
from .toy import Copy, ToyTrainer

TOLERANCE = 4e-6
"""Of the magnitudes that enter a merge; float32 rounds off 6e-8 of them in each operation."""


class BookedCopy(Copy):
    """With the inner steps that it holds beyond the base."""

    def __init__(self, values: Floats, steps: frozenset[int], step: int) -> None:
        super().__init__(values)
        self.steps = steps
        self.step = step


@dataclass(slots=True)
class Merge:
    """A base that is about to be merged, and what really became of the contribution that it settles."""

    old: Floats
    new: Floats
    pushed: Pushed | None
    counted: bool
    afresh: bool
    """The run has gone back, and wants nothing of this worker's work since."""


class BookedTrainer(ToyTrainer):
    """Of one process of one worker."""

    def __init__(
        self,
        manifest: Manifest,
        rng: np.random.Generator,
        config: RunConfig,
        ledger: Ledger,
        worker_id: str,
        generation: int,
        tokens: int = 1,
    ) -> None:
        super().__init__(manifest, rng, tokens)
        self.taken = 0
        self.blow_up = 0.0
        """How much larger the next step is."""
        self._config = config
        self._ledger = ledger
        self._worker_id = worker_id
        self._generation = generation

    def attach(self, layout: Layout) -> None:
        super().attach(layout)
        count = layout.num_scheduled
        self._held: list[set[int]] = [set() for _ in range(count)]
        self._dropped: list[set[int]] = [set() for _ in range(count)]
        self._pushed: list[Pushed | None] = [None] * count
        self._merge: list[Merge | None] = [None] * count
        self._residual: list[Floats | None] = [None] * count

    def step(self) -> int:
        self.taken += 1
        for held in self._held:
            held.add(self.taken)
        tokens = super().step()
        if self.blow_up:
            self._trained += np.float32(self.blow_up) * self._random(self._trained.size)
            self.blow_up = 0.0
        return tokens

    def capture(self, fragment: int) -> Copy:
        return BookedCopy(self.locals[fragment].copy(), frozenset(self._held[fragment]), self.taken)

    # -- what is sent off --

    def book(self, flight: Flight, headers: list[pb.PushHeader], due: bool) -> None:
        """A contribution begins its way."""
        copy, header, encoded = flight.captured, flight.header, flight.encoded
        assert isinstance(copy, BookedCopy)
        assert header is not None
        assert encoded is not None
        delta = flight.base.theta - copy.wait()
        fragment = flight.fragment
        decoded, next_residual = self._check_encoded(fragment, delta, encoded)
        taken = len(copy.steps)
        if header.steps < taken or (self._config.mixing_alpha > 0 and header.steps != taken):
            self._broken(5, fragment, f"a contribution says {header.steps} steps and holds {taken}")
        if header.tokens != header.steps * self.tokens:
            self._broken(5, fragment, f"a contribution says {header.tokens} tokens of {header.steps} steps")
        frames = [(p.first_block, d) for h in headers for p, d in zip(h.parts, h.frame_digests, strict=True)]
        pushed = Pushed(
            worker_id=self._worker_id,
            generation=self._generation,
            fragment=fragment,
            base_version=flight.base.version,
            frames=frozenset(frames),
            tokens=header.tokens,
            since_version=header.since_version,
            decoded=decoded,
            delta=delta,
            next_residual=next_residual,
            steps=copy.steps,
            step=copy.step,
            due=due,
        )
        self._pushed[fragment] = pushed
        self._ledger.note(pushed)

    def _check_encoded(self, fragment: int, delta: Floats, encoded: Encoded) -> tuple[Floats, Floats | None]:
        """What the contribution decodes to, and what it leaves out, if the run wants that."""
        trained = fragment < self.layout.num_trained
        feedback = self._config.feedback and trained
        fmt = self._config.uplink if trained else Format.FP32
        residual = self._residual[fragment]
        whole = delta if not feedback or residual is None else delta + residual
        scales, codes = reference.encode(fmt, whole)
        if not (np.array_equal(scales, encoded.scales) and np.array_equal(codes, encoded.codes)):
            self._broken(5, fragment, "a contribution is not the outer gradient, with what the counted ones left out")
        decoded = reference.decode(fmt, scales, codes)
        return decoded, whole - decoded if feedback else None

    # -- merges --

    def expect(self, fragment: int, old: Base, arrival: Arrival) -> None:
        """A newer base is about to be merged."""
        pushed, self._pushed[fragment] = self._pushed[fragment], None
        counted = False
        if pushed is not None:
            version = self._ledger.version_of(pushed)
            claimed = arrival.flight is not None and arrival.flight.counted is True
            if version is not None and version > arrival.base.version and not arrival.afresh:
                self._broken(3, fragment, f"was counted in version {version}, but {arrival.base.version} is merged")
            counted = version is not None
            if claimed != counted and not arrival.afresh:
                text = f"{'counted' if counted else 'not counted'}, but its worker takes it for the contrary"
                self._broken(3, fragment, f"a contribution was {text}")
            if not counted and pushed in self._ledger.staged[fragment]:
                self._broken(3, fragment, "a contribution waits to be counted, but its worker takes it back")
            pushed.settled = counted
        self._merge[fragment] = Merge(old.theta, arrival.base.theta, pushed, counted, arrival.afresh)

    def mix(self, fragment: int, theta: Floats, alpha: float) -> None:
        merge, before = self._take_merge(fragment), self.locals[fragment].astype(np.float64)
        super().mix(fragment, theta, alpha)
        pushed = merge.pushed
        if pushed is None or not merge.counted:
            self._broken(5, fragment, "local work that was not counted is mixed away")
        assert pushed is not None
        if not pushed.due or self.taken - pushed.step > self._config.overlap_steps:
            self._broken(5, fragment, "the steps after a late contribution are mixed away")
        self._compare(fragment, 5, alpha * before + (1 - alpha) * theta, before, theta)
        self._settle(fragment, pushed)
        if alpha == 0:
            self._drop(fragment)

    def shift(self, fragment: int, change: Floats) -> None:
        merge, before = self._take_merge(fragment), self.locals[fragment].astype(np.float64)
        super().shift(fragment, change)
        moved = merge.new.astype(np.float64) - merge.old
        if merge.pushed is not None and merge.pushed.due and not merge.counted:
            moved *= 1 - self._config.mixing_alpha
        expected = before + moved
        magnitudes: list[Floats] = [merge.new, merge.old]
        if merge.counted:
            assert merge.pushed is not None
            out = merge.pushed.delta if self._config.feedback else merge.pushed.decoded
            assert out is not None
            expected += out
            magnitudes += [out, merge.pushed.decoded]
            self._settle(fragment, merge.pushed)
        self._compare(fragment, 3 if merge.counted else 5, expected, before, *magnitudes)

    def adopt(self, fragment: int, theta: Floats) -> None:
        super().adopt(fragment, theta)
        if fragment >= self.layout.num_scheduled:
            return
        merge, self._merge[fragment] = self._merge[fragment], None
        buffer = self.layout.fragments[fragment].role is Role.BUFFER
        if merge is not None and merge.counted and merge.pushed is not None:
            self._settle(fragment, merge.pushed)
        away = merge is not None and merge.pushed is not None and merge.pushed.resync and not merge.counted
        away = away or (merge is not None and merge.afresh)
        if self._held[fragment] and not (buffer or away):
            self._broken(5, fragment, f"inner steps {sorted(self._held[fragment])} are overwritten")
        if away:
            self._residual[fragment] = None
        self._drop(fragment)

    def _take_merge(self, fragment: int) -> Merge:
        merge, self._merge[fragment] = self._merge[fragment], None
        assert merge is not None
        return merge

    def _settle(self, fragment: int, pushed: Pushed) -> None:
        self._held[fragment] -= pushed.steps
        if pushed.next_residual is not None:
            self._residual[fragment] = pushed.next_residual

    def _drop(self, fragment: int) -> None:
        self._dropped[fragment] |= self._held[fragment]
        self._held[fragment].clear()

    def _compare(
        self, fragment: int, promise: int, expected: np.ndarray[tuple[int, ...], np.dtype[np.float64]], *inputs: object
    ) -> None:
        """Local values against what they must be."""
        size = sum(float(np.abs(np.asarray(x)).max()) for x in inputs)
        error = float(np.abs(self.locals[fragment] - expected).max())
        if not error <= TOLERANCE * size:
            self._broken(promise, fragment, f"after a merge local parameters are off by {error:.3g}")

    # -- the end --

    def check_end(self) -> None:
        """The process has flushed: each of its steps was counted, or dropped by a rule."""
        for fragment in range(self.layout.num_trained):
            counted = self._ledger.steps_counted(self._worker_id, self._generation, fragment)
            undone = self._ledger.steps_undone(self._worker_id, self._generation, fragment)
            lost = set(range(1, self.taken + 1)) - counted - undone - self._dropped[fragment]
            if lost:
                self._broken(5, fragment, f"inner steps {sorted(lost)} were never counted")
            both = counted & self._dropped[fragment]
            if both:
                self._broken(3, fragment, f"inner steps {sorted(both)} were counted after they had been given up")

    def _broken(self, promise: int, fragment: int, text: str) -> None:
        raise BrokenPromise(promise, text, worker_id=self._worker_id, fragment=fragment)
