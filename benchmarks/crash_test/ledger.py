"""The judgement: what the workers recorded, against what is in the journal."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from diloco_proto.codec import digest, frame_checksum, read_frame
from diloco_proto.manifest import build_layout
from diloco_server import RunConfig
from diloco_server.recovery import Recovery
from diloco_server.run import Run
from diloco_server.store import Store

ACKNOWLEDGED = ("OUTCOME_STAGED", "OUTCOME_ALREADY_HAVE", "OUTCOME_COUNTED")


@dataclass(frozen=True, slots=True)
class Contribution:
    """By its key and bytes."""

    worker: str
    fragment: int
    base_version: int
    digests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.worker}'s to fragment {self.fragment} against version {self.base_version}"


@dataclass(slots=True)
class Kept:
    """What the state directory says."""

    staged: Counter[Contribution] = field(default_factory=Counter)
    steps: dict[Contribution, int] = field(default_factory=dict)
    rounds: list[tuple[int, int, tuple[Contribution, ...]]] = field(default_factory=list)
    """Fragment, version that it led to, members."""
    digests: list[str] = field(default_factory=list)
    """Of θ, as it was last kept."""
    replayed: list[str] = field(default_factory=list)
    """Of θ, as it comes from the first snapshot and the whole journal."""
    first: Path = Path()
    last: Path = Path()
    """θ at the start and at the end, as safetensors."""
    problems: list[str] = field(default_factory=list)


def read_state(root: Path) -> Kept:
    """Read all of a state directory from whose journal nothing was ever dropped."""
    kept, store = Kept(), Store(root)
    try:
        numbers = store.snapshots.list()
        first = store.snapshots.read(numbers[0])
        kept.first = store.snapshots.path(numbers[0]) / "theta.safetensors"
        kept.last = store.snapshots.path(numbers[-1]) / "theta.safetensors"
        assert store.info is not None
        config = RunConfig(**_typed(store.info.config))
        fragments = build_layout(store.info.manifest, config.num_fragments, config.pattern).fragments
        scheduled = [f for f in fragments if f.role.value != "frozen"]
        kept.digests = [_hex(digest(store.snapshots.load_arrays(numbers[-1], f)["theta"])) for f in scheduled]
        run = Run(config, run_id=store.info.run_id)
        with ThreadPoolExecutor(2) as threads:
            recovery = Recovery(
                run,
                store.info.manifest,
                first,
                lambda f: store.snapshots.load_arrays(numbers[0], fragments[f]),
                threads,
            )
            frames: dict[int, dict[int, str]] = defaultdict(dict)
            known: dict[int, Contribution] = {}
            for _, record, blob in store.journal.replay(first.first_segment):
                _take(kept, record, bytes(blob), frames, known)
                recovery.take(record, blob)
        kept.replayed = [_hex(run.parameters.digest(f.index)) for f in scheduled]
    finally:
        store.close()
    return kept


def _take(
    kept: Kept, record: Any, blob: bytes, frames: dict[int, dict[int, str]], known: dict[int, Contribution]
) -> None:
    match record.WhichOneof("body"):
        case "frame":
            if record.frame.serial in known:
                kept.problems.append(f"serial {record.frame.serial} is used again after {known[record.frame.serial]}")
            first_block = read_frame(blob).first_block
            frames[record.frame.serial].setdefault(first_block, _hex(frame_checksum(blob)))
        case "staged":
            key = record.staged.key
            digests = tuple(d for _, d in sorted(frames.pop(record.staged.serial, {}).items()))
            contribution = Contribution(key.worker_id, key.fragment, key.base_version, digests)
            kept.staged[contribution] += 1
            kept.steps[contribution] = record.staged.steps
            known[record.staged.serial] = contribution
        case "closed":
            missing = [serial for serial in record.closed.serials if serial not in known]
            if missing:
                kept.problems.append(f"a round has members {missing} that were never staged")
            members = tuple(known[serial] for serial in record.closed.serials if serial in known)
            kept.rounds.append((record.closed.fragment, record.closed.base_version + 1, members))
        case "published":
            if record.published.void:
                kept.problems.append(f"version {record.published.version} counted nothing: it overflowed")


def _typed(config: dict[str, str]) -> dict[str, Any]:
    """The settings of a run from their text."""
    defaults = RunConfig()
    values: dict[str, Any] = {}
    for name, text in config.items():
        kind = type(getattr(defaults, name))
        values[name] = text == "true" if kind is bool else kind(text)
    return values


def _hex(value: int) -> str:
    return f"{value:016x}"


Event = dict[str, Any]


def read_records(folder: Path, workers: Iterable[str]) -> dict[str, list[Event]]:
    """What each worker recorded, in order."""
    found = {}
    for worker in workers:
        path = folder / worker / "record.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found[worker] = [json.loads(line) for line in lines]
    return found


@dataclass(slots=True)
class Verdict:
    """What came out."""

    acknowledged: int = 0
    lost: int = 0
    counted_twice: int = 0
    identical: bool = False
    problems: list[str] = field(default_factory=list)


def judge(kept: Kept, records: dict[str, list[Event]], server: list[str]) -> Verdict:
    """`server`: digests of θ by its own status at the end."""
    verdict = Verdict(problems=list(kept.problems))
    counted = Counter(c for _, _, members in kept.rounds for c in members)
    _check_rounds(kept, counted, verdict)
    _check_workers(records, counted, verdict)
    _check_steps(kept, records, verdict)
    ends = [event for events in records.values() for event in events if event["event"] == "finished"]
    verdict.identical = (
        len(ends) == len(records)
        and all(end["digests"] == server and end["holds_theta"] for end in ends)
        and server == kept.digests == kept.replayed
    )
    if not verdict.identical:
        found = [("server", server), ("kept", kept.digests), ("replayed", kept.replayed)]
        found += [(end["life"], end["digests"]) for end in ends]
        verdict.problems.append(f"not all hold the same: {found}")
    return verdict


def _check_rounds(kept: Kept, counted: Counter[Contribution], verdict: Verdict) -> None:
    """All that was staged is in one round, and versions follow one another."""
    for contribution, times in kept.staged.items():
        if counted[contribution] < times:
            verdict.problems.append(f"staged and in no round: {contribution}")
    for contribution, times in counted.items():
        if times > 1:
            verdict.counted_twice += 1
            verdict.problems.append(f"in {times} rounds: {contribution}")
    versions: dict[int, int] = defaultdict(int)
    for fragment, version, _ in kept.rounds:
        if version != versions[fragment] + 1:
            verdict.problems.append(f"fragment {fragment} came from version {versions[fragment]} to {version}")
        versions[fragment] = version


def _check_workers(records: dict[str, list[Event]], counted: Counter[Contribution], verdict: Verdict) -> None:
    """What a worker was told is so."""
    acknowledged = set()
    for worker, events in records.items():
        for event in events:
            if event["event"] == "answered" and event["outcome"] in ACKNOWLEDGED:
                acknowledged.add(_of(worker, event))
            elif event["event"] == "settled" and event["counted"] != (counted[_of(worker, event)] > 0):
                text = "counted" if event["counted"] else "not counted"
                verdict.problems.append(f"{event['life']} was told {text}, which is wrong: {_of(worker, event)}")
    verdict.acknowledged = len(acknowledged)
    for contribution in acknowledged:
        if not counted[contribution]:
            verdict.lost += 1
            verdict.problems.append(f"acknowledged and in no round: {contribution}")


def _check_steps(kept: Kept, records: dict[str, list[Event]], verdict: Verdict) -> None:
    """No inner step is in two counted contributions to one fragment."""
    steps: dict[Contribution, list[tuple[str, int, int]]] = {}
    for worker, events in records.items():
        for event in events:
            if event["event"] == "sent":
                steps[_of(worker, event)] = [(life, first, last) for life, first, last in event["steps"]]
    taken: dict[tuple[int, str, int], Contribution] = {}
    for fragment, _, members in kept.rounds:
        for contribution in members:
            if contribution not in steps:
                verdict.problems.append(f"counted, and nobody has recorded that it was sent: {contribution}")
                continue
            spans = steps[contribution]
            every = [(fragment, life, step) for life, first, last in spans for step in range(first, last + 1)]
            if len(every) != kept.steps[contribution]:
                verdict.problems.append(f"of {len(every)} steps, said to be {kept.steps[contribution]}: {contribution}")
            again = [step for step in every if step in taken]
            if again:
                verdict.counted_twice += 1
                verdict.problems.append(
                    f"{len(again)} steps from {again[0][1:]} on count twice: {contribution}, and {taken[again[0]]}"
                )
            taken.update((step, contribution) for step in every)


def _of(worker: str, event: Event) -> Contribution:
    return Contribution(worker, event["fragment"], event["base_version"], tuple(event["digests"]))


def times_of_steps(logs: Iterable[Path]) -> list[float]:
    """When each outer step was published, by the server's own logs."""
    found = []
    for log in logs:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("{") and '"version"' in line and line.endswith("}"):
                entry = json.loads(line)
                if "version" in entry and "fragment" in entry:
                    found.append(datetime.fromisoformat(entry["time"]).timestamp())
    return sorted(found)
