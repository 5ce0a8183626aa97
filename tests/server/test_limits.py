"""What one peer, and all together, may have open; and streams on which nothing moves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack

import grpc
import numpy as np
import pytest
from raw_worker import RawWorker, flat, frames_of, header, manifest_of

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Format
from diloco_proto.errors import ConnectionClosed, DilocoError, TooMuchInFlight
from diloco_proto.manifest import Pattern, build_layout
from diloco_proto.wire import error_from_rpc
from diloco_server import RunConfig, serve
from diloco_server.limits import Bounds, Limits, Stream, address_of
from diloco_server.pushes import Pushes, Ticket

SIZE = 1_200_000
"""Values: five frames in fp32."""


def server(**changes: object):
    plain = {"num_fragments": 1, "uplink_codec": "fp32", "grace_seconds": "inf", "lease_seconds": 600.0}
    return serve(RunConfig(**(plain | changes)))


def refusal(call: grpc.Call) -> DilocoError:
    """What the call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    error = error_from_rpc(caught.value)
    assert error is not None
    return error


# -- counting --


def test_a_peer_has_its_limit_and_all_have_theirs(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    limits = Limits(Bounds(peer=((Stream.PULL, 2),), total=((Stream.PULL, 3),)), lambda: now[0])
    with ExitStack() as held, caplog.at_level(logging.WARNING):
        for peer in ("a", "a", "b"):
            held.enter_context(limits.hold(Stream.PULL, peer))
        with pytest.raises(TooMuchInFlight, match="'a' already has 2 pulls open"), limits.hold(Stream.PULL, "a"):
            pass
        with pytest.raises(TooMuchInFlight, match="all peers together already has 3 pulls"):
            held.enter_context(limits.hold(Stream.PULL, "c"))
        assert limits.open(Stream.PULL) == 3
        assert len(caplog.records) == 1, "a flood does not fill the log"
        now[0] += 31
        with pytest.raises(TooMuchInFlight):
            held.enter_context(limits.hold(Stream.PULL, "a"))
        assert len(caplog.records) == 2
    assert limits.open(Stream.PULL) == 0
    assert not limits._open, "nothing is remembered of who is gone"


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:192.0.2.7:51000", "ipv4:192.0.2.7"), ("ipv6:%5B::1%5D:51000", "ipv6:%5B::1%5D"), ("unix:", "unix:")],
)
def test_a_peer_goes_by_its_address(peer: str, address: str) -> None:
    assert address_of(peer) == address


# -- incomplete contributions --

BLOCKS = 3 * Format.FP32.spec.frame_blocks


def pushes_of(fragments: int = 2) -> Pushes:
    manifest = manifest_of(*[BLOCKS * BLOCK] * fragments)
    return Pushes(build_layout(manifest, fragments, Pattern.STRIDED), Format.FP32)


def begin(pushes: Pushes, worker: str, fragment: int = 0, **changes: object) -> Ticket:
    frames = [bytes(24) + n.to_bytes(8, "little") for n in range(3)]
    return pushes.claim(pushes.read(header(worker, fragment, frames, BLOCKS, **changes)))


def size(pushes: Pushes) -> int:
    trial = pushes_of()
    return begin(trial, "any").assembly.nbytes


def test_a_worker_has_one_contribution_a_fragment_under_way() -> None:
    pushes = pushes_of()
    old, other, elsewhere = begin(pushes, "a"), begin(pushes, "b"), begin(pushes, "a", 1)
    new = begin(pushes, "a", base_version=1)
    assert old.assembly.closed
    assert not pushes.holds(old)
    assert all(pushes.holds(t) for t in (other, elsewhere, new))
    assert pushes.nbytes == 3 * size(pushes)
    with pytest.raises(ConnectionClosed, match="'a' has begun a newer contribution to fragment 0"):
        begin(pushes, "a")
    assert pushes.holds(new)
    assert pushes.holds(begin(pushes, "a", base_version=1)), "another stream of the same"


def test_what_nobody_fills_makes_room_and_what_is_being_filled_does_not() -> None:
    pushes = pushes_of()
    pushes.max_bytes = 2 * size(pushes)
    first, second = begin(pushes, "a"), begin(pushes, "b")
    with first.filling(), second.filling():
        with pytest.raises(TooMuchInFlight, match="later there is room"):
            begin(pushes, "c")
        assert pushes.holds(begin(pushes, "b")), "it has its room already"
    with second.filling():
        third = begin(pushes, "c")
    assert [pushes.holds(t) for t in (first, second, third)] == [False, True, True]
    assert first.assembly.closed
    pushes.max_bytes = 1
    assert pushes.holds(begin(pushes, "d")), "one there is always room for"
    assert pushes.nbytes == size(pushes)


def test_what_is_taken_or_too_old_is_closed_for_its_other_streams() -> None:
    pushes = pushes_of()
    taken, old = begin(pushes, "a"), begin(pushes, "b")
    pushes.take(taken)
    pushes.drop_older(0, 1)
    assert (taken.assembly.closed, old.assembly.closed, pushes.nbytes) == (True, True, 0)


# -- over gRPC --


