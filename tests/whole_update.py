"""An outer step whose update is wanted whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from diloco_proto.codec import BLOCK, Encoded, empty_encoded
from diloco_server import outer


def placing(update: Encoded) -> Callable[[int, Encoded], None]:
    """Puts each part of it where it belongs."""

    def take(first: int, part: Encoded) -> None:
        here = update.part(first, first + part.num_blocks)
        here.scales[:], here.codes[:] = part.scales, part.codes

    return take


def commit(
    state: outer.FragmentState,
    contributions: Sequence[Encoded],
    weights: Sequence[float],
    settings: outer.OuterSettings,
    threads: Executor | None = None,
    *,
    blocks: int | None = None,
    scales: Sequence[float] | None = None,
    delay: int = 1,
) -> Encoded:
    """`outer.commit`, a frame at a time if `blocks` says nothing else."""
    fmt = settings.downlink
    update = empty_encoded(fmt, state.theta.size // BLOCK)
    step = (state, contributions, weights, settings, placing(update), threads)
    outer.commit(*step, blocks=blocks or fmt.spec.frame_blocks, scales=scales, delay=delay)
    return update
