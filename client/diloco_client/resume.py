"""What of a worker outlives its process: `outer.state_dict()`, and what still holds of it when a process resumes it.

A trainer's checkpoint has the local parameters and the inner optimizer. Beside it this keeps, of each fragment: the
base (version and values), the residual of error feedback, how far back the work goes that was not counted yet, and the
contribution under way, as the very frames that were, or would have been, pushed. Nothing is waited for to take it.

The base is kept with its values, 4 bytes a parameter, although the server has a newer one: what was not counted is
the difference between local values and *that* base, and the server cannot give it once the run has moved on. Without
it a worker that comes back to a run of many would have to throw its work away.

**The rule**, for each fragment. The server says in its welcome against which base versions the worker's last counted
contribution was, and the one that is staged, if there is one, whichever process pushed them (`Standing`). A version
is *accounted for* if the state knows that it was counted, or if the local values were θ of a later version.

- The server has a contribution that is neither accounted for nor the one that the state holds as under way. A process
  after this state pushed it, with all that the state holds as not counted and more. It is in θ, or will be when its
  round closes: local ← θ, nothing is left to push, the residual begins at 0. So nothing counts twice.
- The run has another lineage than the state (it was rolled back), or another θ at the base's version: local ← θ too.
- Else nothing of the work since is in θ. The local values and the base are what they were, and the contribution under
  way is pushed again: the same key and bytes, so the server answers what it would have answered before (`already have`,
  `counted`, `closed`), and it is merged by the usual rule. If it has other bytes under that key (`conflict`), a process
  in between pushed those steps: local ← θ.

A contribution that is staged counts as counted, although its round is not over: in one that overflows it is lost. While
nothing else is in the run's last versions than what the state knows of, a resumed worker goes on at its place in the
schedule, and the result is the one without interruption, bit for bit; else it takes the run's place, as a joiner does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import CorruptFrame, Encoded, Format, digest, read_frame
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import StateMismatch
from diloco_proto.manifest import Role

from .binding import Binding
from .flights import Base, Flight
from .link import Link
from .replica import Progress, Replica, Uncounted
from .session import stem
from .spans import Span
from .stats import Spent

log = logging.getLogger("diloco")

FORMAT = 1
"""Of the state; another is refused."""

_NONE = -1
"""Stands for None in a state, which holds tensors, numbers and strings only."""

_SINCE, _STEP, _TOKENS, _ACCOUNTED = "since_version", "step", "tokens", "accounted"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFragment:
    """What a state has of one fragment."""

    base: Base
    outdated: bool
    """The run had been rolled back, and the base was still that of before."""
    digest: int
    """Of the base."""
    local: int
    """Digest of the local values."""
    uncounted: Uncounted
    flight: Flight | None

    def holds(self, newest: Base, standing: pb.Standing | None) -> bool:
        """Whether nothing of the work that it has as not counted is in θ; `newest` is the run's base."""
        if self.outdated or newest.version < self.base.version:
            return False
        if newest.version == self.base.version and digest(newest.theta) != self.digest:
            return False
        heard = []
        if standing is not None:
            heard += [standing.counted_base] if standing.HasField("counted_base") else []
            heard += [standing.staged_base] if standing.HasField("staged_base") else []
        own = None if self.flight is None else self.base.version
        return all(base <= self.uncounted.accounted or base == own for base in heard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A worker's state, read."""

    run_id: str
    worker_id: str
    generation: int
    """Of the process that saved it; a larger one supersedes it."""
    layout: int
    """Fingerprint."""
    progress: Progress
    spent: Spent
    fragments: tuple[SavedFragment, ...]

    @property
    def place(self) -> list[Any]:
        """Where the worker was: the same in what all ranks of an island have saved at one time."""
        flights = [f.flight and (f.flight.step, f.flight.counted) for f in self.fragments]
        versions = [f.base.version for f in self.fragments]
        return [self.worker_id, self.run_id, asdict(self.progress), versions, flights]


def new_generation(saved: Saved | None) -> int:
    """Of a process that begins now, and perhaps takes up a state: larger than those of all former ones."""
    return max(time.time_ns(), saved.generation + 1 if saved is not None else 0)


# -- taking a state --


def save(link: Link, replica: Replica, binding: Binding, spent: Spent) -> dict[str, Any]:
    """The worker's state, in copies. Its keys and the shapes of its tensors are the same at any time in a run.

    Raises NonFiniteParameter, if a contribution that is to be pushed cannot be.
    """
    link.do(link.courier.encode_all)
    fragments, run_id = {}, link.courier.run_id
    for fragment in link.layout.scheduled:
        fmt = Format.FP32 if fragment.role is Role.BUFFER else Format(link.settings.uplink_codec)
        feedback = link.settings.error_feedback and fragment.role is Role.TRAINED
        current, flight = link.courier.to_save(fragment.index)
        base = current or link.courier.bases[fragment.index]
        uncounted = replica.uncounted(fragment.index)
        fragments[str(fragment.index)] = {
            "version": base.version,
            "outdated": int(current is None),
            "base": torch.from_numpy(base.theta.copy()),
            "digest": f"{digest(base.theta):016x}",
            "local": f"{digest(binding.capture(fragment.index).wait()):016x}",
            _SINCE: uncounted.since_version,
            _STEP: uncounted.step,
            _TOKENS: uncounted.tokens,
            _ACCOUNTED: uncounted.accounted,
            "flight": _flight_to_plain(flight, binding.spans[fragment.index], fmt, feedback),
            **({"residual": _copy(uncounted.residual, binding.spans[fragment.index])} if feedback else {}),
        }
    progress = asdict(replica.progress)
    progress["tokens"] = _NONE if progress["tokens"] is None else progress["tokens"]
    return {
        "format": FORMAT,
        "run_id": run_id,
        "worker_id": link.worker_id,
        "generation": link.generation,
        "layout": f"{link.layout.fingerprint:016x}",
        "progress": progress,
        "spent": asdict(spent),
        "fragments": fragments,
    }


def _copy(values: Floats | None, span: Span) -> torch.Tensor:
    return torch.zeros(span.length) if values is None else torch.from_numpy(values.copy())


def _flight_to_plain(flight: Flight | None, span: Span, fmt: Format, feedback: bool) -> dict[str, Any]:
    """Always with room for a whole contribution, so that a state can be loaded in place of another."""
    spec = fmt.spec
    count = -(-span.num_blocks // spec.frame_blocks)
    room = 32 * count + span.num_blocks * (spec.scale_bytes + spec.code_bytes)
    frames = () if flight is None else flight.frames
    sizes = torch.zeros(count, dtype=torch.int64)
    sizes[: len(frames)] = torch.tensor([len(f) for f in frames], dtype=torch.int64)
    payload = np.zeros(room, np.uint8)
    whole = np.frombuffer(b"".join(map(bytes, frames)), np.uint8)
    payload[: whole.size] = whole
    settled = flight is not None and flight.counted is not None
    plain = {
        "frame_bytes": sizes,
        "frames": torch.from_numpy(payload),
        "step": flight.step if flight else _NONE,
        "due_step": flight.due_step if flight else _NONE,
        "steps": flight.steps if flight else 0,
        "tokens": flight.tokens if flight else 0,
        "tokens_until": flight.tokens_until if flight else 0,
        _SINCE: flight.since_version if flight else 0,
        "outcome": int(flight.outcome.kind) if flight and flight.outcome and settled else 0,
        "counted": int(bool(flight.counted)) if flight and settled else _NONE,
        "needs": flight.needs if flight else 0,
    }
    if feedback:
        plain["next_residual"] = _copy(flight.next_residual if flight else None, span)
    return plain


# -- reading a state --


def read(state: Mapping[str, Any]) -> Saved:
    """Raises StateMismatch for what is no state of a worker, or a damaged one."""
    try:
        if "rank0" in state:
            raise StateMismatch(
                "this state is of an island of several ranks, and this is a worker of one process: start as many ranks "
                "as saved it, or join without it"
            )
        if state["format"] != FORMAT:
            raise StateMismatch(
                f"this state of a worker has format {state['format']}; this version of diloco reads {FORMAT}. Resume "
                "it with the version that saved it, or join without it"
            )
        progress = dict(state["progress"])
        progress["tokens"] = None if progress["tokens"] == _NONE else progress["tokens"]
        fragments = state["fragments"]
        return Saved(
            run_id=state["run_id"],
            worker_id=state["worker_id"],
            generation=int(state["generation"]),
            layout=int(state["layout"], 16),
            progress=Progress(**progress),
            spent=Spent(**{f.name: state["spent"][f.name] for f in fields(Spent)}),
            fragments=tuple(_read_fragment(index, fragments[str(index)]) for index in range(len(fragments))),
        )
    except (KeyError, TypeError, ValueError, AttributeError, CorruptFrame) as error:
        if isinstance(error, StateMismatch):
            raise
        raise StateMismatch(
            f"this is not what outer.state_dict() gave, or it is damaged ({error!r}): pass that part of the "
            "checkpoint, or join without it"
        ) from error


def _read_fragment(index: int, plain: Mapping[str, Any]) -> SavedFragment:
    theta = plain["base"].numpy(force=True).astype(np.float32, copy=True)
    found = int(plain["digest"], 16)
    if digest(theta) != found:
        raise StateMismatch(f"the state's base of fragment {index} is damaged: take an older checkpoint")
    base = Base(int(plain["version"]), theta)
    residual = plain["residual"].numpy(force=True).copy() if "residual" in plain else None
    uncounted = Uncounted(plain[_STEP], plain[_TOKENS], plain[_SINCE], plain[_ACCOUNTED], residual)
    flight = _read_flight(index, base, residual, plain["flight"])
    return SavedFragment(
        base=base,
        outdated=bool(plain["outdated"]),
        digest=found,
        local=int(plain["local"], 16),
        uncounted=uncounted,
        flight=flight,
    )


def _read_flight(index: int, base: Base, residual: Floats | None, plain: Mapping[str, Any]) -> Flight | None:
    if plain["step"] == _NONE:
        return None
    payload, end, frames = plain["frames"].numpy(force=True).tobytes(), 0, []
    for size in plain["frame_bytes"].tolist():
        frames.append(payload[end : end + size])
        end += size
    feedback = residual is not None
    flight = Flight(
        fragment=index,
        base=base,
        captured=None,
        step=plain["step"],
        due_step=plain["due_step"],
        steps=plain["steps"],
        tokens=plain["tokens"],
        tokens_until=plain["tokens_until"],
        since_version=plain[_SINCE],
        feedback=feedback,
        residual=residual,
        encoded=_whole(frames) if frames else None,
        next_residual=plain["next_residual"].numpy(force=True).copy() if feedback else None,
        frames=frames,
        restored=True,
    )
    if plain["counted"] != _NONE:
        flight.counted, flight.needs = bool(plain["counted"]), plain["needs"]
        flight.outcome = pb.Outcome(kind=plain["outcome"], version=plain["needs"])
    return flight


def _whole(frames: list[bytes]) -> Encoded:
    """Scales and codes of all frames together."""
    read = [read_frame(frame) for frame in frames]
    scales, codes = (np.concatenate([getattr(f, name) for f in read]) for name in ("scales", "codes"))
    return Encoded(read[0].format, scales, codes)


# -- going on with a state --


def resume(saved: Saved, link: Link, replica: Replica, binding: Binding) -> None:
    """Make this worker, which has joined and taken no step yet, the one that saved the state, by the rule above.

    The model must hold the local values that go with the state, or have held them when it joined. Raises
    StateMismatch, and changes nothing, if the state is of another worker, run or model, or they are not there.
    """
    link.do(lambda: _check(saved, link, replica, binding))
    check_same(link.odd_one(saved.place))
    courier = link.courier
    same_lineage = saved.run_id == link.run_id
    newest = [courier.newest(p) for p in range(len(saved.fragments))]
    kept = {
        p: entry
        for p, entry in enumerate(saved.fragments)
        if same_lineage and not link.anywhere(not entry.holds(newest[p], link.standings.get(p)))
    }
    before = _local_values(kept, link, binding)
    moved_on = any(newest[p].version > e.base.version + (e.flight is not None) for p, e in enumerate(saved.fragments))
    replica.resume(saved.progress, moved_on=moved_on or not same_lineage)
    for p, entry in enumerate(saved.fragments):
        if p in kept:
            if p in before:
                binding.adopt(p, before[p])
            replica.reinstate(p, entry.uncounted)
            courier.restore(p, entry.base, entry.flight)
        else:
            replica.give_up(p)
    account(link, replica)
    _tell(saved, link, same_lineage, kept)


def account(link: Link, replica: Replica) -> None:
    """Let the replica know what former processes have staged: a state of it must not take that for later work."""
    for p, standing in link.standings.items():
        if standing.HasField("staged_base"):
            replica.account(p, standing.staged_base)


def check_same(other: int | None) -> None:
    """Raises StateMismatch if a rank of an island has another state than the first: that `other`."""
    if other is not None:
        raise StateMismatch(
            f"rank {other} of this island takes up another state than rank 0: all must have that of one checkpoint, or "
            "none"
        )


def _check(saved: Saved, link: Link, replica: Replica, binding: Binding) -> None:
    if replica.taken:
        raise StateMismatch("load_state_dict after the first inner step: load the checkpoint before training goes on")
    if saved.worker_id != link.worker_id:
        raise StateMismatch(
            f"this state is of worker {saved.worker_id!r} and this one is {link.worker_id!r}. Two workers must not "
            f"resume one state, or its work would count twice: join(..., worker_id={saved.worker_id!r}), or leave the "
            "state out to join as a new worker"
        )
    if stem(saved.run_id) != stem(link.run_id):
        raise StateMismatch(
            f"this state is of run {saved.run_id}, and the server runs {link.run_id}: it was started anew. Leave the "
            "state out to join that run with its global parameters"
        )
    lengths = [span.length for span in binding.spans[: link.layout.num_scheduled]]
    if saved.layout != link.layout.fingerprint or [e.base.theta.size for e in saved.fragments] != lengths:
        raise StateMismatch(
            "this state is of another model than the one that has joined: its fragments are cut differently. Build "
            "the model as it was when the state was saved, or leave the state out"
        )


def _local_values(kept: Mapping[int, SavedFragment], link: Link, binding: Binding) -> dict[int, Floats]:
    """The values to put back into the model, by fragment; none where it holds them already."""
    trained = {p: entry for p, entry in kept.items() if p < link.layout.num_trained}
    now = {p for p, e in trained.items() if not link.anywhere(digest(binding.capture(p).wait()) != e.local)}
    if len(now) == len(trained):
        return {}
    for p, entry in trained.items():
        values = link.replaced.get(p)
        if p not in now and link.anywhere(values is None or digest(values) != entry.local):
            raise StateMismatch(
                f"the model does not hold the parameters that it held when this state was saved (fragment {p} "
                "differs). Load model and optimizer of the same checkpoint first, then join(..., state=...); or join, "
                "load both, and then call load_state_dict"
            )
    return {p: values for p, values in link.replaced.items() if p in kept and p not in now}


def _tell(saved: Saved, link: Link, same_lineage: bool, kept: Mapping[int, SavedFragment]) -> None:
    given_up = [p for p in range(len(saved.fragments)) if p not in kept]
    what = "nothing of its work was counted since"
    if not same_lineage:
        what = f"the run was rolled back since (it was {saved.run_id}): it goes on from the global parameters"
    elif given_up:
        listed = ", ".join(map(str, given_up))
        what = f"of fragments {listed} it takes the global parameters, which have later work of it"
    link.log.log(
        logging.WARNING if given_up else logging.INFO,
        "worker %s resumes in run %s from its state at inner step %d; %s",
        saved.worker_id,
        link.run_id,
        saved.progress.taken,
        what,
    )