def test_a_push_beyond_the_limit_is_refused_before_its_frames_and_welcome_later() -> None:
    manifest = manifest_of(SIZE)
    with server() as running, RawWorker(running.address) as worker:
        running.engine.limits.bounds = Bounds(peer=((Stream.UNNAMED, 8), (Stream.SESSION, 4), (Stream.PUSH, 1)))
        worker.enter(manifest, [np.zeros(SIZE)])
        frames, go_on = frames_of(np.ones(SIZE)), threading.Event()

        def slowly():
            yield pb.PushRequest(header=worker.header(0, frames))
            assert go_on.wait(60)
            yield from frames

        first = worker.push_stream(slowly())
        assert next(first).HasField("have")
        error = refusal(worker.push_stream([pb.PushRequest(header=worker.header(0, frames))]))
        assert type(error) is TooMuchInFlight
        assert "'w' already has 1 pushes open" in str(error)
        go_on.set()
        *_, last = first
        assert last.outcome.kind == pb.OUTCOME_STAGED
        worker.expect("committed")
        assert running.engine.limits.open(Stream.PUSH) == 0


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_a_push_that_falls_silent_is_ended_and_what_it_brought_is_kept(sent: int) -> None:
    """Nothing at all; its header; and two of its frames."""
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(manifest_of(SIZE), [np.zeros(SIZE)])
        running.engine.limits.bounds = Bounds(first_seconds=0.3, frame_seconds=0.3)
        frames = frames_of(np.arange(SIZE))
        messages = [pb.PushRequest(header=worker.header(0, frames)), *frames][:sent]
        never = threading.Event()

        def requests():
            yield from messages
            never.wait()

        error = refusal(worker.push_stream(requests()))
        never.set()
        assert type(error) is ConnectionClosed
        assert "nothing has arrived on this stream" in str(error)
        running.engine.limits.bounds = Bounds()
        replies = worker.push_stream([pb.PushRequest(header=worker.header(0, frames)), *frames[max(0, sent - 1) :]])
        assert list(next(replies).have.frames) == list(range(max(0, sent - 1)))
        *_, last = replies
        assert last.outcome.kind == pb.OUTCOME_STAGED


def test_a_reader_that_reads_nothing_holds_no_snapshot_but_its_place() -> None:
    size = 8_000_000
    values = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    with server() as running, RawWorker(running.address) as worker, RawWorker(running.address) as reader:
        worker.enter(manifest_of(size), [values])
        running.engine.limits.bounds = Bounds(unread_seconds=0.3)
        call = reader.stub.Pull(pb.PullRequest(snapshot=True), timeout=60)
        assert next(call).item.version == 0
        parameters = running.engine.run.parameters
        until(lambda: parameters._globals[0].snapshot is None, "the snapshot to be let go")
        assert running.engine.limits.open(Stream.PULL) == 1, "gRPC still holds a message for it"
        error = refusal(call)
        assert type(error) is ConnectionClosed
        assert "nothing of this pull was read" in str(error)
        until(lambda: running.engine.limits.open(Stream.PULL) == 0, "its place")
        stuck = reader.stub.Pull(pb.PullRequest(snapshot=True), timeout=60)
        next(stuck)
        until(lambda: parameters._globals[0].snapshot is None, "the snapshot to be let go")
        stuck.cancel()
        until(lambda: running.engine.limits.open(Stream.PULL) == 0, "the place of a reader that has gone")


def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"waited in vain for {what}")


def test_a_resumed_snapshot_goes_on_in_the_version_that_others_still_read() -> None:
    size = 8_000_000
    values = flat(np.random.default_rng(0).standard_normal(size, dtype=np.float32))
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(manifest_of(size), [values])
        slow = worker.stub.Pull(pb.PullRequest(snapshot=True), timeout=60)
        next(slow)
        worker.push(0, frames_of(np.ones(size)))
        worker.expect("committed")
        ((item, frames),) = worker.pull(0, snapshot=True, skip_frames=30, item_version=0)
        assert (item.version, item.frames, len(frames)) == (0, 1, 1)
        assert frames == frames_of(values)[30:]
        slow.cancel()


def test_a_pull_in_stripes_brings_each_frame_once() -> None:
    with server(downlink_codec="fp32") as running, RawWorker(running.address) as worker:
        worker.enter(manifest_of(SIZE), [np.arange(SIZE)])
        ((_, whole),) = worker.pull(0, snapshot=True)
        shares = [worker.pull(0, snapshot=True, stripes=3, stripe=i)[0] for i in range(3)]
        assert [len(frames) for _, frames in shares] == [item.frames for item, _ in shares] == [1, 2, 2]
        assert [f for _, frames in shares for f in frames] == whole
        ((item, rest),) = worker.pull(0, snapshot=True, stripes=3, stripe=1, skip_frames=1, item_version=0)
        assert (item.frames, rest) == (1, whole[2:3])
        worker.push(0, frames_of(np.ones(SIZE)))
        worker.expect("committed")
        ((_, update),) = worker.pull(0, since_version=0)
        shares = [worker.pull(0, since_version=0, stripes=8, stripe=i)[0] for i in range(8)]
        assert [f for _, frames in shares for f in frames] == update
        for stripes, stripe in ((9, 0), (3, 3), (0, 1)):
            error = refusal(worker.stub.Pull(pb.PullRequest(stripes=stripes, stripe=stripe), timeout=60))
            assert "a pull has at most 8" in str(error)
