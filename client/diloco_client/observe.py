"""A run seen from outside: its status, and its global parameters as a file. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import numpy as np
import safetensors
from numpy.typing import NDArray

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import CorruptFrame
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import ConnectionClosed, NotReady
from diloco_proto.manifest import Fragment, Pattern, TensorSpec, build_layout
from diloco_proto.wire import manifest_from_pb

from .connect import Connector, Credentials
from .landing import Target
from .transport import Transport


def status(
    address: str | None = None, timeout: float = 10.0, *, rounds: int = 0, **credentials: Unpack[Credentials]
) -> dict[str, Any]:
    """How the run at `address` stands: state, workers, fragments with version and digest, bytes, configuration.

    With `rounds` also the records of each fragment's last so many rounds: who was counted, with which weight.

    Raises InvalidAddress or ServerUnreachable (after `timeout` seconds).
    """
    transport = Transport(Connector(address, **credentials))
    try:
        return status_dict(transport.status(timeout, rounds))
    finally:
        transport.close()


def status_dict(message: pb.RunStatus) -> dict[str, Any]:
    """The status as plain values; digests as hexadecimal text."""
    return {
        "run_id": message.run_id,
        "state": message.state,
        "uptime_seconds": message.uptime_seconds,
        "parameters": message.parameters,
        "rounds": message.rounds,
        "bytes_in": message.bytes_in,
        "bytes_out": message.bytes_out,
        "tokens": message.tokens,
        "stopped": message.stopped,
        "sessions": message.sessions,
        "version": message.version,
        "rates": _fields(message.rates),
        "storage": _fields(message.storage) if message.HasField("storage") else None,
        "config": dict(message.config),
        "workers": [
            {
                "worker_id": w.worker_id,
                "state": w.state,
                "seen_seconds": w.seen_seconds,
                "step": w.last.step,
                "steps": w.last.steps,
                "train_seconds": w.last.train_seconds,
                "stall_seconds": w.last.stall_seconds,
                "bytes_up": w.last.bytes_up,
                "bytes_down": w.last.bytes_down,
                "counted": w.counted,
                "not_counted": w.not_counted,
                "loss": w.last.loss if w.last.HasField("loss") else None,
                "tokens": w.last.tokens,
                "shard": w.shard,
                "sync_every": w.sync_every,
                "steps_per_second": w.steps_per_second,
            }
            for w in message.workers
        ],
        "fragments": [
            {
                "index": f.index,
                "kind": f.kind,
                "parameters": f.parameters,
                "version": f.version,
                "digest": f"0x{f.digest:016x}",
                "contributed": list(f.contributed),
                "waiting_for": list(f.waiting_for),
                "waits": [_fields(w) | {"at_most": w.at_most if w.HasField("at_most") else None} for w in f.waits],
                "open_seconds": f.open_seconds,
                "round_seconds": f.round_seconds,
                "update_bytes": f.update_bytes,
                "rounds": [_round_dict(r) for r in f.rounds],
            }
            for f in message.fragments
        ],
    }


def _round_dict(record: pb.RoundStatus) -> dict[str, Any]:
    return {
        "version": record.version,
        "members": [_fields(m) for m in record.members],
        "missed": list(record.missed),
        "open_seconds": record.open_seconds,
        "fill_seconds": record.fill_seconds,
        "grace_seconds": record.grace_seconds,
    }


def _fields(message: pb.Rates | pb.Storage | pb.Wait | pb.RoundMember) -> dict[str, Any]:
    """Of a message of numbers and texts."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def snapshots(
    address: str | None = None, timeout: float = 10.0, **credentials: Unpack[Credentials]
) -> list[dict[str, Any]]:
    """The snapshots that the server keeps on disk, oldest first: number, version, saved_at (seconds since 1970).

    `version` is the least of the fragments'. Raises InvalidAddress or ServerUnreachable (after `timeout` seconds).
    """
    transport = Transport(Connector(address, **credentials))
    try:
        kept = transport.describe(timeout).kept
    finally:
        transport.close()
    return [{"number": k.number, "version": min(k.versions, default=0), "saved_at": k.saved_at} for k in kept]


def export(
    address: str | None,
    path: Path,
    timeout: float = 30.0,
    *,
    snapshot: int | None = None,
    **credentials: Unpack[Credentials],
) -> int:
    """Write the run's global parameters to a safetensors file, under the model's own names and dtypes.

    `snapshot`: not as they are, but as the kept snapshot of this number has them (`snapshots`).

    Of tied tensors the first name is written; the file's metadata lists the others. Returns the number of
    tensors. Raises InvalidAddress, ServerUnreachable, NotReady, NotKept or OSError.
    """
    transport = Transport(Connector(address, **credentials))
    try:
        description = transport.describe(timeout)
        if not description.seeded:
            raise NotReady(f"the run at {transport.address} has no parameters yet: no worker has joined and seeded it")
        manifest = manifest_from_pb(description.manifest)
        config = description.config
        layout = build_layout(manifest, int(config["num_fragments"]), Pattern(config["fragment_pattern"]))
        tensors: dict[str, tuple[TensorSpec, NDArray[Any]]] = {}
        for fragment in layout.fragments:
            values = _pull_snapshot(transport, description.run_id, fragment, timeout, snapshot)
            tensors |= _tensors(fragment, values)
    finally:
        transport.close()
    metadata = {f"tied.{t.name}": ",".join(t.tied) for t in manifest.tensors if t.tied}
    temporary = path.with_name(path.name + ".tmp")
    # The entries point into the arrays, which `tensors` keeps alive until the file is written.
    entries = {
        name: safetensors.TensorSpec(
            dtype=spec.dtype, shape=list(spec.shape), data_ptr=values.ctypes.data, data_len=values.nbytes
        )
        for name, (spec, values) in tensors.items()
    }
    safetensors.serialize_file(entries, temporary, metadata={"format": "pt", **metadata})
    temporary.replace(path)
    return len(tensors)


def _pull_snapshot(transport: Transport, run_id: str, fragment: Fragment, timeout: float, kept: int | None) -> Floats:
    request = pb.PullRequest(run_id=run_id, fragment=fragment.index, snapshot=True, kept=kept)
    values = np.empty(fragment.length, np.float32)
    try:
        items = transport.pull(request, Target(None, values), timeout)
    except CorruptFrame as error:
        raise ConnectionClosed(f"the snapshot of fragment {fragment.index} is damaged: {error}") from error
    if not items or items[-1].found != items[-1].digest:
        raise ConnectionClosed(f"the snapshot of fragment {fragment.index} does not match its digest")
    return values


def _tensors(fragment: Fragment, values: Floats) -> dict[str, tuple[TensorSpec, NDArray[Any]]]:
    return {
        slot.tensor.name: (slot.tensor, _as_dtype(values[slot.offset : slot.end], slot.tensor.dtype))
        for slot in fragment.slots
    }


def _as_dtype(values: Floats, dtype: str) -> NDArray[Any]:
    """The values in the file's dtype; bfloat16, which numpy lacks, as its bits, rounded to nearest even."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(np.float16) if dtype == "float16" else values
