"""Sessions that break and come back, and servers that come back as others: what is told again, asked again, or late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy import Proxy
from raw_worker import manifest_of
from server_process import ServerProcess
from test_resume import PLAIN, Worker

import diloco_client
from diloco_client.session import Session
from diloco_client.transport import Retry, Transport
from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import CLIENT_OPTIONS
from diloco_server import RunConfig, serve


@pytest.fixture(autouse=True)
def _quick_retries_and_all_leave(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("diloco_client.transport.Retry", lambda: Retry(first=0.02, cap=0.2))
    yield
    while Worker.joined:
        Worker.joined.pop().crash()


def test_a_fate_that_was_told_to_nobody_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is cut, the round's event goes with it, and the answer to the push comes after the new welcome."""
    pushed, gate, outcomes = threading.Event(), threading.Event(), []
    push = Transport.push

    def slow(self: Transport, header: pb.PushHeader, frames: Any) -> pb.Outcome:
        outcome = push(self, header, frames)
        if header.purpose == pb.PURPOSE_CONTRIBUTION:
            outcomes.append(outcome.kind)
            pushed.set()
            assert gate.wait(30)
        return outcome

    with serve(RunConfig(**PLAIN | {"num_fragments": 1})) as server, Proxy(server.port) as link:
        worker = Worker(link.address)
        session = min(link.open)
        monkeypatch.setattr(Transport, "push", slow)
        link.stall(session, up=False)
        worker.step(4)
        assert pushed.wait(30)
        while diloco_client.status(server.address)["fragments"][0]["version"] == 0:
            pass
        link.cut(session)
        courier = worker.outer._courier
        assert courier.wait_until(lambda: courier._flights._announced[0] == 1, 30, 30)
        gate.set()
        training = threading.Thread(target=lambda: worker.step(8), daemon=True)
        training.start()
        training.join(30)
        assert not training.is_alive(), "it waits for a fate that nobody tells"
        assert outcomes[:2] == [pb.OUTCOME_STAGED, pb.OUTCOME_COUNTED]
        worker.outer.flush()
        assert worker.outer.stats.counted == diloco_client.status(server.address)["fragments"][0]["version"]


SETTINGS = ("--overlap-steps", "1", "--min-workers", "2", "--lease-seconds", "5")


def test_workers_that_wait_for_a_run_of_no_parameters_join_the_one_that_comes_after_it(
    tmp_path: Path, together: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seeding, gate = threading.Event(), threading.Event()
    push = Transport.push

    def slow(self: Transport, header: pb.PushHeader, frames: Any) -> pb.Outcome:
        if header.purpose == pb.PURPOSE_SEED:
            seeding.set()
            assert gate.wait(30)
        return push(self, header, frames)

    monkeypatch.setattr(Transport, "push", slow)
    state = tmp_path / "state"
    with ServerProcess(state, *SETTINGS, "--num-fragments", "2") as first, Proxy(first.port) as link:

        def work(index: int) -> dict[int, int] | None:
            if index == 2:
                assert seeding.wait(30)
                while diloco_client.status(first.address)["sessions"] < 2:
                    pass
                former = diloco_client.status(first.address)["run_id"]
                first.kill()
                second = ServerProcess(state, *SETTINGS, "--num-fragments", "1", "--sync-every", "6")
                servers.append(second)
                assert diloco_client.status(second.address)["run_id"] != former
                link.upstream_port = second.port
                gate.set()
                return None
            worker = Worker(link.address, f"w{index}")
            assert worker.outer._link.settings.sync_every == 6
            worker.step(14)
            worker.outer.flush(together=True)
            return worker.outer.base_digests()

        servers: list[ServerProcess] = []
        try:
            one, other, _ = together(3, work)
        finally:
            for server in servers:
                server.kill()
    assert one == other
    assert list(one) == [0]
    assert caplog.text.count("had no parameters yet and is no more; joining run") == 2


def test_a_worker_that_has_taken_a_runs_parameters_joins_no_other() -> None:
    with serve(RunConfig(**PLAIN)) as server, Proxy(server.port) as link:
        worker = Worker(link.address)
        worker.step(1)
        with serve(RunConfig(**PLAIN)) as another:
            link.upstream_port = another.port
            link.cut()
            courier = worker.outer._courier
            with pytest.raises(diloco_client.RunMismatch, match="it was started anew"):
                courier.wait_until(lambda: False, 30, 30)
            assert diloco_client.status(another.address)["workers"] == []


def test_what_is_said_while_the_session_comes_back_is_not_followed_by_what_was_said_before() -> None:
    session = Session(
        Transport("127.0.0.1:1"),
        "w",
        1,
        manifest_of(100),
        beat=pb.Heartbeat,
        on_welcome=lambda welcome: None,
        on_event=lambda event: None,
        on_lost=lambda: None,
        on_fatal=lambda error: None,
    )
    session.say(pb.SessionRequest(finished=pb.Finished(flush=1)))
    heard: list[str] = []
    repeating, said = threading.Event(), threading.Event()

    class Outgoing:
        def put(self, request: pb.SessionRequest) -> None:
            if request.HasField("finished"):
                repeating.set()
                said.wait(0.3)  # time for another thread to come in between
            heard.append(request.WhichOneof("body"))

    def train() -> None:
        assert repeating.wait(30)
        session.say(pb.SessionRequest(ready=pb.Ready()))
        said.set()

    session._outgoing = Outgoing()
    training = threading.Thread(target=train)
    training.start()
    session._handle(pb.SessionEvent(welcome=pb.Welcome(run_id="r")))
    training.join()
    assert heard == ["finished", "ready"]


def test_the_end_of_an_earlier_flush_together_does_not_end_this_one() -> None:
    with serve(RunConfig(**PLAIN)) as server:
        worker, other = Worker(server.address, "w"), Worker(server.address, "other")
        link = worker.outer._link
        versions = [pb.FragmentVersion(fragment=p) for p in range(2)]
        for flush in (1, 2):
            link.finished()
            for late in range(flush):
                link._on_event(pb.SessionEvent(all_finished=pb.AllFinished(versions=versions, flush=late)))
                assert not link.everyone_finished()
            link._on_event(pb.SessionEvent(all_finished=pb.AllFinished(versions=versions, flush=flush)))
            assert link.everyone_finished()
        other.outer.close()


def test_a_pace_that_comes_with_the_awaited_round_holds_from_the_merge_on() -> None:
    with serve(RunConfig(**PLAIN | {"overlap_steps": 0})) as server:
        worker = Worker(server.address)
        courier, link = worker.outer._courier, worker.outer._link
        wait = courier.wait

        def wait_and_hear(fragment: int) -> None:
            wait(fragment)
            link.pace = 4

        worker.step(5)
        courier.wait = wait_and_hear
        worker.step(1)
        assert worker.outer._joined.sync_every == 4


def test_a_server_that_was_away_for_long_is_found_again_soon_after_it_is_back() -> None:
    pauses = [Retry().pause(attempt) for attempt in range(1000)]
    assert max(pauses) <= 5.0
    assert max(pauses) > 4.0
    assert max(Retry().pause(0) for _ in range(1000)) <= 0.5
    assert dict(CLIENT_OPTIONS)["grpc.max_reconnect_backoff_ms"] <= 5000
