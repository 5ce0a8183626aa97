"""Pushes and pulls of a real server over a link that cuts, stalls, damages and limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from proxy import Proxy
from raw_worker import RawWorker, flat, frames_of, manifest_of

from diloco_client import connect
from diloco_client.landing import Target
from diloco_client.network import Network
from diloco_client.transport import Retry, Transport
from diloco_proto import channel
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import digest
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import DamagedFrame, InvalidContribution
from diloco_server import RunConfig, daemon, serve, service
from diloco_server.keeper import Keeper

SOON = Retry(first=0.001, cap=0.01)
SIZE = 2_000_000
"""Values: 8 frames of 1 MiB in fp32."""
FRAMES = 8
PATIENT = Network(progress_timeout=60.0)


def values(seed: int = 1) -> Floats:
    return flat(np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32))


class Bed:
    """A run with one worker, whose session is direct and whose transfers go through the proxy."""

    def __init__(self, stack: ExitStack, network: Network) -> None:
        config = RunConfig(
            num_fragments=1,
            uplink_codec="fp32",
            downlink_codec="fp32",
            outer_optimizer="sgd",
            outer_lr=1.0,
            weighting="uniform",
            grace_seconds="inf",
            lease_seconds=600.0,
        )
        self.server = stack.enter_context(serve(config))
        self.worker = stack.enter_context(RawWorker(self.server.address))
        self.worker.enter(manifest_of(SIZE), [values(0)])
        self.link = stack.enter_context(Proxy(self.server.port))
        self.transport = Transport(self.link.address, SOON, network)
        stack.callback(self.transport.close)
        self.frames = frames_of(values())
        assert len(self.frames) == FRAMES

    def push(self) -> pb.Outcome:
        return self.transport.push(self.worker.header(0, self.frames), self.frames)

    def pull(self, **request: object) -> Floats:
        """What the pull makes of zeros."""
        target = on_zeros()
        *_, item = self.transport.pull(pb.PullRequest(fragment=0, **request), target)
        assert item.found == digest(target.theta)
        return target.theta

    def ask(self) -> None:
        """For news, of which there are none."""
        assert self.transport.pull(pb.PullRequest(fragment=0), on_zeros()) == []

    def check_counted_once(self) -> None:
        """θ is the seed less the contribution, to the bit."""
        assert self.worker.expect("committed").fate == pb.FATE_COUNTED
        ((item, _),) = self.worker.pull(0, snapshot=True)
        assert item.version == 1
        assert item.digest == digest(values(0) - values())

    def in_background(self, work: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.01)


def on_zeros() -> Target:
    zeros = flat(np.zeros(SIZE, np.float32))
    return Target(zeros, np.empty_like(zeros))


@contextmanager
def bed(**network: float) -> Iterator[Bed]:
    with ExitStack() as stack:
        yield Bed(stack, Network(**({"progress_timeout": 60.0} | network)))


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_push_that_is_cut_in_mid_frame_goes_on_at_that_frame(lanes: int) -> None:
    with bed(data_connections=lanes) as on:
        on.link.up.cut_after = 3_500_000
        assert on.push().kind == pb.OUTCOME_STAGED
        assert on.link.up.cut_after is None
        assert on.link.accepted == lanes + 1
        sent, size = on.transport.counters.bytes_up, sum(map(len, on.frames))
        assert sent < size + (channel.PUSH_WINDOW_FRAMES + 1) * 1_100_000, "more than a window was sent twice"
        on.check_counted_once()


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_pull_that_is_cut_in_mid_frame_goes_on_at_that_frame(lanes: int) -> None:
    with bed(data_connections=lanes) as on:
        on.link.down.cut_after = 3_500_000
        assert np.array_equal(on.pull(snapshot=True), values(0))
        assert on.link.down.cut_after is None
        assert on.transport.counters.bytes_down < 4 * SIZE + 2_000_000, "what had come was fetched again"


def test_what_stalls_for_ever_goes_on_over_a_new_connection() -> None:
    with bed(progress_timeout=0.5) as on:
        on.pull(snapshot=True)
        (former,) = on.link.open
        on.link.stall(former)  # and never resume
        assert on.push().kind == pb.OUTCOME_STAGED
        on.check_counted_once()
        (now,) = [number for number in on.link.open if number != former]
        on.link.stall(now)
        assert np.array_equal(on.pull(snapshot=True), values(0) - values())


def test_a_short_stall_is_only_waited_for() -> None:
    with bed() as on:
        on.link.up.rate = 40_000_000
        done = on.in_background(lambda: on.push())
        on.wait_for(lambda: on.link.open != [] and on.link.carried(on.link.open[0], "up") > 2_000_000, "two frames")
        on.link.stall()
        reached = on.link.carried(1, "up")
        on.link.resume()
        done.join(60)
        on.check_counted_once()
        assert on.link.accepted == 1
        assert on.link.carried(1, "up") >= reached


def test_one_of_several_connections_that_stalls_holds_the_others_up_no_longer_than_the_timeout() -> None:
    with bed(progress_timeout=1.0, data_connections=4) as on:
        on.pull(snapshot=True)
        assert len(on.link.open) == 4
        on.link.stall(on.link.open[1])
        assert on.push().kind == pb.OUTCOME_STAGED
        on.check_counted_once()
        assert on.link.accepted == 5


@pytest.mark.parametrize("lanes", [2, 5, 8])
def test_any_number_of_connections_carries_the_same_bytes(lanes: int) -> None:
    with bed(data_connections=lanes) as on:
        assert on.push().kind == pb.OUTCOME_STAGED
        on.check_counted_once()
        assert on.link.accepted == lanes
        assert np.array_equal(on.pull(since_version=0), -values())  # subtracted from zeros
        assert np.array_equal(on.pull(snapshot=True), values(0) - values())
        assert on.pull(since_version=0).size  # by connections that have been used
        assert on.link.accepted == lanes


def test_of_the_speed_of_links_updates_tell_and_snapshots_do_not() -> None:
    """Whoever looks at θ, over whatever line, is no reason to compress what the workers get."""
    with bed() as on:
        assert on.push().kind == pb.OUTCOME_STAGED
        on.check_counted_once()
        assert np.array_equal(on.pull(snapshot=True), values(0) - values())
        assert on.server.engine.reader_speeds.slowest is None
        assert np.array_equal(on.pull(since_version=0), -values())
        assert on.server.engine.reader_speeds.slowest is not None


def test_frames_that_are_damaged_on_the_way_are_sent_again() -> None:
    with bed() as on:
        on.link.up.damage = on.link.down.damage = 2
        assert on.push().kind == pb.OUTCOME_STAGED
        on.check_counted_once()
        assert np.array_equal(on.pull(snapshot=True), values(0) - values())
        assert on.link.damaged == 4
        assert on.transport.counters.bytes_down < 4 * SIZE + 6_000_000, "whole frames were kept"


def test_a_link_that_damages_every_frame_is_named_in_the_end() -> None:
    with bed() as on:
        on.link.up.damage = on.link.down.damage = 1000
        for transfer in (on.push, lambda: on.pull(snapshot=True)):
            with pytest.raises(DamagedFrame, match=r"5 times in a row\. Something on the way changes bytes"):
                transfer()
        on.link.up.damage = on.link.down.damage = 0
        assert on.push().kind == pb.OUTCOME_STAGED
        on.check_counted_once()


def test_a_server_that_comes_back_elsewhere_is_found() -> None:
    with bed() as on, Proxy(on.link.port) as other:  # the way is longer now
        on.pull(snapshot=True)
        on.transport.close()
        transport = Transport(other.address, SOON, PATIENT)
        on.transport = transport
        on.pull(snapshot=True)
        other.upstream_port = on.server.port
        other.cut()
        on.pull(snapshot=True)
        assert on.push().kind == pb.OUTCOME_STAGED
        on.check_counted_once()
        transport.close()


def test_a_delayed_and_slow_link_only_takes_longer() -> None:
    with bed(data_connections=2) as on:
        on.link.up.delay = on.link.down.delay = 0.05
        on.link.up.rate = 30_000_000
        assert on.push().kind == pb.OUTCOME_STAGED
        on.check_counted_once()
        assert on.link.accepted == 2


def test_limits_of_speed_hold_over_all_connections_and_are_no_stall() -> None:
    with bed(data_connections=3, upload_limit=20e6, download_limit=20e6, progress_timeout=1.0) as on:
        began = time.monotonic()
        assert on.push().kind == pb.OUTCOME_STAGED
        up = time.monotonic() - began
        began = time.monotonic()
        on.pull(snapshot=True)
        down = time.monotonic() - began
        # A frame of each connection goes before anything is paid for.
        assert min(up, down) > (FRAMES - 4) * 1.1e6 / 20e6
        on.check_counted_once()


def test_to_wait_for_an_outcome_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may wait for its disk; it says meanwhile that it is there."""
    monkeypatch.setattr(service, "ANSWER_SECONDS", 0.1)
    with bed(progress_timeout=0.6) as on:
        durable, room = on.server.engine.keeper.durable, on.server.engine.keeper.room
        waits, crowds = iter([1.2, 1.2]), []

        async def slowly(*args):
            await asyncio.sleep(next(waits, 0.0))
            await durable()

        async def crowded():
            on.server.engine.keeper.room = room
            crowds.append(1)
            await asyncio.sleep(1.2)
            await room()

        monkeypatch.setattr(Keeper, "has_room", False)
        on.server.engine.keeper.durable, on.server.engine.keeper.room = slowly, crowded
        assert on.push().kind == pb.OUTCOME_STAGED
        assert on.push().kind in (pb.OUTCOME_ALREADY_HAVE, pb.OUTCOME_COUNTED), "answered to its header"
        on.check_counted_once()
        assert on.link.accepted == 1
        assert crowds == [1]


