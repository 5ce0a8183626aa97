"""run.json: what a state directory is the state of, for people and for the next start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from diloco_proto.errors import UnsupportedModel
from diloco_proto.manifest import Manifest, Role, TensorSpec

from .errors import StateMismatch

FORMAT_VERSION = 1
"""Of the state directory."""


@dataclass(frozen=True)
class RunInfo:
    """What does not change while a run lasts, except for its lineage and how that began."""

    run_id: str
    config: dict[str, str]
    """Setting -> value, as it would stand in a config file."""
    manifest: Manifest
    fingerprint: int
    """Of the layout."""
    lineage: int = 1
    """One more each time the run went back to an earlier state."""
    rolled_back_to: int | None = None
    """By `--rollback`, until a start without it."""
    created: float = field(default_factory=lambda: datetime.now(UTC).timestamp())
    """Seconds since 1970."""


def pack(info: RunInfo) -> bytes:
    content = {
        "format": FORMAT_VERSION,
        "run_id": info.run_id,
        "lineage": info.lineage,
        "rolled_back_to": info.rolled_back_to,
        "created": datetime.fromtimestamp(info.created, UTC).isoformat(),
        "config": info.config,
        "fingerprint": f"{info.fingerprint:016x}",
        "tensors": [asdict(t) for t in info.manifest.tensors],
    }
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def unpack(data: bytes, path: object) -> RunInfo:
    """Raises StateMismatch for what this version of diloco cannot read."""
    try:
        content = json.loads(data)
        version = int(content["format"])
        if version <= FORMAT_VERSION:
            return RunInfo(
                run_id=str(content["run_id"]),
                lineage=int(content["lineage"]),
                rolled_back_to=content.get("rolled_back_to"),
                created=datetime.fromisoformat(content["created"]).timestamp(),
                config={str(k): str(v) for k, v in content["config"].items()},
                fingerprint=int(content["fingerprint"], 16),
                manifest=Manifest(tuple(_tensor(t) for t in content["tensors"])),
            )
    except (ValueError, KeyError, TypeError, AttributeError, UnsupportedModel) as error:
        raise StateMismatch(
            f"{path} cannot be read ({error!r}): put back a copy of it, or begin a new run with --new, which keeps "
            "what is there in old/"
        ) from error
    raise StateMismatch(
        f"{path} has format {version}, this version of diloco knows {FORMAT_VERSION}: install a newer one"
    )


def _tensor(entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(
        name=entry["name"],
        shape=tuple(entry["shape"]),
        dtype=entry["dtype"],
        role=Role(entry["role"]),
        tied=tuple(entry["tied"]),
    )


def differences(info: RunInfo, config: dict[str, str], fingerprint: int | None) -> list[str]:
    """In what a run with this configuration would differ. Settings that only one of both knows do not count."""
    found = [
        f"{name}: {there} there, {config[name]} now"
        for name, there in info.config.items()
        if config.get(name, there) != there
    ]
    if fingerprint not in (None, info.fingerprint):
        found.append(f"the model's fragments: fingerprint {info.fingerprint:016x} there, {fingerprint:016x} now")
    return found
