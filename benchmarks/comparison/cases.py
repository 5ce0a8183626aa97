"""The runs of the comparison. All see the same number of tokens in total."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

H = 50
FP32 = {"uplink_codec": "fp32", "downlink_codec": "fp32"}
STREAMING: dict[str, Any] = {
    "sync_every": H,
    "num_fragments": 4,
    "overlap_steps": 2,
    "mixing_alpha": 0.5,
    "outer_lr": 0.7,
    "outer_momentum": 0.9,
    "grace_seconds": "inf",
    **FP32,
}
CLASSIC = STREAMING | {"num_fragments": 1, "overlap_steps": 0, "mixing_alpha": 0.0}
ASYNC = STREAMING | {"outer_optimizer": "delayed-nesterov", "overlap_steps": 0}
UNEVEN = (1.0, 1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run, for each of its seeds."""

    name: str
    config: dict[str, Any] = field(default_factory=lambda: STREAMING)
    """Of the run; empty for synchronous data parallel."""
    seeds: tuple[int, ...] = (0,)
    workers: int = 4
    by_package: bool = False
    """Each worker trains on whole packages of its own instead of on everything."""
    dropped: float = 0.0
    """Share of contributions that never reach the server."""
    step_seconds: tuple[float, ...] = ()
    """Of each worker; empty for equal ones."""
    joins: tuple[float, ...] = ()
    """At which share of the tokens each worker joins; empty for all at the start."""
    leaves: tuple[float, ...] = ()
    """At which share each leaves; empty for all at the end."""


def codecs(up: str, down: str) -> dict[str, Any]:
    return STREAMING | {"uplink_codec": up, "downlink_codec": down}


THREE = (0, 1, 2)

CASES: tuple[Case, ...] = (
    Case(name="data-parallel", config={}),
    Case(name="classic", config=CLASSIC),
    Case(name="streaming", seeds=THREE),
    Case(name="H=10", config=STREAMING | {"sync_every": 10}),
    Case(name="H=100", config=STREAMING | {"sync_every": 100}),
    Case(name="tau=0", config=STREAMING | {"overlap_steps": 0}),
    Case(name="tau=5", config=STREAMING | {"overlap_steps": 5}),
    Case(name="alpha=0", config=STREAMING | {"mixing_alpha": 0.0}),
    Case(name="int4/int4", config=codecs("int4", "int4"), seeds=THREE),
    Case(name="int3/int3", config=codecs("int3", "int3"), seeds=THREE),
    Case(name="int2+ef/int4", config=codecs("int2", "int4"), seeds=THREE),
    Case(name="ternary+ef/int4", config=codecs("ternary", "int4")),
    Case(name="e3m0/fp32", config=codecs("e3m0", "fp32")),
    Case(name="e3m0/e3m0", config=codecs("e3m0", "e3m0")),
    Case(name="mxfp4/mxfp4", config=codecs("mxfp4", "mxfp4")),
    Case(name="workers=1", workers=1),
    Case(name="workers=2", workers=2),
    Case(name="workers=8", workers=8),
    Case(name="by-package", by_package=True),
    Case(name="dropped=10%", dropped=0.1),
    Case(name="dropped=30%", dropped=0.3),
    Case(name="dropped=50%", dropped=0.5, seeds=THREE),
    Case(name="ramp 1-4", joins=(0.0, 0.25, 0.5, 0.75)),
    Case(name="halving 4-2", leaves=(1.0, 1.0, 0.5, 0.5)),
    Case(name="async plain", config=ASYNC | {"delay_buffer": 1}, step_seconds=UNEVEN),
    Case(name="async delayed", config=ASYNC, step_seconds=UNEVEN, seeds=THREE),
    Case(name="async delayed, DyLU", config=ASYNC | {"dynamic_local_updates": True}, step_seconds=UNEVEN),
    Case(name="uneven, DyLU", config=STREAMING | {"dynamic_local_updates": True}, step_seconds=UNEVEN),
)
