"""Two bare workers of one run with one large fragment: the client's transport moves what they push and pull."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from raw_worker import RawWorker, manifest_of

from diloco_client.connect import Connector
from diloco_client.landing import PulledItem, Target
from diloco_client.transport import Transport
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Encoded, Format, encode_fragment, frame_blocks, pack_frames
from diloco_proto.codec.formats import Floats
from diloco_proto.frame_messages import Data

SETTINGS = ("--num-fragments=1", "--min-workers=2", "--grace-seconds=inf", "--lease-seconds=3600")
"""Of their server: a round closes when both have pushed."""


class Pair:
    """The first worker's transfers are measured; the second one ends each round."""

    def __init__(self, address: str, blocks: int, fmt: Format) -> None:
        """`blocks`: of 64 values, in the fragment."""
        self._values = np.random.default_rng(0).standard_normal(blocks * BLOCK, dtype=np.float32) * np.float32(1e-3)
        self._fmt = fmt
        self._frames = _frames(fmt, self._values)
        self._version = 0
        self._connector = Connector(address)
        self._transport = Transport(self._connector)
        stub = self._connector.line("session").stub
        self._workers = [RawWorker(self._connector.target, name) for name in ("first", "second")]
        for worker in self._workers:
            worker.stub = stub  # through TLS and with a token, where the server wants them
        self.push_bytes = sum(map(len, self._frames))
        """Of frames."""
        self.pull_bytes = 0
        """Likewise, of the last update that was pulled."""

    def __enter__(self) -> Self:
        self._transport.wait_until_up(60, lambda: None)
        manifest = manifest_of(self._values.size)
        first, second = self._workers
        first.join(manifest, timeout=3600)
        first.expect("seed_wanted")
        self._push(first, _frames(Format.FP32, self._values), purpose=pb.PURPOSE_SEED, codec=pb.CODEC_FP32)
        first.expect("seeded")
        second.join(manifest, timeout=3600).expect("welcome")
        for worker in self._workers:
            worker.say(ready=pb.Ready())
        for worker in self._workers:
            worker.expect("opened")
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.__exit__()
        self._transport.close()

    def push(self) -> float:
        """The first worker's contribution to the open round; the seconds until it is acknowledged."""
        return self._contribute(self._workers[0])

    def end_round(self) -> None:
        """The second one contributes too, and the round is committed."""
        self._contribute(self._workers[1])
        for worker in self._workers:
            worker.expect("committed")
        self._version += 1

    def pull(self) -> float:
        """The last round's update; the seconds that it took."""
        request = pb.PullRequest(fragment=0, since_version=self._version - 1)
        kept = _Kept(self._values, self._values)
        began = time.perf_counter()
        (item,) = self._transport.pull(request, kept)
        taken = time.perf_counter() - began
        assert item.version == self._version
        self.pull_bytes = sum(map(len, kept.frames))
        return taken

    def _contribute(self, worker: RawWorker) -> float:
        codec, version = int(self._fmt), self._version
        return self._push(worker, self._frames, codec=codec, base_version=version, since_version=version)

    def _push(self, worker: RawWorker, frames: list[bytes], **fields: object) -> float:
        header = worker.header(0, frames, **fields)
        began = time.perf_counter()
        outcome = self._transport.push(header, frames)
        taken = time.perf_counter() - began
        assert outcome.kind in (pb.OUTCOME_STAGED, pb.OUTCOME_SEEDED), outcome
        return taken


@dataclass(frozen=True)
class _Kept(Target):
    """Keeps the frames as they come, undecoded."""

    frames: list[Data] = field(default_factory=list)

    def land(self, item: PulledItem, data: Data, base: Floats | None) -> None:
        first, count = frame_blocks(data)
        item.blocks = range(item.blocks.start if item.blocks else first, first + count)
        self.frames.append(data)


def _frames(fmt: Format, values: Floats) -> list[bytes]:
    """In fp32 stored as they are, 1 MiB and a header each."""
    if fmt is not Format.FP32:
        return pack_frames(encode_fragment(fmt, values))
    codes = values.view(np.uint8)
    return pack_frames(Encoded(fmt, codes[:0], codes), level=None)
