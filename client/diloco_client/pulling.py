"""Pulls: updates or a snapshot down, every frame checked and decoded as it comes, resumed where it broke.

A pull may travel as several stripes, each over a connection of its own: every one brings a share of each item's frames.
"""

from __future__ import annotations

from collections.abc import Sequence

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import CorruptFrame
from diloco_proto.errors import DamagedFrame

from .landing import Landing, PulledItem, StripesDiffer, Target
from .lines import Lines
from .pushing import MAX_DAMAGED, SLOWEST
from .retry import Stalled


class PullStripe:
    """One stream of a pull, over all its attempts."""

    def __init__(self, lines: Lines, name: str, request: pb.PullRequest, target: Target) -> None:
        self._lines = lines
        self._name = name
        self._request = pb.PullRequest()
        self._request.CopyFrom(request)
        self._target = target
        self._landing = Landing(target, striped=request.stripes > 1)
        self._patience = lines.network.progress_timeout
        self.progress = 0
        self._damaged = 0
        self._damaged_at = (0, 0)

    def attempt(self) -> list[PulledItem]:
        """Pull what is missing. Raises ConnectionError for what another attempt may mend, a typed error,
        CorruptFrame or StripesDiffer."""
        current = self._landing.resume(self._request)
        self._lines.sent(current.ByteSize())
        try:
            with self._lines.call(self._name, lambda stub, _: stub.Pull(current), self._patience) as (call, watch):
                for reply in call:
                    watch.moved()
                    size = self._landing.take(reply)
                    self._lines.received(size)
                    self.progress += 1
                    self._lines.after_receiving(size, watch)
        except DamagedFrame as error:
            self._on_damage(error)
            raise ConnectionError(str(error)) from error
        except Stalled:
            self._patience = min(2 * self._patience, SLOWEST * self._lines.network.progress_timeout)
            raise
        return self._landing.finish()

    def _on_damage(self, error: DamagedFrame) -> None:
        at = self._landing.position
        self._damaged = self._damaged + 1 if at == self._damaged_at else 1
        self._damaged_at = at
        if self._damaged < MAX_DAMAGED:
            return
        if self._request.snapshot:
            raise DamagedFrame(
                f"{error}; so it went {self._damaged} times in a row. Something on the way changes bytes: a proxy, a "
                "network card, or the memory of one of the machines. TLS would show which"
            ) from error
        if self._request.stripes > 1:
            raise StripesDiffer(str(error)) from error
        self._request.snapshot = True  # perhaps it is the server's copy of the update
        self._landing = Landing(self._target)
        self._damaged = 0


def split_pull(request: pb.PullRequest, count: int) -> list[pb.PullRequest]:
    """The pull as `count` of them, each for its share of every item's frames."""
    stripes = []
    for number in range(count):
        share = pb.PullRequest()
        share.CopyFrom(request)
        share.stripe, share.stripes = number, count
        stripes.append(share)
    return stripes


def join_stripes(stripes: Sequence[list[PulledItem]], target: Target) -> list[PulledItem]:
    """The items that all stripes have a share of, put together.

    Raises StripesDiffer when they are of different versions, since the fragment moved on between them; CorruptFrame
    unless each item covers the target.
    """
    if len({tuple((i.kind, i.version) for i in items) for items in stripes}) > 1:
        raise StripesDiffer("they lead to different versions")
    return [_joined(shares, target) for shares in zip(*stripes, strict=True)]


def _joined(shares: Sequence[PulledItem], target: Target) -> PulledItem:
    end = target.blocks.start
    for share in shares:
        if share.num_frames and share.blocks.start != end:
            raise CorruptFrame(f"the frames go on at block {share.blocks.start}, not at {end}")
        end = share.blocks.stop if share.num_frames else end
    if end != target.blocks.stop:
        raise CorruptFrame(f"the frames end at block {end} of {target.blocks}")
    return PulledItem(
        *(shares[0].kind, shares[0].version, shares[0].digest),
        num_frames=sum(share.num_frames for share in shares),
        blocks=target.blocks,
        found=sum(share.found for share in shares) % (1 << 64),
        nbytes=sum(share.nbytes for share in shares),
    )
