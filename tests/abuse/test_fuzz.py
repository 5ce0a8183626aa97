"""20,000 messages that no client sends, from several strangers at once, while a run goes on."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
from callers import Callers, Tally
from hostile import Hostile, rounds_at
from memory import MIB, rss, tree_bytes
from server_process import ServerProcess
from steady import SETTINGS, Steady

from diloco_proto import outer_pb2 as pb
from diloco_proto import outer_pb2_grpc as rpc
from diloco_proto.errors import DamagedFrame, InvalidContribution, NotMember, RunMismatch, Superseded, UnsupportedModel
from diloco_server import RunConfig, serve

SEED = 20260
MESSAGES = 20_000
WARM = 4_000

MOST_GROWN = 40 * MIB
"""Of the server's memory, after the first messages: what the allocator keeps. They have 300 MB together."""

MOST_ON_DISK = 4 * MIB
MOST_LOGGED = MIB

FULL_AND_PARTS = ("OUTCOME_PART_HELD", "OUTCOME_CLOSED", "OUTCOME_ALREADY_HAVE")
REFUSED = tuple(
    e.__name__ for e in (InvalidContribution, DamagedFrame, NotMember, Superseded, RunMismatch, UnsupportedModel)
)


def arguments() -> list[str]:
    return [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run_id(address: str) -> str:
    with grpc.insecure_channel(address) as channel:
        return rpc.OuterStub(channel).Describe(pb.DescribeRequest(), timeout=30).run_id


def test_whatever_arrives_gets_a_typed_answer_and_changes_nothing(tmp_path: Path) -> None:
    state = tmp_path / "fuzzed"
    idle = 0
    with ServerProcess(state, *arguments()) as server:
        with Steady(server.address) as steady:
            hostile, callers = Hostile(SEED, run_id(server.address)), Callers(server.address)
            steady.begin(lambda: rounds_at(callers.tally.calls))

            def enough(tally: Tally) -> bool:
                nonlocal idle
                if tally.messages >= WARM and not idle:
                    idle = rss(server.process.pid)
                return tally.messages >= MESSAGES or len(tally.wrong) > 20 or steady.error is not None

            callers.run(hostile.call, enough)
            grown = rss(server.process.pid) - idle
            on_disk = tree_bytes(state)
            steady.stop()
            steady.run_to(steady.rounds + 2)
            rounds, found = steady.rounds, steady.digests()
        assert server.terminate() == 0
    tally = callers.tally
    assert tally.wrong == [], f"seed {SEED}"
    log = server.said()
    assert "Traceback" not in log, log[log.find("Traceback") - 500 :][:3000]
    odd = [line[:500] for line in log.splitlines() if not re.match(r"\d{4}-\d\d-\d\d [\d:]{8} (INFO|WARNING) ", line)]
    assert odd == [], "errors, or somebody else's words in a line of their own"
    assert found == undisturbed(rounds)
    assert grown < MOST_GROWN
    assert on_disk < MOST_ON_DISK
    assert len(log) < MOST_LOGGED
    seen = {answer for _, answer in (key.split(" ", 1) for key in tally.answers)}
    assert seen >= {*FULL_AND_PARTS, *REFUSED, "OK", "gone away"}, "the messages got as far as they should"


def undisturbed(rounds: int) -> dict[int, tuple[int, int]]:
    """What the same workers come to with nobody else about."""
    with serve(RunConfig(**SETTINGS)) as server, Steady(server.address) as steady:
        steady.run_to(rounds)
        return steady.digests()
