"""Who may join a run and read of it, and what a worker that joins is told of it. Pure."""

from __future__ import annotations

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import PROTOCOL_VERSION
from diloco_proto.errors import (
    InvalidContribution,
    ManifestMismatch,
    NotReady,
    ProtocolMismatch,
    RolledBack,
    RunMismatch,
)
from diloco_proto.manifest import Layout, Manifest

from .model import Model

MAX_WORKER_ID = 128
"""Characters: it goes into logs, metrics and records."""


def check_run_id(asked: str, current: str) -> None:
    """Raises RunMismatch for another run's id, RolledBack for this run's before it was rolled back; empty fits any."""
    if not asked or asked == current:
        return
    if stem(asked) == stem(current):
        raise RolledBack(f"the run went back to an earlier version and is now {current}: say hello again")
    raise RunMismatch(
        f"this server runs {current}, not {asked}: it was started anew. Start the worker again to join; "
        "its model holds its local parameters until then"
    )


def stem(run_id: str) -> str:
    """What a run keeps of its id when it is rolled back."""
    return run_id.partition(".")[0]


def check_hello(hello: pb.Hello, run_id: str) -> bool:
    """Whether the worker comes from a time that the run went back behind.

    Raises ProtocolMismatch, RunMismatch or InvalidContribution.
    """
    if hello.protocol != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"this server speaks protocol {PROTOCOL_VERSION}, the worker {hello.protocol}: "
            "install the same version of diloco on both"
        )
    try:
        check_run_id(hello.run_id, run_id)
        rolled_back = False
    except RolledBack:
        rolled_back = True
    if not 1 <= len(hello.worker_id) <= MAX_WORKER_ID or not hello.worker_id.isprintable():
        raise InvalidContribution(
            f"hello without a worker_id of 1 to {MAX_WORKER_ID} printable characters, but with "
            f"{hello.worker_id[:MAX_WORKER_ID]!r}"
        )
    return rolled_back


def check_model(model: Model, manifest: Manifest, worker_id: str) -> None:
    """Raises ManifestMismatch, naming the first tensor that differs."""
    difference = model.manifest.first_difference(manifest)
    if difference:
        raise ManifestMismatch(f"worker {worker_id!r} has another model than this run: {difference}")


def check_readable(layout: Layout, fragment: int, *, seeded: bool) -> None:
    """Raises NotReady or InvalidContribution unless the fragment can be pulled."""
    if not seeded:
        raise NotReady("the run has no parameters yet")
    if fragment >= len(layout.fragments):
        raise InvalidContribution(f"asked for fragment {fragment}; this run has {len(layout.fragments)}")


def standings(model: Model, worker_id: str) -> list[pb.Standing]:
    """How the worker's contributions stand, for a process that may not know."""
    found = []
    for fragment in range(model.layout.num_scheduled):
        counted, staged = model.rounds.standing(fragment, worker_id)
        if counted is not None or staged is not None:
            found.append(pb.Standing(fragment=fragment, counted_base=counted, staged_base=staged))
    return found
