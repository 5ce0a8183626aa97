"""Pushes, and the errors of all calls, against a scripted server that breaks off, answers oddly, or refuses."""

from __future__ import annotations

from concurrent import futures

import grpc
import numpy as np
import pytest
from scripted import Scripted, breaks, connected, frames_of, header_of

from diloco_client.address import parse_address
from diloco_client.landing import Target
from diloco_client.pushing import split_push
from diloco_client.transport import Retry, Transport
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import (
    BLOCK,
    Encoded,
    Format,
    encode_fragment,
    frame_blocks,
    frame_checksum,
    pack_frames,
)
from diloco_proto.errors import DilocoError, InvalidContribution, ServerUnreachable
from diloco_proto.manifest import Fragment, Role
from diloco_server.assembly import frame_places

NOTHING = Target(None, np.empty(0, np.float32))


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


def test_named_errors_are_raised_at_once_and_what_may_mend_is_tried_again() -> None:
    def fine(request, context):
        yield pb.PullReply(item=pb.Item(kind=pb.ITEM_UPDATE, version=1, frames=0))

    aborted = grpc.StatusCode.ABORTED
    named = Scripted(breaks(grpc.StatusCode.INVALID_ARGUMENT, "InvalidContribution"))
    with connected(named) as transport, pytest.raises(InvalidContribution, match="scripted"):
        transport.pull(pb.PullRequest(), NOTHING)
    too_large = Scripted(breaks(grpc.StatusCode.RESOURCE_EXHAUSTED))
    with connected(too_large) as transport, pytest.raises(DilocoError, match="RESOURCE_EXHAUSTED"):
        transport.pull(pb.PullRequest(), NOTHING)
    with connected(Scripted(breaks(), breaks(aborted, "SnapshotExpired"), breaks(aborted), fine)) as transport:
        assert len(transport.pull(pb.PullRequest(), NOTHING)) == 1


def test_closing_ends_a_call_that_would_retry_for_ever() -> None:
    transport = Transport("127.0.0.1:1", Retry(first=30, cap=30))
    with futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(transport.pull, pb.PullRequest(), NOTHING)
        transport.close()
        with pytest.raises((ConnectionError, ValueError)):  # ValueError: grpc's word for a closed channel
            call.result(timeout=20)


def test_an_unreachable_server_is_named() -> None:
    transport = Transport("127.0.0.1:1")
    with pytest.raises(ServerUnreachable, match="127.0.0.1:1 "):
        transport.status(0.2)
    transport.close()


def test_an_ipv6_address_is_an_address() -> None:
    assert parse_address("[::1]:50051") == "[::1]:50051"
