"""How fast a run goes of late, from samples of its totals. Pure: time is passed in, in seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MINUTE, TEN_MINUTES, HOUR, DAY = 60.0, 600.0, 3600.0, 86400.0

SAMPLE_SECONDS = 10.0
"""Between two samples: an hour of them is 360."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the start."""

    rounds: int = 0
    tokens: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """Each over a while, or since the first sample if that is shorter."""

    rounds_per_hour: float
    """Of ten minutes, like the tokens."""
    tokens_per_second: float
    bytes_in_per_second: float
    """Of a minute."""
    bytes_out_per_second: float
    bytes_out_per_day: float
    """Of an hour: what a day like it sends."""


class Rates:
    """Remembers an hour of totals."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Totals]] = deque()

    def note(self, now: float, totals: Totals) -> None:
        """Call it whenever something may have changed; most calls keep nothing."""
        if self._samples and now - self._samples[-1][0] < SAMPLE_SECONDS:
            return
        self._samples.append((now, totals))
        while len(self._samples) > 1 and now - self._samples[1][0] >= HOUR:
            self._samples.popleft()

    def means(self, now: float, totals: Totals) -> Means:
        """The rates that led to these totals; all 0 before the first sample."""
        seconds, past = self._since(now, TEN_MINUTES)
        minute, before = self._since(now, MINUTE)
        hour, long_before = self._since(now, HOUR)
        return Means(
            rounds_per_hour=_mean(totals.rounds, past.rounds, seconds) * HOUR,
            tokens_per_second=_mean(totals.tokens, past.tokens, seconds),
            bytes_in_per_second=_mean(totals.bytes_in, before.bytes_in, minute),
            bytes_out_per_second=_mean(totals.bytes_out, before.bytes_out, minute),
            bytes_out_per_day=_mean(totals.bytes_out, long_before.bytes_out, hour) * DAY,
        )

    def _since(self, now: float, window: float) -> tuple[float, Totals]:
        """The youngest sample that is at least `window` old, else the oldest, and its age."""
        if not self._samples:
            return 0.0, Totals()
        for at, totals in reversed(self._samples):
            if now - at >= window:
                return now - at, totals
        at, totals = self._samples[0]
        return now - at, totals


def _mean(now: int, before: int, seconds: float) -> float:
    """Nothing is extrapolated from moments. A total may have been taken back, by a run that begins anew."""
    return max(0, now - before) / max(seconds, SAMPLE_SECONDS)
