"""Sessions over a link that falls silent, or whose connections outlive one another."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest
from proxy import Proxy
from raw_worker import hello, manifest_of

from diloco_client import session as session_module
from diloco_client.session import Session
from diloco_client.transport import Retry, Transport
from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import DilocoError
from diloco_server import RunConfig, serve
from diloco_server.daemon import Daemon

MANIFEST = manifest_of(100)


class Worker:
    """The client's session over the proxy, and what it has heard."""

    def __init__(self, address: str, lease: float) -> None:
        self.transport = Transport(address, Retry(first=0.001, cap=0.05))
        self.welcomes = 0
        self.lost = 0
        self.failed: DilocoError | None = None
        self.changed = threading.Condition()
        self.beats = 0
        self.session = Session(
            self.transport,
            "w",
            1,
            MANIFEST,
            beat=self._beat,
            on_welcome=lambda _: self._note("welcomes"),
            on_event=lambda _: None,
            on_lost=lambda: self._note("lost"),
            on_fatal=self._fail,
        )
        self.session.start()

    def _beat(self) -> pb.Heartbeat:
        self._note("beats")
        return pb.Heartbeat(step=self.beats)

    def _note(self, name: str) -> None:
        with self.changed:
            setattr(self, name, getattr(self, name) + 1)
            self.changed.notify_all()

    def _fail(self, error: DilocoError) -> None:
        with self.changed:
            self.failed = error
            self.changed.notify_all()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.failed is not None or condition(), 60), f"no {what}"
        assert self.failed is None

    def close(self) -> None:
        self.session.close("done")
        self.transport.close()


@contextmanager
def connected(lease: float = 600.0) -> Iterator[tuple[Worker, Proxy, Daemon]]:
    with serve(RunConfig(lease_seconds=lease)) as server, Proxy(server.port) as link:
        worker = Worker(link.address, lease)
        try:
            worker.until(lambda: worker.welcomes == 1, "welcome")
            yield worker, link, server
        finally:
            worker.close()


def states(server: Daemon) -> dict[str, str]:
    return {m.worker_id: m.state.value for m in server.engine.run.members.all()}


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_session_that_falls_silent_is_taken_up_anew_before_the_lease_runs_out(
    way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session_module, "LEAST_SILENCE", 0.0)
    monkeypatch.setattr(session_module, "SILENT_BEATS", 1.5)
    with connected(lease=4.0) as (worker, link, server), caplog.at_level(logging.WARNING, "diloco"):
        (former,) = link.open
        link.stall(former, up=way != "down", down=way != "up")
        worker.until(lambda: worker.welcomes == 2, "second welcome")
        assert states(server) == {"w": "joining"}, "it never was gone"
        link.resume()  # what the old session still holds harms nobody
        beats = worker.beats
        worker.until(lambda: worker.beats > beats + 2, "beats")
        assert (worker.welcomes, worker.lost) == (2, 1)
    assert "lost the server" in caplog.text
    assert "nothing has moved for" in caplog.text
    assert "back in run" in caplog.text


def test_an_old_session_that_is_half_open_does_not_disturb_the_new_one() -> None:
    with connected(lease=2.0) as (worker, link, server):
        link.stall()  # so that the old one holds beats that the server has not heard
        beats = worker.beats
        worker.until(lambda: worker.beats > beats, "beat")
        link.orphan()
        link.resume(old=False)
        worker.until(lambda: worker.welcomes == 2, "second welcome")
        link.deliver()  # the old beats, and the end of the old stream
        beats = worker.beats
        worker.until(lambda: worker.beats > beats + 2, "beats")
        assert states(server) == {"w": "joining"}
        assert (worker.welcomes, worker.lost) == (2, 1)


def test_a_session_comes_back_to_a_server_that_has_moved() -> None:
    config = RunConfig()
    with serve(config) as first, Proxy(first.port) as link:
        worker = Worker(link.address, 600.0)
        worker.until(lambda: worker.welcomes == 1, "welcome")
        run_id = worker.session.run_id
        with serve(config) as second:
            second.engine.run.run_id = run_id  # as when it resumes from its state directory
            link.upstream_port = second.port
            link.refusing = True
            link.cut()
            worker.until(lambda: worker.lost > 2, "attempts that fail")
            link.refusing = False
            worker.until(lambda: worker.welcomes == 2, "second welcome")
            assert states(second) == {"w": "joining"}
            worker.close()


def test_a_machine_that_was_asleep_reconnects_at_once() -> None:
    with connected() as (worker, link, _):
        watchdog = worker.transport._lines.watchdog
        before = watchdog._slept
        watchdog._slept = lambda: before() + 3600
        worker.until(lambda: worker.welcomes == 2, "second welcome")
        assert link.accepted == 2


def test_a_server_answers_every_beat_and_gives_a_stream_without_hello_up() -> None:
    with serve(RunConfig()) as server, Proxy(server.port) as link:
        server.engine.limits.bounds = type(server.engine.limits.bounds)(first_seconds=0.2)
        transport = Transport(link.address)
        silent = transport.session(iter(threading.Event().wait, True))  # opens, and says nothing
        with pytest.raises(ConnectionError, match="nothing has arrived on this stream for 0 s"):
            next(silent)
        requests = [pb.SessionRequest(hello=hello("w", MANIFEST))]
        requests += [pb.SessionRequest(heartbeat=pb.Heartbeat(step=i)) for i in range(3)]
        events = [e.WhichOneof("body") for e in transport.session(iter(requests))]
        assert events.count("beat") == 3
        transport.close()


def test_nothing_is_left_open_after_many_reconnections() -> None:
    with connected() as (worker, link, _):
        for count in range(2, 12):
            link.cut()
            worker.until(lambda count=count: worker.welcomes == count, "welcome")
        assert len(worker.transport._connector._former) == 0
        assert link.accepted == 11
        assert isinstance(worker.transport._connector.line("session").channel, grpc.Channel)