# -- keepalive --

PERIOD = 0.3


@pytest.fixture
def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "CLIENT_OPTIONS", channel.client_options(int(1000 * PERIOD)))
    monkeypatch.setattr(daemon, "SERVER_OPTIONS", channel.server_options(int(1000 * PERIOD)))


def test_an_idle_connection_lives_through_many_periods_and_a_dead_one_is_noticed(quick_pings: None) -> None:
    with bed() as on:
        on.ask()
        idle = on.link.carried(1, "up")
        on.wait_for(lambda: on.link.carried(1, "up") > idle + 8 * 17, "eight pings")  # of 17 bytes
        assert on.link.accepted == 1, "the server took the pings for abuse"
        on.ask()
        assert on.link.accepted == 1
        on.link.stall()
        on.wait_for(lambda: on.link.left(1), "the silent connection to be given up")
        on.link.resume()
        on.ask()
        assert on.link.accepted == 2


def test_a_server_with_the_ping_guard_of_grpc_would_end_such_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(connect, "CLIENT_OPTIONS", channel.client_options(int(1000 * PERIOD)))
    strict = [o for o in channel.server_options(60_000) if "min_ping_interval" not in o[0]]
    monkeypatch.setattr(daemon, "SERVER_OPTIONS", strict)
    with bed() as on:
        on.ask()
        on.wait_for(lambda: 1 not in on.link.open, "the server to complain")


def test_the_session_has_a_connection_of_its_own() -> None:
    with bed() as on:
        with pytest.raises(InvalidContribution, match="a session begins with hello"):
            next(on.transport.session(iter(())))
        on.ask()
        assert on.link.accepted == 2
