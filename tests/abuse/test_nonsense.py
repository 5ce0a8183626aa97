"""What one message can do: numbers, names and sizes that nobody means."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from raw_worker import RawWorker, frames_of, header, hello, manifest_of

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import DilocoError, InvalidContribution, ManifestMismatch, RunMismatch, UnsupportedModel
from diloco_proto.manifest import Pattern, build_layout
from diloco_proto.wire import error_from_rpc
from diloco_server import RunConfig, serve
from diloco_server.answers import MOST_TOLD
from diloco_server.daemon import Daemon
from diloco_server.pushes import MOST_WORK

MODEL = manifest_of(100)
SECONDS = 10.0
"""Of computing, for one message: some of these had taken minutes."""


@contextlib.contextmanager
def training(**changes: object) -> Iterator[tuple[Daemon, RawWorker]]:
    config = {"num_fragments": 1, "uplink_codec": "fp32", "grace_seconds": "inf", "lease_seconds": 600.0}
    with serve(RunConfig(**(config | changes))) as server, RawWorker(server.address) as worker:
        yield server, worker.enter(MODEL, [np.zeros(100)])


def refusal(worker: RawWorker, method: str, *messages: bytes) -> DilocoError:
    """What a call of these bytes ends with."""
    call = worker.channel.stream_stream(f"/diloco.v1.Outer/{method}")(iter(messages), timeout=60)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    error = error_from_rpc(caught.value)
    assert error is not None, caught.value
    assert error.status is caught.value.code()
    return error


def faults(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Errors in the log. Not gRPC's own when its thread, which serves all event loops of a process, has an event for
    the loop of an earlier test's server."""
    found = [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR]
    return [r for r in found if "PollerCompletionQueue" not in r.getMessage()]


def goes_on(worker: RawWorker) -> None:
    """A round of this worker alone."""
    ((item, _),) = worker.pull(0, snapshot=True)
    outcome = worker.push(0, frames_of(np.ones(100)), base_version=item.version, since_version=item.version)
    assert outcome.kind == pb.OUTCOME_STAGED
    worker.expect("committed")


@pytest.mark.parametrize("method", ["Session", "Push", "Pull", "Describe", "Status"])
def test_bytes_that_are_no_message_and_calls_without_one(method: str, caplog: pytest.LogCaptureFixture) -> None:
    with training() as (_, worker), caplog.at_level(logging.INFO):
        for messages in ([b"\xff" * 20], []):
            assert type(refusal(worker, method, *messages)) is InvalidContribution
        goes_on(worker)
    assert not faults(caplog)


@pytest.mark.parametrize(
    "field", ["train_seconds", "stall_seconds", "step", "steps", "tokens", "bytes_up", "bytes_down"]
)
def test_numbers_of_a_heartbeat_that_would_be_those_of_all(field: str) -> None:
    with training(dynamic_local_updates=True) as (server, worker), RawWorker(server.address, "x") as other:
        for value in (float("inf"), float("nan"), -1.0) if "seconds" in field else ((1 << 64) - 1, 1 << 54):
            other.join(MODEL).expect("welcome")
            other.say(ready=pb.Ready())
            other.say(heartbeat=pb.Heartbeat(**{"steps": 1, "train_seconds": 5e-324, field: value}))
            with pytest.raises(grpc.RpcError, match=f"a heartbeat in which {field} is") as caught:
                list(other.events)
            assert type(error_from_rpc(caught.value)) is InvalidContribution
        other.join(MODEL)
        other.say(leave=pb.Leave())
        other.end_session()
        list(other.events)
        goes_on(worker)
        assert worker.stub.Status(pb.StatusRequest()).workers[0].steps_per_second == 0.0


def test_a_loss_may_be_anything() -> None:
    with training() as (_, worker):
        worker.say(heartbeat=pb.Heartbeat(loss=float("nan")))
        worker.expect("beat")


@pytest.mark.parametrize("field", ["tokens", "steps"])
def test_work_that_nobody_can_have_done(field: str) -> None:
    with training() as (server, worker):
        frames = frames_of(np.ones(100))
        for value in (MOST_WORK + 1, (1 << 64) - 1):
            request = pb.PushRequest(header=worker.header(0, frames, **{field: value}))
            assert f"{value} {field}" in str(refusal(worker, "Push", request.SerializeToString()))
        assert worker.push(0, frames, **{field: MOST_WORK}).kind == pb.OUTCOME_STAGED
        worker.expect("committed")
        goes_on(worker)
        assert worker.stub.Status(pb.StatusRequest()).tokens == server.engine.run.tokens


