"""What a seed means: the settings of the run, the workers' abilities, and how long the faults last."""

from __future__ import annotations

import random
from dataclasses import dataclass

from diloco_server.config import DELAYED, RunConfig

from .line import Speed

CODECS = (
    ("int4", "int4"),
    ("int4", "int4"),
    ("int4", "int3"),
    ("int3", "int3"),
    ("int3", "int8"),
    ("e3m0", "e3m0"),
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("mxfp4", "mxfp4"),
    ("int2", "int4"),
    ("ternary", "int4"),
    ("int8", "fp32"),
)
"""Up and down."""

STEPS = 36
"""Inner steps of all workers together while there are faults, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """Of one worker."""

    step_seconds: float
    speed: Speed
    jitter: float
    """Seconds by which an answer may be late, at most."""
    tokens: int
    parts: int
    """Streams in which a contribution travels."""
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Of one simulated run."""

    seed: int
    config: RunConfig
    layers: int
    size: int
    """Values of a layer."""
    buffers: bool
    workers: int
    period: float
    """Seconds a period takes a usual worker."""
    duration: float
    """Seconds until the last fault."""
    faults: int
    commit_seconds: float


def draw_setting(seed: int) -> Setting:
    """The setting that goes with a seed."""
    rng = random.Random(f"setting {seed}")
    workers = rng.choice((1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 5, 8))
    period = rng.uniform(0.5, 6.0)
    config = _draw_config(rng, period)
    rounds = min(5.0, max(1.2, STEPS / (workers * config.sync_every)))
    return Setting(
        seed=seed,
        config=config,
        layers=config.num_fragments + rng.choice((0, 0, 1, 2)),
        size=rng.choice((64, 100)),
        buffers=rng.random() < 0.25,
        workers=workers,
        period=period,
        duration=rounds * period,
        faults=rng.randint(5, 10),
        commit_seconds=rng.choice((0.0, 0.01, 0.1)) * period,
    )


def _draw_config(rng: random.Random, period: float) -> RunConfig:
    optimizer = rng.choice(("nesterov", "nesterov", "nesterov", "sgd", DELAYED, DELAYED))
    fragments, overlap = rng.choice((1, 1, 2, 2, 3, 4)), rng.randint(0, 3)
    up, down = rng.choice(CODECS)
    return RunConfig(
        sync_every=max(rng.randint(4, 24), fragments, overlap + 1),
        num_fragments=fragments,
        fragment_pattern=rng.choice(("strided", "sequential", "balanced")),
        overlap_steps=overlap,
        mixing_alpha=rng.choice((0.0, 0.5, 0.5, 1.0, rng.random())),
        outer_optimizer=optimizer,
        outer_lr=rng.choice((0.7, 0.7, 1.0, 0.4)),
        outer_momentum=rng.choice((0.9, 0.9, 0.5, 0.0)),
        delay_buffer=rng.choice(("auto", "auto", "1", "3")),
        uplink_codec=up,
        downlink_codec=down,
        error_feedback=rng.choice(("auto", "auto", "on")),
        min_workers=rng.choice((1, 1, 1, 2, 3)),
        grace_seconds=rng.choice(("auto", "auto", "0", str(round(rng.uniform(0.1, 1.0) * period, 3)), "inf")),
        lease_seconds=max(1.0, round(rng.uniform(0.3, 1.5) * period, 3)),
        weighting=rng.choice(("tokens", "tokens", "uniform")),
        max_outer_grad_norm=rng.choice((10.0, 10.0, 3.0, 0.0)),
        max_staleness=rng.choice(("auto", "auto", "1", "4")),
        max_away=rng.choice((32, 32, 1, 2, 4)),
        dynamic_local_updates=rng.random() < 0.25,
    )


def draw_ability(rng: random.Random, setting: Setting) -> Ability:
    """Of the next worker."""
    step = setting.period / setting.config.sync_every * rng.choice((1.0, 1.0, rng.uniform(0.7, 1.5), rng.uniform(1, 4)))
    latency = rng.choice((0.0, 0.001, 0.02, 0.1)) * setting.period
    rate = rng.choice((float("inf"), 4096 / setting.period, 100_000 / setting.period))
    return Ability(
        step_seconds=step,
        speed=Speed(latency=latency, up=rate, down=rng.choice((float("inf"), rate))),
        jitter=rng.choice((0.0, latency, 0.05 * setting.period)),
        tokens=rng.choice((1, 1, 7, 100)),
        parts=rng.choice((1, 1, 1, 2)),
        stride=rng.choice((1, 1, 4)),
    )
