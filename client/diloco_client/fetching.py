"""Fetches a fragment's global parameters and makes sure that they are what the server has."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch.profiler import record_function

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import CorruptFrame
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import ConnectionClosed
from diloco_proto.frame_messages import Data

from .binding import Binding
from .flights import Base
from .landing import PulledItem, Target
from .transport import Transport

log = logging.getLogger("diloco")

SNAPSHOT_TRIES = 3
"""Of frames that arrive whole one by one, and yet do not make the parameters that they should."""


class _ProfiledTarget(Target):
    def land(self, item: PulledItem, data: Data, base: Floats | None) -> None:
        with record_function("diloco::decode"):
            super().land(item, data, base)


class Fetcher:
    """`credible` says of what was fetched and its digest whether it is what the server has, as far as this process can
    tell."""

    def __init__(self, transport: Transport, binding: Binding, credible: Callable[[Base, int], bool]) -> None:
        self._transport = transport
        self._binding = binding
        self._credible = credible

    def fetch(self, fragment: int, base: Base | None, run_id: str) -> Base:
        """The fragment's newest parameters: by updates on top of `base`, or its snapshot. Raises RolledBack."""
        newer = self._fetch_once(fragment, base, run_id)
        if newer is None and base is not None:
            log.warning("fragment %d differs from the server's after its update; fetching it afresh", fragment)
        tries = 0 if base is not None else 1
        while newer is None and tries < SNAPSHOT_TRIES:
            newer = self._fetch_once(fragment, None, run_id)
            tries += 1
        if newer is None:
            raise unfit_snapshot(fragment)
        return newer

    def _fetch_once(self, fragment: int, base: Base | None, run_id: str) -> Base | None:
        """None when what came does not lead to what the server has."""
        request = pb.PullRequest(run_id=run_id, fragment=fragment, snapshot=base is None)
        if base is not None:
            request.since_version = base.version
        span = self._binding.spans[fragment]
        if not span.is_whole:
            request.part.CopyFrom(span.part)
        former = None if base is None else base.theta
        target = _ProfiledTarget(former, self._binding.host_buffer(fragment), span.first_block)
        try:
            items = self._transport.pull(request, target)
        except CorruptFrame as error:
            log.warning("fragment %d: %s", fragment, error)
            return None
        for item in items:
            if item.kind == pb.ITEM_UPDATE:
                self._transport.counters.update(item.nbytes, span.parameters)
        if not items:
            return base
        newer = Base(items[-1].version, target.theta, items[-1].digest)
        return newer if self._credible(newer, items[-1].found) else None


def unfit_snapshot(fragment: int) -> ConnectionClosed:
    """What the server sends does not fit its own word, again and again."""
    return ConnectionClosed(
        f"the server's snapshot of fragment {fragment} does not match its own digest, {SNAPSHOT_TRIES} times in a row: "
        "the memory of this machine or of the server may be faulty"
    )
