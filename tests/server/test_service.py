"""The service over real gRPC, seen by bare stubs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from raw_worker import RawWorker, flat, frames_of, hello, manifest_of

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Format, decode, digest, read_frame
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import (
    ConnectionClosed,
    DamagedFrame,
    DilocoError,
    InvalidContribution,
    ManifestMismatch,
    NotMember,
    NotReady,
    ProtocolMismatch,
    RunMismatch,
    SnapshotExpired,
    Superseded,
    UnsupportedModel,
)
from diloco_proto.wire import error_from_rpc
from diloco_server import RunConfig, serve
from diloco_server.daemon import Daemon

SIZE = 1_200_000
"""Values: five frames in fp32."""
SMALL = manifest_of(100)
LARGE = manifest_of(SIZE)
BLOCKS = SIZE // BLOCK


def server(**changes):
    plain = {
        "num_fragments": 1,
        "uplink_codec": "fp32",
        "downlink_codec": "fp32",
        "outer_optimizer": "sgd",
        "outer_lr": 1.0,
        "weighting": "uniform",
        "grace_seconds": "inf",
    }
    return serve(RunConfig(**(plain | changes)))


@contextlib.contextmanager
def refused(error: type[DilocoError], status: grpc.StatusCode, match: str | None = None) -> Iterator[None]:
    """The call ends with the status, and with the class name in its trailing metadata."""
    with pytest.raises(grpc.RpcError, match=match) as caught:
        yield
    assert caught.value.code() is status
    assert type(error_from_rpc(caught.value)) is error


def values(seed: int, size: int = SIZE) -> Floats:
    return flat(np.random.default_rng(seed).standard_normal(size).astype(np.float32))


def decoded(frames: list[bytes], size: int = SIZE) -> Floats:
    out = np.full(-(-size // BLOCK) * BLOCK, np.nan, np.float32)
    for data in frames:
        frame = read_frame(data)
        start = frame.first_block * BLOCK
        decode(frame.format, frame.scales, frame.codes, out[start : start + frame.num_blocks * BLOCK])
    return out


def theta(worker: RawWorker, size: int = SIZE) -> tuple[int, Floats]:
    ((item, frames),) = worker.pull(0, snapshot=True)
    found = decoded(frames, size)
    assert digest(found) == item.digest
    return item.version, found


# -- typed errors --


def hellos() -> dict[str, tuple[pb.SessionRequest | None, type[DilocoError], grpc.StatusCode]]:
    def request(**changes: object) -> pb.SessionRequest:
        message = hello("w", SMALL)
        for name, value in changes.items():
            message.ClearField(name)
            message.MergeFrom(pb.Hello(**{name: value}))
        return pb.SessionRequest(hello=message)

    twice = pb.Manifest(tensors=[pb.Tensor(name="a", shape=[1], dtype="float32", role=pb.ROLE_TRAINED)] * 2)
    invalid, precondition = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
    return {
        "no request": (None, InvalidContribution, invalid),
        "an empty request": (pb.SessionRequest(), InvalidContribution, invalid),
        "no hello": (pb.SessionRequest(ready=pb.Ready()), InvalidContribution, invalid),
        "another protocol": (request(protocol=7), ProtocolMismatch, precondition),
        "another run": (request(run_id="x"), RunMismatch, precondition),
        "no worker id": (request(worker_id=""), InvalidContribution, grpc.StatusCode.INVALID_ARGUMENT),
        "an impossible model": (request(manifest=twice), UnsupportedModel, invalid),
    }


def test_a_session_that_cannot_begin_ends_with_a_typed_error() -> None:
    with server() as running, RawWorker(running.address) as worker:
        for request, error, status in hellos().values():
            with refused(error, status):
                list(worker.stub.Session(iter([request] if request else []), timeout=30))
        worker.enter(SMALL, [np.zeros(100)])  # the server is none the worse
        with (
            RawWorker(running.address, "other") as other,
            refused(ManifestMismatch, grpc.StatusCode.FAILED_PRECONDITION, r"layers\.0\.weight"),
        ):
            other.join(manifest_of(101)).expect("welcome")


def test_pushes_and_pulls_that_cannot_be_end_with_a_typed_error() -> None:
    with server() as running, RawWorker(running.address) as worker:
        with refused(NotReady, grpc.StatusCode.UNAVAILABLE):
            worker.pull(0, snapshot=True)
        worker.enter(SMALL, [np.zeros(100)])
        frames = frames_of(np.ones(100))
        for requests in ([], [pb.PushRequest()], frames):
            with refused(InvalidContribution, grpc.StatusCode.INVALID_ARGUMENT, "a push begins with its header"):
                list(worker.push_stream(requests))
        with refused(NotMember, grpc.StatusCode.FAILED_PRECONDITION):
            worker.push(0, frames, worker_id="stranger")
        with refused(Superseded, grpc.StatusCode.ABORTED):
            worker.push(0, frames, generation=9)
        with refused(RunMismatch, grpc.StatusCode.FAILED_PRECONDITION, "started anew"):
            worker.push(0, frames, run_id="another")
        with refused(RunMismatch, grpc.StatusCode.FAILED_PRECONDITION):
            worker.pull(0, snapshot=True, run_id="another")
        with refused(InvalidContribution, grpc.StatusCode.INVALID_ARGUMENT, "asked for fragment 7; this run has 1"):
            worker.pull(7, snapshot=True)
        for request in (pb.PushRequest(), pb.PushRequest(header=worker.header(0, frames))):
            with refused(InvalidContribution, grpc.StatusCode.INVALID_ARGUMENT, "sent 0 of 1 frames of fragment 0"):
                list(worker.push_stream([pb.PushRequest(header=worker.header(0, frames)), request]))
        assert worker.push(0, frames).kind == pb.OUTCOME_STAGED


def test_messages_that_are_too_large_or_unknown_hurt_nobody() -> None:
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(SMALL, [np.zeros(100)])
        with pytest.raises(grpc.RpcError) as caught:
            list(worker.push_stream([pb.PushRequest(header=worker.header(0, [])), b"x" * (5 << 20)]))
        assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
        garbage = worker.channel.unary_unary("/diloco.v1.Outer/Describe", lambda b: b, lambda b: b)
        with pytest.raises(grpc.RpcError):
            garbage(b"\xff" * 10, timeout=30)
        nothing = worker.channel.unary_unary("/diloco.v1.Outer/Nothing", lambda b: b, lambda b: b)
        with pytest.raises(grpc.RpcError) as caught:
            nothing(b"", timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        worker.say()  # a body that this server does not know
        worker.say(hello=hello("w", SMALL))  # and one that is out of place
        worker.push(0, frames_of(np.ones(100)))
        assert worker.expect("committed").version == 1


# -- pushing --


def test_a_push_that_broke_goes_on_at_its_first_missing_frame() -> None:
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(LARGE, [np.zeros(SIZE)])
        frames = frames_of(values(1))
        assert len(frames) == 5
        header = pb.PushRequest(header=worker.header(0, frames))
        replies = worker.push_stream([header, frames[0], frames[1]])
        assert next(replies).have.frames == []
        assert next(replies).ack.frames == 2
        with refused(InvalidContribution, grpc.StatusCode.INVALID_ARGUMENT, "sent 2 of 5 frames"):
            next(replies)
        replies = worker.push_stream([header, *frames[2:]])
        assert next(replies).have.frames == [0, 1]
        assert next(replies).ack.frames == 2
        assert next(replies).outcome.kind == pb.OUTCOME_STAGED
        assert worker.expect("committed").fate == pb.FATE_COUNTED
        assert np.array_equal(theta(worker)[1], -values(1))
        (reply,) = worker.push_stream([header])  # once more: nothing need be sent
        assert reply.outcome == pb.Outcome(kind=pb.OUTCOME_COUNTED, version=1)


def test_a_push_that_was_cut_leaves_what_had_arrived() -> None:
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(LARGE, [np.zeros(SIZE)])
        frames = frames_of(values(1))
        header = pb.PushRequest(header=worker.header(0, frames))

        def requests() -> Iterator[pb.PushRequest | bytes]:
            yield from (header, frames[0], frames[1])
            worker.events.result()  # and no more: blocks until the session ends

        replies = worker.push_stream(requests())
        next(replies)
        assert next(replies).ack.frames == 2
        replies.cancel()
        replies = worker.push_stream([header, *frames[2:]])
        assert next(replies).have.frames == [0, 1]
        *_, last = replies
        assert last.outcome.kind == pb.OUTCOME_STAGED
        worker.events.cancel()


@pytest.mark.parametrize("place", [0, 4, 12, 24, 40, -1])
def test_a_damaged_frame_is_refused_and_theta_stays(place: int) -> None:
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(SMALL, [np.arange(100)])
        (frame,) = frames_of(np.ones(100))
        header = pb.PushRequest(header=worker.header(0, [frame]))
        damaged = bytearray(frame)
        damaged[place] ^= 1
        with refused(DamagedFrame, grpc.StatusCode.DATA_LOSS, "worker 'w', fragment 0, block 0: "):
            list(worker.push_stream([header, bytes(damaged)]))
        version, found = theta(worker, 100)
        assert version == 0
        assert np.array_equal(found, flat(np.arange(100)))
        assert worker.push(0, [frame]).kind == pb.OUTCOME_STAGED
        worker.expect("committed")
        assert np.array_equal(theta(worker, 100)[1][:100], np.arange(100) - 1)


def test_values_that_no_encoder_writes_are_refused() -> None:
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(SMALL, [np.zeros(100)])
        for bad in (np.nan, np.inf, 2.0**126):
            with refused(InvalidContribution, grpc.StatusCode.INVALID_ARGUMENT, "no encoder writes"):
                worker.push(0, frames_of(np.full(100, bad)))
        assert theta(worker, 100)[0] == 0


def test_garbage_is_no_frame() -> None:
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(SMALL, [np.zeros(100)])
        header = pb.PushRequest(header=worker.header(0, frames_of(np.ones(100))))
        for garbage in (b"", b"DLF1", bytes(100), b"\xff" * 4096):
            with refused(DamagedFrame, grpc.StatusCode.DATA_LOSS):
                list(worker.push_stream([header, garbage]))
        assert theta(worker, 100)[0] == 0


# -- pulling --


def test_a_pull_goes_on_where_it_broke() -> None:
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(LARGE, [values(0)])
        ((item, whole),) = worker.pull(0, snapshot=True)
        assert (item.kind, item.version, item.frames, len(whole)) == (pb.ITEM_SNAPSHOT, 0, 5, 5)
        ((item, rest),) = worker.pull(0, snapshot=True, skip_frames=3, item_version=0)
        assert (item.frames, rest) == (2, whole[3:])
        worker.push(0, frames_of(values(1)))
        worker.expect("committed")
        ((item, frames),) = worker.pull(0, snapshot=True, skip_frames=3, item_version=0)
        assert (item.version, item.frames, len(frames)) == (1, 5, 5), "another version: from its beginning"
        ((item, whole),) = worker.pull(0, since_version=0)
        assert (item.kind, item.version, item.frames) == (pb.ITEM_UPDATE, 1, len(whole))
        ((item, rest),) = worker.pull(0, since_version=0, skip_frames=2, item_version=1)
        assert (item.frames, rest) == (len(whole) - 2, whole[2:])
        assert worker.pull(0, since_version=1) == []
        ((item, _),) = worker.pull(0, since_version=5)
        assert item.kind == pb.ITEM_SNAPSHOT, "a reader of another past"


def test_all_readers_get_the_same_bytes() -> None:
    with (
        server(downlink_codec="int4", grace_seconds="0") as running,
        RawWorker(running.address) as worker,
        RawWorker(running.address, "behind") as behind,
    ):
        worker.enter(LARGE, [values(0)])
        behind.join(LARGE).expect("welcome")  # for it both updates are kept
        for version in range(2):
            worker.push(0, frames_of(values(version)), base_version=version)
            worker.expect("committed")
        request = pb.PullRequest(since_version=0).SerializeToString()
        answers = []
        for _ in range(2):
            with RawWorker(running.address, "reader") as reader:  # needs no session
                raw = reader.channel.unary_stream("/diloco.v1.Outer/Pull", lambda b: b, lambda b: b)
                answers.append(list(raw(request, timeout=30)))
        assert answers[0] == answers[1]
        replies = [pb.PullReply.FromString(m) for m in answers[0]]
        assert [r.item.version for r in replies if r.HasField("item")] == [1, 2]


def test_a_reader_that_stands_still_is_told_that_its_version_is_gone() -> None:
    size = 8_000_000
    with server(uplink_codec="int4", downlink_codec="int4") as running, RawWorker(running.address) as worker:
        worker.enter(manifest_of(size), [values(0, size)])  # which no compression makes small enough for the buffers
        frames = frames_of(np.ones(size), Format.INT4)
        first = worker.stub.Pull(pb.PullRequest(snapshot=True), timeout=60)
        assert next(first).item.version == 0
        readers = [first]
        for version in range(2):
            worker.push(0, frames, base_version=version, codec=pb.CODEC_INT4)
            worker.expect("committed")
            readers.append(worker.stub.Pull(pb.PullRequest(snapshot=True), timeout=60))
            assert next(readers[-1]).item.version == version + 1
        with refused(SnapshotExpired, grpc.StatusCode.ABORTED, "version 0 of fragment 0 was overtaken"):
            list(first)
        assert sum(1 for _ in readers[2]) == -(-size // BLOCK // Format.FP32.spec.frame_blocks)
        readers[1].cancel()


# -- sessions --


def states(running: Daemon) -> dict[str, str]:
    with RawWorker(running.address) as reader:
        return {w.worker_id: w.state for w in reader.stub.Status(pb.StatusRequest(), timeout=30).workers}


def test_a_newer_process_ends_the_session_of_the_older() -> None:
    with (
        server() as running,
        RawWorker(running.address, generation=1) as old,
        RawWorker(running.address, generation=2) as new,
    ):
        old.enter(SMALL, [np.zeros(100)])
        new.enter(SMALL, [])
        with refused(Superseded, grpc.StatusCode.ABORTED):
            old.expect("all_finished")
        with refused(Superseded, grpc.StatusCode.ABORTED, "stop this one, or give it another worker_id"):
            old.join(SMALL).expect("welcome")
        new.push(0, frames_of(np.ones(100)))
        assert new.expect("committed").fate == pb.FATE_COUNTED


def test_a_second_session_of_the_same_process_ends_the_first() -> None:
    with server() as running, RawWorker(running.address) as one, RawWorker(running.address) as two:
        one.enter(SMALL, [np.zeros(100)])
        two.enter(SMALL, [])
        with refused(ConnectionClosed, grpc.StatusCode.UNAVAILABLE, "another session of this worker has begun"):
            one.expect("all_finished")
        one.say(leave=pb.Leave())
        two.push(0, frames_of(np.ones(100)))
        assert two.expect("committed").fate == pb.FATE_COUNTED


@pytest.mark.parametrize("how", ["ends its requests", "vanishes"])
def test_a_session_that_ends_without_leave_keeps_its_lease(how: str) -> None:
    config = {"min_workers": 1, "lease_seconds": 2.0}
    with server(**config) as running, RawWorker(running.address, "a") as stays, RawWorker(running.address, "b") as goes:
        stays.enter(SMALL, [np.zeros(100)])
        goes.enter(SMALL, [])
        stays.push(0, frames_of(np.ones(100)))
        assert stays.expect("committed").version == 1, "the round that b was too late for"
        if how == "vanishes":
            goes.channel.close()
        else:
            goes.end_session()
            assert list(goes.events)[-1].WhichOneof("body") == "committed", "ends with status OK"
        assert states(running) == {"a": "ready", "b": "ready"}
        stays.push(0, frames_of(np.ones(100)), base_version=1)
        while states(running)["b"] != "gone":
            stays.say(heartbeat=pb.Heartbeat())
        assert stays.expect("committed").version == 2


def test_whoever_leaves_is_gone_at_once() -> None:
    with server() as running, RawWorker(running.address) as worker:
        worker.enter(SMALL, [np.zeros(100)])
        worker.say(leave=pb.Leave(reason="done"))
        worker.end_session()
        assert list(worker.events) == []
        assert states(running) == {"w": "gone"}
        with refused(NotMember, grpc.StatusCode.FAILED_PRECONDITION, "say hello again"):
            worker.push(0, frames_of(np.ones(100)))
        worker.enter(SMALL, [])
        assert states(running) == {"w": "ready"}


def test_a_session_whose_lease_ran_out_is_told_to_say_hello_again() -> None:
    with server(lease_seconds=1.0) as running, contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(RawWorker(running.address, name)) for name in "ab")
        a.enter(SMALL, [np.zeros(100)])
        b.join(SMALL).expect("welcome")
        while states(running)["b"] != "gone":
            a.say(heartbeat=pb.Heartbeat())
        b.say(heartbeat=pb.Heartbeat())
        with refused(NotMember, grpc.StatusCode.FAILED_PRECONDITION, "say hello again"):
            b.expect("all_finished")


def test_the_end_of_the_server_is_announced() -> None:
    with contextlib.ExitStack() as stack:
        with server() as running:
            worker = stack.enter_context(RawWorker(running.address))
            worker.enter(SMALL, [np.zeros(100)])
        assert worker.expect("draining").reason
        with refused(ConnectionClosed, grpc.StatusCode.UNAVAILABLE, "shutting down"):
            worker.expect("all_finished")


# -- faults of our own --


def test_a_commit_that_fails_stops_the_server_loudly(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MemoryError, match="for the test"), contextlib.ExitStack() as stack:
        running = stack.enter_context(server())
        worker = stack.enter_context(RawWorker(running.address))
        worker.enter(SMALL, [np.zeros(100)])

        def fail(*_: object) -> None:
            raise MemoryError("for the test")

        running.engine.run.commit = fail
        assert worker.push(0, frames_of(np.ones(100))).kind == pb.OUTCOME_STAGED
        with refused(ConnectionClosed, grpc.StatusCode.UNAVAILABLE, "it has failed"):
            worker.expect("committed")
    assert "the server has failed and stops" in caplog.text


def test_a_timer_that_fails_stops_the_server_loudly() -> None:
    with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as stack:
        running = stack.enter_context(server(lease_seconds=1.0))
        worker = stack.enter_context(RawWorker(running.address))
        worker.enter(SMALL, [np.zeros(100)])

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        running.engine.run.leave = fail  # when the lease runs out
        with refused(ConnectionClosed, grpc.StatusCode.UNAVAILABLE, "it has failed"):
            worker.expect("committed")


def test_a_message_that_fails_ends_its_session_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    with server() as running, RawWorker(running.address, "a") as good, RawWorker(running.address, "b") as bad:
        good.enter(SMALL, [np.zeros(100)])
        bad.enter(SMALL, [])

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        running.engine.hear = fail
        bad.say(heartbeat=pb.Heartbeat())
        with refused(DilocoError, grpc.StatusCode.UNKNOWN, "its log says why"):
            bad.expect("all_finished")
        good.push(0, frames_of(np.ones(100)))
        assert good.expect("committed").version == 1
    assert "ZeroDivisionError" in caplog.text


# -- describe, status --


def test_describe_and_status_follow_the_run() -> None:
    with server(min_workers=2) as running, RawWorker(running.address, "a") as a, RawWorker(running.address, "b") as b:

        def look() -> tuple[pb.RunStatus, pb.RunDescription]:
            status = a.stub.Status(pb.StatusRequest(), timeout=30)
            return status, a.stub.Describe(pb.DescribeRequest(), timeout=30)

        status, description = look()
        assert (status.state, description.seeded, len(description.manifest.tensors)) == ("empty", False, 0)
        assert description.config["min_workers"] == "2"
        run_id = a.join(SMALL).expect("welcome").run_id
        a.expect("seed_wanted")
        status, description = look()
        assert (status.state, description.seeded) == ("seeding", False)
        assert status.run_id == description.run_id == run_id
        assert description.manifest.tensors[0].name == "layers.0.weight"
        assert description.layout_fingerprint == running.engine.run.layout.fingerprint
        a.seed([np.zeros(100)])
        a.say(ready=pb.Ready())
        assert a.expect("waiting") == pb.Waiting(ready=1, needed=2)
        assert look()[0].state == "waiting"
        b.enter(SMALL, [])
        a.push(0, frames_of(np.ones(100)))
        a.say(heartbeat=pb.Heartbeat(step=12, stall_seconds=0.5))
        b.push(0, frames_of(np.ones(100)))
        digest_1 = b.expect("committed").digest
        a.push(0, frames_of(np.ones(100)), base_version=1)
        status, description = look()
        assert (status.state, status.rounds, status.parameters, description.seeded) == ("running", 1, 100, True)
        (fragment,) = status.fragments
        assert (fragment.kind, fragment.parameters, fragment.version) == ("trained", 100, 1)
        assert fragment.digest == digest_1
        assert (list(fragment.contributed), list(fragment.waiting_for)) == (["a"], ["b"])
        assert fragment.update_bytes > 0
        assert {w.worker_id: (w.state, w.counted) for w in status.workers} == {"a": ("ready", 1), "b": ("ready", 1)}
        assert 0 < status.bytes_in < 1000
        for worker in (a, b):
            worker.say(finished=pb.Finished())
        for worker in (a, b):
            assert worker.expect("all_finished").versions[0].version == 2
        assert look()[0].state == "finished"
        assert next(w for w in look()[0].workers if w.worker_id == "a").last.step == 12
