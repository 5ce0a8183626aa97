"""Pulls of a part: the blocks of it and no others, cut at both ends, resumed and striped like a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import grpc
import numpy as np
import pytest
from raw_worker import RawWorker, flat, frames_of, manifest_of

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import (
    BLOCK,
    Encoded,
    Format,
    decode,
    digest,
    encode_fragment,
    frame_blocks,
    pack_frames,
    read_frame,
)
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import InvalidContribution
from diloco_proto.manifest import Fragment, Role
from diloco_proto.wire import error_from_rpc
from diloco_server import RunConfig, serve
from diloco_server.cuts import cuts_of, recut

SIZE = 1_200_000
"""Values: five frames in fp32, one in int4."""
BLOCKS = SIZE // BLOCK
PARTS = [(0, BLOCKS), (0, 1), (BLOCKS - 1, 1), (4096, 4096), (1, 4095), (4095, 2), (3000, 12_345), (5000, 100)]


def values(seed: int) -> Floats:
    return flat(np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32))


def of(first: int, blocks: int) -> pb.Part:
    return pb.Part(first_block=first, num_blocks=blocks)


def joined(frames: list[bytes], first: int) -> Floats:
    """The values of frames that follow one another from block `first` on."""
    pieces = []
    for data in frames:
        frame = read_frame(data)
        assert frame.first_block == first
        out = np.empty(frame.num_blocks * BLOCK, np.float32)
        decode(frame.format, frame.scales, frame.codes, out)
        pieces.append(out)
        first += frame.num_blocks
    return np.concatenate(pieces)


@pytest.fixture(scope="module")
def worker() -> Iterator[RawWorker]:
    """Of a run whose only fragment has had one round: θ and an update in int4."""
    config = RunConfig(
        num_fragments=1, uplink_codec="fp32", downlink_codec="int4", outer_optimizer="sgd", grace_seconds="inf"
    )
    with serve(config) as server, RawWorker(server.address) as worker:
        worker.enter(manifest_of(SIZE), [values(1)])
        worker.push(0, frames_of(values(2)))
        worker.expect("committed")
        yield worker


@pytest.mark.parametrize(("first", "blocks"), PARTS)
def test_a_part_has_the_values_of_the_whole_and_parts_of_its_digest(worker: RawWorker, first: int, blocks: int) -> None:
    for kind in ({"snapshot": True}, {"since_version": 0}):
        ((item, frames),) = worker.pull(0, **kind)
        ((its_item, its_frames),) = worker.pull(0, part=of(first, blocks), **kind)
        whole, part = joined(frames, 0), joined(its_frames, first)
        assert part.tobytes() == whole[first * BLOCK : (first + blocks) * BLOCK].tobytes()
        assert (its_item.version, its_item.digest, its_item.codec) == (item.version, item.digest, item.codec)
        assert its_item.frames == len(its_frames)


def test_digests_of_parts_add_up_to_the_announced_one(worker: RawWorker) -> None:
    bounds = [BLOCKS * r // 3 for r in range(4)]
    total = 0
    for first, stop in pairwise(bounds):
        ((item, frames),) = worker.pull(0, snapshot=True, part=of(first, stop - first))
        total += digest(joined(frames, first), first)
    assert total % (1 << 64) == item.digest


def test_frames_within_a_part_are_those_of_the_whole(worker: RawWorker) -> None:
    ((_, frames),) = worker.pull(0, snapshot=True)
    ((_, its),) = worker.pull(0, snapshot=True, part=of(1000, 4096 * 3))
    assert its[1:-1] == frames[1:3]
    assert [frame_blocks(f) for f in its] == [(1000, 3096), (4096, 4096), (8192, 4096), (12288, 1000)]


def test_a_part_is_resumed_and_striped_by_its_own_frames(worker: RawWorker) -> None:
    part = of(1000, 4096 * 3)
    ((_, whole),) = worker.pull(0, snapshot=True, part=part)
    ((item, rest),) = worker.pull(0, snapshot=True, part=part, skip_frames=3, item_version=1)
    assert (item.frames, rest) == (1, whole[3:])
    stripes = [worker.pull(0, snapshot=True, part=part, stripes=3, stripe=i)[0][1] for i in range(3)]
    assert [f for stripe in stripes for f in stripe] == whole


@pytest.mark.parametrize(("first", "blocks"), [(0, 0), (5, 0), (BLOCKS, 1), (0, BLOCKS + 1), (2**32 - 1, 2**32 - 1)])
def test_a_part_that_is_not_of_the_fragment_is_refused(worker: RawWorker, first: int, blocks: int) -> None:
    for kind in ({"snapshot": True}, {"since_version": 0}, {"since_version": 1}):
        with pytest.raises(grpc.RpcError, match="asked for blocks") as caught:
            worker.pull(0, part=of(first, blocks), **kind)
        assert isinstance(error_from_rpc(caught.value), InvalidContribution)


@pytest.mark.parametrize("fmt", list(Format))
def test_a_cut_keeps_scales_and_codes(fmt: Format) -> None:
    blocks = 3 * 50 + 7
    x = flat(np.random.default_rng(5).standard_normal(blocks * BLOCK).astype(np.float32))
    encoded = encode_fragment(fmt, x)
    spec = fmt.spec
    (message,) = [pb.PullReply(frame=f).SerializeToString() for f in pack_frames(encoded)]
    fragment = Fragment(0, Role.TRAINED, (), blocks * BLOCK)
    (cut,) = cuts_of(fragment, fmt, pb.PullRequest(part=of(50, 60)), 1)
    frame = read_frame(pb.PullReply.FromString(recut(message, cut)).frame)
    expected = Encoded(
        fmt,
        encoded.scales[50 * spec.scale_bytes : 110 * spec.scale_bytes],
        encoded.codes[50 * spec.code_bytes : 110 * spec.code_bytes],
    )
    assert (frame.format, frame.first_block, frame.num_blocks) == (fmt, 50, 60)
    assert frame.scales.tobytes() == expected.scales.tobytes()
    assert frame.codes.tobytes() == expected.codes.tobytes()


def test_two_processes_of_a_worker_make_one_contribution_of_parts(worker: RawWorker) -> None:
    half = BLOCKS // 2
    low, high = values(3)[: half * BLOCK], values(3)[half * BLOCK :]
    held = worker.push(0, frames_of(low), parts=[of(0, half)], base_version=1)
    staged = worker.push(0, frames_of(high, first_block=half), parts=[of(half, BLOCKS - half)], base_version=1)
    assert (held.kind, staged.kind) == (pb.OUTCOME_PART_HELD, pb.OUTCOME_STAGED)
    assert worker.expect("committed").version == 2
