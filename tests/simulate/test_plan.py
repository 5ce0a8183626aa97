"""Planned runs whose outcome can be worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from diloco_cli.simulate.__main__ import main
from diloco_cli.simulate.line import Speed
from diloco_cli.simulate.plan import Plan, plan_run
from diloco_cli.simulate.plan_table import as_dict
from diloco_server.config import RunConfig

CLASSIC = {"sync_every": 10, "num_fragments": 1, "overlap_steps": 0, "uplink_codec": "fp32", "downlink_codec": "fp32"}


def planned(hours: float = 1.0, workers: int = 4, steps: tuple[float, ...] = (1.0,), **changes) -> dict:
    speed = changes.pop("speed", Speed())
    parameters = changes.pop("parameters", 1e6)
    failures = {name: changes.pop(name) for name in ("mtbf_hours", "rejoin_minutes") if name in changes}
    config = RunConfig(**(CLASSIC | {"min_workers": workers} | changes))
    plan = Plan(
        config=config, hours=hours, workers=workers, step_seconds=steps, parameters=parameters, speed=speed, **failures
    )
    return as_dict(plan, plan_run(plan))


def test_equal_workers_on_perfect_lines_use_all_their_time() -> None:
    numbers = planned()
    assert numbers["compute_used"] == 1.0
    assert numbers["contributions_counted"] == 1.0
    assert numbers["rounds_per_hour"] == pytest.approx(360, abs=1)


def test_a_line_whose_transfers_take_half_the_period_stalls_for_as_long() -> None:
    free = planned()
    size = free["workers"][0]["gb_up_per_day"] * 1e9 / 24 / free["rounds_per_hour"]
    assert 0.8 * 4e6 < size < 4.1e6, "fp32, which zstd makes a little smaller"
    numbers = planned(speed=Speed(up=size / 5))  # the period is 10 s
    assert numbers["compute_used"] == pytest.approx(2 / 3, rel=0.02)
    assert numbers["rounds_per_hour"] == pytest.approx(240, rel=0.02)
    assert numbers["server_gb_in_per_day"] == pytest.approx(4 * size * 240 * 24 / 1e9, rel=0.02)


def test_overlap_hides_a_transfer_that_fits_into_it() -> None:
    numbers = planned(speed=Speed(up=4e6 / 2.5), overlap_steps=3)
    assert numbers["compute_used"] == 1.0


def test_in_step_the_fast_wait_for_the_slow() -> None:
    numbers = planned(steps=(1.0, 1.0, 2.0, 2.0), grace_seconds="inf")
    assert [round(w["compute_used"], 2) for w in numbers["workers"]] == [0.5, 0.5, 1.0, 1.0]


def test_dynamic_local_updates_let_nobody_wait() -> None:
    settings = {"sync_every": 100, "grace_seconds": "inf", "dynamic_local_updates": True}
    numbers = planned(hours=10, steps=(1.0, 1.0, 2.0, 2.0), **settings)
    assert [w["sync_every"] for w in numbers["workers"]] == [100, 100, 50, 50]
    assert numbers["compute_used"] > 0.98


def test_who_dies_is_down_until_it_rejoins() -> None:
    failing = {"mtbf_hours": 5.0, "rejoin_minutes": 60.0}
    numbers = planned(hours=100, steps=(10.0,), sync_every=20, lease_seconds=100.0, min_workers=1, **failing)
    deaths = sum(w["deaths"] for w in numbers["workers"])
    assert deaths == pytest.approx(4 * 100 / 6, rel=0.3)
    assert numbers["compute_used_of_all"] == pytest.approx(5 / 6, rel=0.08)


def test_the_command_plans() -> None:
    arguments = ["--hours", "1", "--workers", "3", "--step-seconds", "0.5,1", "--parameters", "1e8"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    numbers = json.loads(result.output)
    assert [w["step_seconds"] for w in numbers["workers"]] == [0.5, 1.0, 0.5]
    assert "rounds an hour" in CliRunner().invoke(main, arguments).output


def test_step_seconds_that_are_no_numbers_are_refused() -> None:
    assert CliRunner().invoke(main, ["--hours", "1", "--step-seconds", "fast"]).exit_code == 2


def test_the_simulator_does_without_torch() -> None:
    code = "import sys, diloco_cli.simulate.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
