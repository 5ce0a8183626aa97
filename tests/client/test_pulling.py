"""Pulls from a scripted server that breaks off, moves on or answers oddly, over one connection and over two."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from scripted import Scripted, connected, frames_of

from diloco_client.landing import Landing, PulledItem, StripesDiffer, Target
from diloco_client.pulling import join_stripes
from diloco_client.pushing import MAX_DAMAGED
from diloco_proto import outer_pb2 as pb
from diloco_proto import outer_pb2_grpc as rpc
from diloco_proto.buffers import Buffers
from diloco_proto.codec import (
    BLOCK,
    CorruptFrame,
    Encoded,
    Format,
    digest,
    encode_fragment,
    pack_frames,
)
from diloco_proto.errors import DamagedFrame
from diloco_proto.manifest import Fragment, Role
from diloco_server.cuts import cuts_of


def target_of(values: np.ndarray, first_block: int = 0) -> Target:
    """For as many; updates are on top of zeros."""
    return Target(np.zeros_like(values), np.empty_like(values), first_block)


def test_a_pull_goes_on_at_the_frame_where_it_broke(values) -> None:
    frames = frames_of(values)

    def item(count: int, version: int = 5) -> pb.PullReply:
        return pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=version, frames=count, digest=1))

    def first(request, context):
        yield item(3)
        yield pb.PullReply(frame=frames[0])
        context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    def rest(request, context):
        yield item(2)
        yield from (pb.PullReply(frame=f) for f in frames[1:])

    service, target = Scripted(first, rest), target_of(values)
    with connected(service) as transport:
        (pulled,) = transport.pull(pb.PullRequest(snapshot=True), target)
    assert (service.pulls[1].skip_frames, service.pulls[1].item_version) == (1, 5)
    assert pulled.found == digest(values)
    assert np.array_equal(target.theta, values)


def test_a_pull_whose_snapshot_moved_on_begins_anew(values) -> None:
    frames = frames_of(values)

    def old(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=5, frames=3))
        yield pb.PullReply(frame=frames_of(-values)[0])
        context.abort(grpc.StatusCode.ABORTED, "overtaken")

    def new(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=6, frames=3))
        yield from (pb.PullReply(frame=f) for f in frames)

    target = target_of(values)
    with connected(Scripted(old, new)) as transport:
        (pulled,) = transport.pull(pb.PullRequest(snapshot=True), target)
    assert (pulled.version, pulled.num_frames, pulled.found) == (6, 3, digest(values))
    assert np.array_equal(target.theta, values)


def one_and_a_half(frames: list[bytes]) -> Callable:
    """Of two updates."""

    def behave(request, context):
        yield from item(1, *frames)
        yield from item(2, frames[0], announced=3)

    return behave


def test_a_pull_of_several_updates_asks_again_from_the_last_whole_one(values) -> None:
    frames = frames_of(values)

    def rest(request, context):
        yield from item(2, *frames[1:])

    service, target = Scripted(one_and_a_half(frames), rest), target_of(values)
    with connected(service) as transport:
        items = transport.pull(pb.PullRequest(since_version=0), target)
    assert [(i.version, i.num_frames, i.found) for i in items] == [(1, 3, digest(-values)), (2, 3, digest(-2 * values))]
    assert np.array_equal(target.theta, -2 * values)
    again = service.pulls[1]
    assert (again.since_version, again.item_version, again.skip_frames) == (1, 2, 1)


def test_half_an_update_leaves_nothing_behind(values) -> None:
    """It would have been put on top of the first, in its place."""
    frames = frames_of(values)

    def another(request, context):
        yield from item(3, *frames)

    service, target = Scripted(one_and_a_half(frames), another), target_of(values)
    with connected(service) as transport:
        items = transport.pull(pb.PullRequest(since_version=0), target)
    assert [p.since_version for p in service.pulls] == [0, 1]
    assert [(i.version, i.num_frames, i.found) for i in items] == [(1, 3, digest(-values)), (3, 3, digest(-2 * values))]
    assert np.array_equal(target.theta, -2 * values)


def test_a_snapshot_is_decoded_as_it_comes(values) -> None:
    """It must not pile up beside the parameters."""
    frames = frames_of(values)
    landing = Landing(target := Target(None, np.zeros_like(values)))
    landing.take(pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=1, frames=3)))
    for number, frame in enumerate(frames, 1):
        landing.take(memoryview(frame))
        here = number * values.size // 3
        assert np.array_equal(target.theta[:here], values[:here])
        assert not target.theta[here:].any()


def test_a_first_update_that_does_not_go_on_gives_way_to_another(values) -> None:
    frames = frames_of(values)

    def half(request, context):
        yield from item(1, frames[0], announced=3)

    def another(request, context):
        yield from item(2, *frames)

    target = target_of(values)
    with connected(Scripted(half, another)) as transport:
        (pulled,) = transport.pull(pb.PullRequest(since_version=0), target)
    assert (pulled.version, pulled.found) == (2, digest(-values))


def item(version: int, *frames: bytes, announced: int | None = None) -> Iterator[pb.PullReply]:
    count = len(frames) if announced is None else announced
    yield pb.PullReply(item=pb.Item(kind=pb.ITEM_UPDATE, version=version, frames=count))
    yield from (pb.PullReply(frame=frame) for frame in frames)


def test_an_update_that_never_arrives_whole_is_replaced_by_a_snapshot() -> None:
    frame = frames_of(np.ones(BLOCK, np.float32))[0]

    def damaged(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_UPDATE, version=1, frames=1))
        yield pb.PullReply(frame=frame[:-1] + b"!")

    def snapshot(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=1, frames=1))
        yield pb.PullReply(frame=frame)

    service, target = Scripted(*[damaged] * MAX_DAMAGED, snapshot), target_of(np.ones(BLOCK, np.float32))
    with connected(service) as transport:
        (pulled,) = transport.pull(pb.PullRequest(), target)
    assert (pulled.kind, pulled.num_frames) == (pb.ITEM_SNAPSHOT, 1)
    assert np.array_equal(target.theta, np.ones(BLOCK))
    assert [p.snapshot for p in service.pulls] == [False] * MAX_DAMAGED + [True]
    with (
        connected(Scripted(*[lambda request, context: list(damaged(request, context))] * MAX_DAMAGED)) as transport,
        pytest.raises(DamagedFrame, match="TLS would show which"),
    ):
        transport.pull(pb.PullRequest(snapshot=True), target)


# -- stripes --


TARGET = target_of(np.empty(8 * BLOCK, np.float32), first_block=3)
"""Of blocks 3 to 10."""


def share(kind: pb.ItemKind, version: int, first: int = 0, stop: int = 0) -> PulledItem:
    """What a stripe has of an item: these blocks, one a frame."""
    return PulledItem(kind, version, version, stop - first, range(first, stop), 1 << 63, 10)


def update(version: int, first: int = 0, stop: int = 0) -> PulledItem:
    return share(pb.ITEM_UPDATE, version, first, stop)


def snapshot(version: int, first: int = 0, stop: int = 0) -> PulledItem:
    return share(pb.ITEM_SNAPSHOT, version, first, stop)


def test_stripes_of_a_pull_are_put_together() -> None:
    stripes = [[update(1, 3, 5), update(2, 3, 5)], [update(1), update(2)], [update(1, 5, 11), update(2, 5, 11)]]
    assert join_stripes(stripes, TARGET) == [
        PulledItem(pb.ITEM_UPDATE, v, v, 8, TARGET.blocks, 1 << 63, 30) for v in (1, 2)
    ]
    assert join_stripes([[], []], TARGET) == []


@pytest.mark.parametrize(
    "stripes",
    [
        [[snapshot(1, 3, 6)], [snapshot(2, 6, 11)]],
        [[update(1, 3, 6)], [snapshot(1, 6, 11)]],
        [[update(1, 3, 6)], []],
        [[update(1, 3, 6)], [update(1, 6, 11), update(2, 6, 11)]],
    ],
)
def test_stripes_of_a_pull_that_do_not_fit_are_of_no_use(stripes: list[list[PulledItem]]) -> None:
    with pytest.raises(StripesDiffer):
        join_stripes(stripes, TARGET)


@pytest.mark.parametrize(
    "shares",
    [
        pytest.param([update(1, 4, 6), update(1, 6, 11)], id="nothing at the start"),
        pytest.param([update(1, 3, 6), update(1, 6, 10)], id="nothing at the end"),
        pytest.param([update(1, 3, 6), update(1, 7, 11)], id="a gap"),
        pytest.param([update(1, 3, 6), update(1, 5, 11)], id="some twice"),
        pytest.param([update(1), update(1)], id="nothing at all"),
    ],
)
def test_stripes_that_do_not_make_the_fragment_are_refused(shares: list[PulledItem]) -> None:
    with pytest.raises(CorruptFrame):
        join_stripes([[share] for share in shares], TARGET)


def test_a_pull_whose_stripes_do_not_fit_begins_anew_in_one(values) -> None:
    frames = frames_of(values)

    def at(version: int, *sent: bytes) -> Callable:
        def behave(request, context):
            yield pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=version, frames=len(sent)))
            yield from (pb.PullReply(frame=f) for f in sent)

        return behave

    service, target = Scripted(at(1, *frames[:1]), at(2, *frames[1:]), at(2, *frames)), target_of(values)
    with connected(service, data_connections=2) as transport:
        (pulled,) = transport.pull(pb.PullRequest(snapshot=True), target)
    assert pulled.found == digest(values)
    assert np.array_equal(target.theta, values)
    assert sorted((p.stripes, p.stripe) for p in service.pulls) == [(0, 0), (2, 0), (2, 1)]


class Moving(rpc.OuterServicer):
    """Two stripes are asked for an update, which is no longer there when they ask again: a snapshot is. By then the
    first one has that, and only then the second one gets its share of the update, which is cut elsewhere."""

    def __init__(self, change: Encoded, theta: np.ndarray) -> None:
        self.update = pack_frames(change, level=None)
        self.snapshot = frames_of(theta)
        self.announced = digest(theta)
        self.asked: list[int] = []
        self.first_is_done = threading.Event()
        self.fragment = Fragment(0, Role.TRAINED, (), theta.size)

    def Pull(self, request, context):
        self.asked.append(request.stripe if request.stripes else -1)
        if request.stripes and self.asked.count(request.stripe) == 1:
            cuts = cuts_of(self.fragment, Format.INT4, request, 6)
            yield pb.PullReply(item=pb.Item(kind=pb.ITEM_UPDATE, version=6, frames=len(cuts)))
            if request.stripe == 1:
                self.first_is_done.wait(30)
                yield from (pb.PullReply(frame=self.update[cut.number]) for cut in cuts)
            context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        if request.stripe == 0:
            context.add_callback(self.first_is_done.set)
        cuts = cuts_of(self.fragment, Format.FP32, request, 7)
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=7, frames=len(cuts), digest=self.announced))
        for cut in cuts:
            yield pb.PullReply(frame=self.snapshot[cut.number])


@pytest.fixture(scope="module")
def three_frames() -> tuple[np.ndarray, Encoded]:
    """Parameters, and an update of three frames in int4, which is twenty-four in fp32."""
    random = np.random.default_rng(0)
    theta, change = (random.standard_normal(3 * Format.INT4.spec.frame_blocks * BLOCK, np.float32) for _ in range(2))
    return theta, encode_fragment(Format.INT4, change)


def test_stripes_that_change_from_an_update_to_a_snapshot_do_not_spoil_one_another(three_frames) -> None:
    theta, change = three_frames
    base = theta + np.float32(1)
    service, target = Moving(change, theta), Target(base, np.empty_like(theta))
    with connected(service, data_connections=2) as transport:
        (pulled,) = transport.pull(pb.PullRequest(since_version=5), target)
    assert service.asked.count(-1) == 1, "it was pulled again in one"
    assert (pulled.version, pulled.found) == (7, pulled.digest)
    assert np.array_equal(target.theta, theta)
    assert np.array_equal(base, theta + np.float32(1))


def test_a_stripe_that_is_damaged_on_and_on_is_pulled_again_in_one(values) -> None:
    frames = frames_of(values)
    stripes: list[int] = []

    class Damaging(Scripted):
        def Pull(self, request, context):
            stripes.append(request.stripe if request.stripes else -1)
            if request.stripes:
                cuts = cuts_of(Fragment(0, Role.TRAINED, (), values.size), Format.FP32, request, 1)
                its = [frames[cut.number] for cut in cuts]
                yield from item(1, *([its[0][:-1] + b"!", *its[1:]] if request.stripe == 1 else its))
            else:
                yield from item(1, *frames)

    target = target_of(values)
    with connected(Damaging(), data_connections=2) as transport:
        (pulled,) = transport.pull(pb.PullRequest(), target)
    assert (stripes.count(1), stripes.count(-1)) == (MAX_DAMAGED, 1)
    assert (pulled.kind, pulled.found) == (pb.ITEM_UPDATE, digest(-values))


def test_a_stripe_with_an_illegal_frame_ends_the_pull_and_keeps_nothing(values) -> None:
    frames = frames_of(values)

    class Illegal(Scripted):
        def Pull(self, request, context):
            yield from item(1, *([frames[2], frames[1]] if request.stripe else [frames[0]]))

    memory = Buffers(1)
    target = Target(np.zeros_like(values), memory.floats(values.size))
    where = target.theta.ctypes.data
    with connected(Illegal(), data_connections=2) as transport, pytest.raises(CorruptFrame):
        transport.pull(pb.PullRequest(), target)
    del target
    assert memory.floats(values.size).ctypes.data == where, "it can be lent again at once"


# -- what is refused --


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda frames: frames[:2], id="one missing at the end"),
        pytest.param(lambda frames: frames[1:], id="one missing at the start"),
        pytest.param(lambda frames: [frames[0], frames[2], frames[1]], id="out of order"),
        pytest.param(lambda frames: [*frames, frames[2]], id="one too many"),
    ],
)
def test_frames_that_do_not_make_the_fragment_are_refused(values, change) -> None:
    def changed(request, context):
        yield from item(1, *change(frames_of(values)))

    with connected(Scripted(changed)) as transport, pytest.raises(CorruptFrame):
        transport.pull(pb.PullRequest(), target_of(values))


def test_an_update_is_refused_where_only_a_snapshot_will_do(values) -> None:
    landing = Landing(Target(None, np.empty_like(values)))
    (frame,) = frames_of(values[:BLOCK])
    landing.take(pb.PullReply(item=pb.Item(kind=pb.ITEM_UPDATE, version=1, frames=1)))
    with pytest.raises(CorruptFrame, match="only a snapshot will do"):
        landing.take(memoryview(frame))


def test_updates_of_one_pull_must_be_of_the_same_blocks(values) -> None:
    """The second is put on top of the first, in its place."""
    frames = frames_of(values)
    landing = Landing(target_of(values))
    replies = [*item(1, *frames), *item(2, *frames[:2])]
    with pytest.raises(CorruptFrame, match=r"range\(0, 8192\) came of version 2, range\(0, 12288\) of the one before"):
        for reply in replies:
            landing.take(memoryview(reply.frame) if reply.HasField("frame") else reply)
