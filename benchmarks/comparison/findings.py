"""What the papers found, and whether the runs of the comparison show it. Differences are relative to `streaming`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Differences = dict[str, float]


@dataclass(frozen=True)
class Finding:
    """One sentence of a paper, the cases that it is about, and how it is judged: (what is seen here, does it hold)."""

    text: str
    needs: tuple[str, ...]
    judge: Callable[[Differences], tuple[str, bool]]


def percent(value: float) -> str:
    return f"{100 * value:+.2f} %"


def _apart(d: Differences, a: str, b: str) -> float:
    return (1 + d[a]) / (1 + d[b]) - 1


def _within(name: str, limit: float) -> Callable[[Differences], tuple[str, bool]]:
    return lambda d: (percent(d[name]), d[name] <= limit)


def _than(name: str, other: str, limit: float) -> Callable[[Differences], tuple[str, bool]]:
    """`name` is at most `limit` above `other`."""
    return lambda d: (f"{percent(_apart(d, name, other))} against {other}", _apart(d, name, other) <= limit)


CLASSIC = Finding(
    "Streaming DiLoCo loses nothing against the classic one (2501.18512)",
    ("classic",),
    lambda d: (percent(_apart(d, "streaming", "classic")) + " against classic", d["classic"] >= -0.001),
)
GAP = Finding(
    "DiLoCo comes near data parallel: a few percent at small size (2503.09799)",
    ("data-parallel",),
    lambda d: (percent(_apart(d, "streaming", "data-parallel")) + " against data-parallel", d["data-parallel"] > -0.04),
)
MIXING = Finding(
    "Mixing (α=0.5) is better than throwing the overlapped steps away (α=0) (2501.18512)",
    ("alpha=0",),
    lambda d: (percent(d["alpha=0"]) + " with α=0", d["alpha=0"] > 0),
)
RAMPS = Finding(
    "Quality follows total compute, not who joined when: a ramp and a halving end alike (2311.08105)",
    ("ramp 1-4", "halving 4-2"),
    lambda d: (
        percent(_apart(d, "ramp 1-4", "halving 4-2")) + " ramp against halving",
        abs(_apart(d, "ramp 1-4", "halving 4-2")) < 0.02,
    ),
)
PLAIN = Finding(
    "Nesterov on every push fails; delayed Nesterov is clearly better (2401.09135)",
    ("async plain", "async delayed"),
    lambda d: (
        f"plain {percent(d['async plain'])}, delayed {percent(d['async delayed'])}",
        d["async plain"] > d["async delayed"] + 0.01,
    ),
)
FINDINGS = (
    CLASSIC,
    GAP,
    Finding("More steps a round cost little: H=100 against H=50 (2311.08105)", ("H=100",), _within("H=100", 0.03)),
    Finding("Overlap of 5 steps costs under 0.2 % (2501.18512)", ("tau=5", "tau=0"), _than("tau=5", "tau=0", 0.002)),
    MIXING,
    Finding("4 bits both ways: within 0.1 % of fp32", ("int4/int4",), _within("int4/int4", 0.001)),
    Finding("3 bits both ways: within 0.2 %", ("int3/int3",), _within("int3/int3", 0.002)),
    Finding("2 bits up with error feedback: within 0.5 %", ("int2+ef/int4",), _within("int2+ef/int4", 0.005)),
    Finding("The paper's 4-bit float (e3m0) up costs next to nothing", ("e3m0/fp32",), _within("e3m0/fp32", 0.002)),
    Finding("Workers with data of their own kind end alike (2311.08105)", ("by-package",), _within("by-package", 0.02)),
    Finding("10 % of contributions dropped cost almost nothing", ("dropped=10%",), _within("dropped=10%", 0.01)),
    Finding("Half of them dropped: +2.1 % (2311.08105)", ("dropped=50%",), _within("dropped=50%", 0.03)),
    RAMPS,
    PLAIN,
    Finding("Delayed Nesterov at uneven speeds: within 0.5 %", ("async delayed",), _within("async delayed", 0.005)),
    Finding(
        "DyLU helps delayed Nesterov (2401.09135)",
        ("async delayed, DyLU", "async delayed"),
        _than("async delayed, DyLU", "async delayed", 0.0),
    ),
)