def test_words_of_a_peer_are_cut_and_stay_in_their_line(caplog: pytest.LogCaptureFixture) -> None:
    forged = "a\n2026-01-01 00:00:00 ERROR forged \x1b[2J"
    with training() as (_, worker), caplog.at_level(logging.INFO):
        for words in (forged, "y" * (2 << 20), "ы" * (1 << 20)):
            error = refusal(worker, "Push", pb.PushRequest(header=pb.PushHeader(run_id=words)).SerializeToString())
            assert type(error) is RunMismatch
            assert len(str(error).encode()) <= MOST_TOLD
            assert str(error).isprintable()
            name = refusal(worker, "Session", pb.SessionRequest(hello=hello(words, MODEL)).SerializeToString())
            assert "printable characters" in str(name)
            worker.say(leave=pb.Leave(reason=words))
            worker.end_session()
            list(worker.events)
            worker.join(MODEL).expect("welcome")
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("diloco")]
    assert any("left: a\\n2026" in line for line in ours)
    assert all(line.isprintable() and len(line) < 2 * MOST_TOLD for line in ours)


def manifests() -> dict[str, pb.Manifest]:
    def tensor(name: str, *shape: int, **fields: object) -> pb.Tensor:
        return pb.Tensor(**({"name": name, "shape": shape, "dtype": "float32", "role": pb.ROLE_TRAINED} | fields))

    many = [tensor(str(i), 1) for i in range(170_000)]
    return {
        "is listed twice": pb.Manifest(tensors=[*many, many[-1]]),
        "dimensions; at most": pb.Manifest(tensors=[tensor("w", *[(1 << 64) - 1] * 300_000)]),
        "GiB of memory that the model needs": pb.Manifest(tensors=[tensor(str(i), 1 << 38) for i in range(4)]),
        "5.9e+20 GiB of memory": pb.Manifest(tensors=[tensor("w", *[(1 << 64) - 1] * 64)]),
        "has no elements": pb.Manifest(tensors=[tensor("w", 0)]),
        "tensor 'w' is \\x00\\x00": pb.Manifest(tensors=[tensor("w", 1, dtype="\0" * 1_000_000)]),
        "has role -7": pb.Manifest(tensors=[tensor("w", 1, role=-7)]),
        "no trained parameters": pb.Manifest(),
    }


def test_a_fragment_whose_frames_could_not_say_where_they_begin() -> None:
    with pytest.raises(UnsupportedModel, match="fragment 0 would have 274877907008 values; 274877906944 are the most"):
        build_layout(manifest_of((1 << 38) + 1), 1, Pattern.STRIDED)


@pytest.mark.parametrize("seeded", [False, True])
def test_models_that_no_run_can_have(seeded: bool, caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig(uplink_codec="fp32")
    with serve(config) as server, RawWorker(server.address) as worker, RawWorker(server.address, "x") as other:
        if seeded:
            worker.enter(MODEL, [np.zeros(100)])
        for says, manifest in manifests().items():
            first = hello("x", MODEL)
            first.manifest.CopyFrom(manifest)
            began = time.process_time()
            error = refusal(other, "Session", pb.SessionRequest(hello=first).SerializeToString())
            assert time.process_time() - began < SECONDS, says
            assert says in str(error) or (seeded and type(error) is ManifestMismatch)
            assert type(error) is UnsupportedModel or seeded
        if not seeded:
            worker.enter(MODEL, [np.zeros(100)])
        goes_on(worker)
    assert not faults(caplog)


def test_a_push_of_very_many_parts_is_judged_quickly() -> None:
    with training() as (_, worker):
        first = header("w", 0, [], 1, parts=[pb.Part(first_block=i, num_blocks=1) for i in range(250_000)])
        first.frame_digests.extend(range(250_000))
        began = time.process_time()
        assert "out of order or beyond" in str(
            refusal(worker, "Push", pb.PushRequest(header=first).SerializeToString())
        )
        assert time.process_time() - began < SECONDS
        goes_on(worker)
