"""Pushes and pulls against a scripted server that breaks off, answers oddly, or refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from diloco_client.address import parse_address
from diloco_client.network import Network
from diloco_client.pulling import join_stripes
from diloco_client.pushing import MAX_DAMAGED, split_push
from diloco_client.transport import PulledItem, Retry, Transport
from diloco_proto import outer_pb2 as pb
from diloco_proto import outer_pb2_grpc as rpc
from diloco_proto.codec import (
    BLOCK,
    CorruptFrame,
    Encoded,
    Format,
    digest,
    encode_fragment,
    frame_blocks,
    frame_checksum,
    pack_frames,
)
from diloco_proto.errors import ERROR_KEY, DamagedFrame, DilocoError, InvalidContribution, ServerUnreachable
from diloco_proto.manifest import Fragment, Role
from diloco_server.assembly import frame_places

SOON = Retry(first=0.001, cap=0.01)


class Scripted(rpc.OuterServicer):
    """Each call takes the next behaviour of its script."""

    def __init__(self, *script: Callable) -> None:
        self.script = list(script)
        self.pulls: list[pb.PullRequest] = []

    def Push(self, requests, context):
        yield from self.script.pop(0)(requests, context)

    def Pull(self, request, context):
        self.pulls.append(request)
        yield from self.script.pop(0)(request, context)


@contextmanager
def connected(service: Scripted, **network: float) -> Iterator[Transport]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_OuterServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    transport = Transport(f"127.0.0.1:{port}", SOON, Network(**network))
    try:
        yield transport
    finally:
        transport.close()
        server.stop(None).wait()


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(3 * 4096 * BLOCK, dtype=np.float32)


def frames_of(values: np.ndarray) -> list[bytes]:
    return pack_frames(encode_fragment(Format.FP32, values), level=None)


def header_of(frames: list[bytes]) -> pb.PushHeader:
    return pb.PushHeader(worker_id="w", frame_digests=[frame_checksum(f) for f in frames])


def breaks(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE, name: str = "") -> Callable:
    def behave(request, context):
        if name:
            context.set_trailing_metadata(((ERROR_KEY, name),))
        context.abort(code, "scripted")
        yield

    return behave


def test_a_push_that_breaks_off_sends_only_what_is_missing(values) -> None:
    frames = frames_of(values)
    taken: list[bytes] = []

    def take_one_then_break(requests, context):
        assert next(requests).header.frame_digests == header_of(frames).frame_digests
        yield pb.PushReply(have=pb.Have())
        taken.append(next(requests).frame)
        context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    def take_the_rest(requests, context):
        next(requests)
        yield pb.PushReply(have=pb.Have(frames=[0]))
        taken.extend(r.frame for r, _ in zip(requests, range(2), strict=False))
        yield pb.PushReply(outcome=pb.Outcome(kind=pb.OUTCOME_STAGED))

    with connected(Scripted(take_one_then_break, take_the_rest)) as transport:
        assert transport.push(header_of(frames), frames).kind == pb.OUTCOME_STAGED
    assert taken == frames


def test_a_push_is_never_more_than_a_window_ahead(values) -> None:
    frames = frames_of(values[: 64 * BLOCK]) * 20
    received: list[int] = []

    def hold(requests, context):
        next(requests)
        yield pb.PushReply(have=pb.Have())
        for number in range(20):
            next(requests)
            received.append(number)
            if number % 2:
                yield pb.PushReply(ack=pb.Ack(frames=number + 1))
        yield pb.PushReply(outcome=pb.Outcome(kind=pb.OUTCOME_STAGED))

    with connected(Scripted(hold)) as transport:
        transport.push(header_of(frames), frames)
    assert received == list(range(20))


def test_a_push_whose_outcome_is_known_at_once_sends_no_frame(values) -> None:
    def known(requests, context):
        next(requests)
        yield pb.PushReply(outcome=pb.Outcome(kind=pb.OUTCOME_COUNTED, version=7))

    with connected(Scripted(known)) as transport:
        outcome = transport.push(header_of(frames_of(values)), frames_of(values))
        assert (outcome.kind, outcome.version) == (pb.OUTCOME_COUNTED, 7)
        assert transport.counters.bytes_up < 1000


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

    service = Scripted(first, rest)
    with connected(service) as transport:
        (pulled,) = transport.pull(pb.PullRequest(snapshot=True))
    assert (service.pulls[1].skip_frames, service.pulls[1].item_version) == (1, 5)
    theta = np.empty_like(values)
    assert pulled.apply(None, theta) == digest(values)
    assert np.array_equal(theta, values)


def test_a_pull_whose_snapshot_moved_on_begins_anew(values) -> None:
    frames = frames_of(values)

    def old(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=5, frames=3))
        yield pb.PullReply(frame=frames[2])
        context.abort(grpc.StatusCode.ABORTED, "overtaken")

    def new(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=6, frames=3))
        yield from (pb.PullReply(frame=f) for f in frames)

    with connected(Scripted(old, new)) as transport:
        (pulled,) = transport.pull(pb.PullRequest(snapshot=True))
    assert pulled.version == 6
    assert pulled.frames == frames


def test_a_pull_of_several_updates_asks_again_from_the_last_whole_one() -> None:
    a, b = (frames_of(np.full(BLOCK, value, np.float32))[0] for value in (1, 2))

    def one_and_a_half(request, context):
        for version in (1, 2):
            yield pb.PullReply(item=pb.Item(kind=pb.ITEM_UPDATE, version=version, frames=2))
            yield pb.PullReply(frame=a)
            if version == 1:
                yield pb.PullReply(frame=b)

    def rest(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_UPDATE, version=2, frames=1))
        yield pb.PullReply(frame=b)

    service = Scripted(one_and_a_half, rest)
    with connected(service) as transport:
        items = transport.pull(pb.PullRequest(since_version=0))
    assert [(i.version, i.frames) for i in items] == [(1, [a, b]), (2, [a, b])]
    again = service.pulls[1]
    assert (again.since_version, again.item_version, again.skip_frames) == (1, 2, 1)


def test_an_update_that_never_arrives_whole_is_replaced_by_a_snapshot() -> None:
    frame = frames_of(np.ones(BLOCK, np.float32))[0]

    def damaged(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_UPDATE, version=1, frames=1))
        yield pb.PullReply(frame=frame[:-1] + b"!")

    def snapshot(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=1, frames=1))
        yield pb.PullReply(frame=frame)

    service = Scripted(*[damaged] * MAX_DAMAGED, snapshot)
    with connected(service) as transport:
        (item,) = transport.pull(pb.PullRequest())
    assert (item.kind, item.frames) == (pb.ITEM_SNAPSHOT, [frame])
    assert [p.snapshot for p in service.pulls] == [False] * MAX_DAMAGED + [True]
    with (
        connected(Scripted(*[lambda request, context: list(damaged(request, context))] * MAX_DAMAGED)) as transport,
        pytest.raises(DamagedFrame, match="TLS would show which"),
    ):
        transport.pull(pb.PullRequest(snapshot=True))


# -- stripes --


def test_stripes_that_all_are_held_as_parts_are_announced_once_more_as_a_whole(values) -> None:
    """The server has started anew after the first of them was done, and knows it no longer."""
    frames = frames_of(values)
    header = header_of(frames)
    header.parts.add(first_block=0, num_blocks=len(values) // BLOCK)
    headers: list[pb.PushHeader] = []

    def part(requests, context):
        header = next(requests).header
        headers.append(header)
        yield pb.PushReply(have=pb.Have())
        for _ in header.frame_digests:
            next(requests)
        yield pb.PushReply(outcome=pb.Outcome(kind=pb.OUTCOME_PART_HELD))

    def whole(requests, context):
        headers.append(next(requests).header)
        yield pb.PushReply(have=pb.Have(frames=[2]))
        assert [next(requests).frame for _ in range(2)] == frames[:2]
        yield pb.PushReply(outcome=pb.Outcome(kind=pb.OUTCOME_STAGED))

    with connected(Scripted(part, part, whole), data_connections=2) as transport:
        assert transport.push(header, frames).kind == pb.OUTCOME_STAGED
    assert headers[2] == header
    assert sorted(d for h in headers[:2] for d in h.frame_digests) == sorted(header.frame_digests)


def test_a_push_is_split_on_the_grid_of_its_own_parts(values) -> None:
    step = Format.FP32.spec.frame_blocks
    encoded = encode_fragment(Format.FP32, values)
    first = pack_frames(Encoded(Format.FP32, encoded.scales, encoded.codes[: (step + 5) * 256]), level=None)
    rest = pack_frames(Encoded(Format.FP32, encoded.scales, encoded.codes[(step + 5) * 256 :]), step + 5, level=None)
    frames = [*first, *rest]
    header = header_of(frames)
    header.parts.add(first_block=0, num_blocks=step + 5)
    header.parts.add(first_block=step + 5, num_blocks=2 * step - 5)
    for count in range(1, 8):
        places = []
        for share, its in split_push(header, frames, count):
            parts = [(p.first_block, p.num_blocks) for p in share.parts]
            places += frame_places(
                Fragment(0, Role.TRAINED, (), 3 * step * BLOCK), Format.FP32, parts, share.frame_digests
            )
            assert [frame_blocks(f) for f in its] == [(p.first_block, p.num_blocks) for p in places[-len(its) :]]
        assert [(p.first_block, p.digest) for p in places] == [
            (frame_blocks(f)[0], frame_checksum(f)) for f in frames
        ], "each frame once, in order"


def update(version: int, *frames: bytes) -> PulledItem:
    return PulledItem(pb.ITEM_UPDATE, version, version, list(frames), 10)


def snapshot(version: int, *frames: bytes) -> PulledItem:
    return PulledItem(pb.ITEM_SNAPSHOT, version, version, list(frames), 10)


def test_stripes_of_a_pull_are_put_together() -> None:
    joined = join_stripes([[update(1, b"a"), update(2, b"d")], [update(1, b"b", b"c"), update(2)]])
    assert joined == [
        PulledItem(pb.ITEM_UPDATE, 1, 1, [b"a", b"b", b"c"], 20),
        PulledItem(pb.ITEM_UPDATE, 2, 2, [b"d"], 20),
    ]
    assert join_stripes([[], []]) == []
    later = join_stripes([[update(1, b"a")], [update(1, b"b"), update(2, b"c")]])
    assert later == [PulledItem(pb.ITEM_UPDATE, 1, 1, [b"a", b"b"], 20)], "what one of them lacks is for the next pull"


@pytest.mark.parametrize(
    "stripes",
    [
        [[snapshot(1, b"a")], [snapshot(2, b"b")]],
        [[update(1, b"a")], [snapshot(1, b"b")]],
        [[update(1, b"a")], []],
    ],
)
def test_stripes_of_a_pull_that_do_not_fit_are_of_no_use(stripes: list[list[PulledItem]]) -> None:
    assert join_stripes(stripes) is None


def test_a_pull_whose_stripes_do_not_fit_begins_anew_in_one(values) -> None:
    frames = frames_of(values)

    def at(version: int, *sent: bytes) -> Callable:
        def behave(request, context):
            yield pb.PullReply(item=pb.Item(kind=pb.ITEM_SNAPSHOT, version=version, frames=len(sent)))
            yield from (pb.PullReply(frame=f) for f in sent)

        return behave

    service = Scripted(at(1, *frames[:1]), at(2, *frames[1:]), at(2, *frames))
    with connected(service, data_connections=2) as transport:
        (item,) = transport.pull(pb.PullRequest(snapshot=True))
    assert item.frames == frames
    assert sorted((p.stripes, p.stripe) for p in service.pulls) == [(0, 0), (2, 0), (2, 1)]


def test_named_errors_are_raised_at_once_and_what_may_mend_is_tried_again() -> None:
    def fine(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_UPDATE, version=1, frames=0))

    aborted = grpc.StatusCode.ABORTED
    named = Scripted(breaks(grpc.StatusCode.INVALID_ARGUMENT, "InvalidContribution"))
    with connected(named) as transport, pytest.raises(InvalidContribution, match="scripted"):
        transport.pull(pb.PullRequest())
    too_large = Scripted(breaks(grpc.StatusCode.RESOURCE_EXHAUSTED))
    with connected(too_large) as transport, pytest.raises(DilocoError, match="RESOURCE_EXHAUSTED"):
        transport.pull(pb.PullRequest())
    with connected(Scripted(breaks(), breaks(aborted, "SnapshotExpired"), breaks(aborted), fine)) as transport:
        assert len(transport.pull(pb.PullRequest())) == 1


def test_closing_ends_a_call_that_would_retry_for_ever() -> None:
    transport = Transport("127.0.0.1:1", Retry(first=30, cap=30))
    with futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(transport.pull, pb.PullRequest())
        transport.close()
        with pytest.raises((ConnectionError, ValueError)):  # ValueError: grpc's word for a closed channel
            call.result(timeout=20)


def test_an_unreachable_server_is_named() -> None:
    transport = Transport("127.0.0.1:1")
    with pytest.raises(ServerUnreachable, match="127.0.0.1:1 "):
        transport.status(0.2)
    transport.close()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda frames: frames[:2], id="one missing at the end"),
        pytest.param(lambda frames: frames[1:], id="one missing at the start"),
        pytest.param(lambda frames: [frames[0], frames[2], frames[1]], id="out of order"),
        pytest.param(lambda frames: [*frames, frames[2]], id="one too many"),
        pytest.param(lambda frames: [frames[0], frames[1][:-1], frames[2]], id="one cut short"),
    ],
)
def test_frames_that_do_not_make_the_fragment_are_refused(values, change) -> None:
    item = PulledItem(pb.ITEM_SNAPSHOT, 1, 0, change(frames_of(values)))
    with pytest.raises(CorruptFrame):
        item.apply(None, np.empty_like(values))


def test_an_ipv6_address_is_an_address() -> None:
    assert parse_address("[::1]:50051") == "[::1]:50051"
