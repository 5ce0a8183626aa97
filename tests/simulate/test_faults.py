"""Thousands of runs with faults in virtual time: every promise of the design holds, and the checks bite."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from defects import DEFECTS, Defect
from restart_defects import RESTART_DEFECTS

from diloco_cli.simulate.__main__ import main
from diloco_cli.simulate.runs import Report, simulate_all
from diloco_cli.simulate.world import World, draw_setting, simulate

SCHEDULES = int(os.environ.get("DILOCO_SCHEDULES", "10000"))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("diloco")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def report() -> Report:
    return simulate_all(0, SCHEDULES, jobs=os.cpu_count() or 1)


@pytest.mark.timeout(900)
def test_no_promise_is_broken(report: Report) -> None:
    assert report.schedules == SCHEDULES
    assert not report.broken, "\n".join(text for _, _, text in report.broken[:10])
    assert report.fewest_events >= 100


@pytest.mark.timeout(900)
def test_every_kind_of_fault_and_answer_happens(report: Report) -> None:
    kinds = World(draw_setting(0)).faults.kinds
    rare = {kind: report.faults[kind] for kind in kinds if report.faults[kind] < SCHEDULES // 100}
    assert not rare, "too rare to count as tested"
    assert report.events["snapshot"] >= SCHEDULES // 10
    answers = ("staged", "already have", "counted", "closed", "conflict", "part held", "resync")
    assert min(report.answers[answer] for answer in answers) >= SCHEDULES // 100


@pytest.mark.parametrize("defect", [*DEFECTS, *RESTART_DEFECTS], ids=lambda d: d.name)
def test_a_mechanism_that_is_switched_off_is_missed(defect: Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    assert simulate(defect.seed).broken is None
    defect.apply(monkeypatch)
    broken = simulate(defect.seed).broken
    assert broken is not None, f"the defect is not found any more by seed {defect.seed}: look for another one"
    assert broken.promise == defect.promise
    assert f"--seed {defect.seed}" in str(broken), "it says how to replay it"
    assert str(pickle.loads(pickle.dumps(broken))) == str(broken), "also when another process has found it"


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_a_seed_is_one_run(seed: int) -> None:
    first, second = simulate(seed), simulate(seed)
    assert first == second
    assert first.trace != simulate(seed + 100).trace


def test_a_server_that_was_killed_goes_on() -> None:
    log: list[str] = []
    outcome = simulate(91, log)
    kills = sum(count for kind, count in outcome.faults.items() if kind.startswith("server killed"))
    assert kills == sum("the server is back" in line for line in log) > 0


def test_the_command_replays_a_seed() -> None:
    result = CliRunner().invoke(main, ["--seed", "3", "--verbose"])
    assert result.exit_code == 0, result.output
    assert "no promise was broken" in result.output
    assert "is attached" in result.output
    assert f"{simulate(3).trace:08x}" in result.output


def test_the_command_runs_many_and_reports() -> None:
    result = CliRunner().invoke(main, ["--schedules", "3", "--json"])
    numbers = json.loads(result.output)
    assert numbers["schedules"] == 3
    assert numbers["broken"] == []
    assert numbers["fewest_events"] >= 100
    assert sum(numbers["events_by_kind"].values()) == numbers["events"]
    assert "outer step" in CliRunner().invoke(main, ["--schedules", "2"]).output


def test_the_command_fails_when_a_promise_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    defect = next(d for d in DEFECTS if d.promise == 3)
    defect.apply(monkeypatch)
    result = CliRunner().invoke(main, ["--seed", str(defect.seed)])
    assert result.exit_code == 1
    assert f"replay: python -m diloco_cli.simulate --seed {defect.seed} --verbose" in result.output
