"""docs/choosing.md: formulas against the simulator, tables against the measurements, defaults against the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from documents import ROOT

from diloco_cli.simulate.__main__ import main as simulate
from diloco_server import RunConfig

TEXT = (ROOT / "docs" / "choosing.md").read_text()
PARITY = (ROOT / "docs" / "results" / "parity.md").read_text()
BYTES = 0.41
"""A parameter and direction, at int4, with everything counted."""


def table(first_row: str) -> list[list[str]]:
    """Cells of the rows under the table's head."""
    found = re.search(rf"^{re.escape(first_row)}\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert found, first_row
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found[1].splitlines()]


def share_used(parameters: float, p: int, h: int, tau: int, up: float, down: float, commit: float) -> float:
    """By the formula, for steps of a second and 50 ms one way; lines in Mbit/s."""
    way = 8 * BYTES * parameters / p * (1 / up + 1 / down) / 1e6 + commit + 4 * 0.05
    return h / (h + p * max(0.0, way - tau))


def simulated(p: int, h: int, tau: int, hours: float = 1.0) -> dict[str, float]:
    command = f"--json --hours {hours} --num-fragments {p} --sync-every {h} --overlap-steps {tau} --lease-seconds 60"
    lines = " --workers 4 --step-seconds 1 --parameters 1e9 --mbit-up 100 --mbit-down 300 --commit-seconds 1"
    done = CliRunner().invoke(simulate, (command + lines).split())
    assert done.exit_code == 0, done.output
    figures: dict[str, float] = json.loads(done.output)
    return figures


ROWS = [
    tuple(int(re.sub(r"\D", "", cell)) for cell in row)
    for row in table("| P | τ | used, by the formula | used, simulated |")
]


@pytest.mark.parametrize(("p", "tau", "formula", "_"), ROWS)
def test_the_table_is_the_formulas(p: int, tau: int, formula: int, _: int) -> None:
    assert 100 * share_used(1e9, p, 100, tau, 100, 300, 1.0) == pytest.approx(formula, abs=0.6)


@pytest.mark.parametrize(("p", "tau", "_", "found"), [ROWS[0], ROWS[3], ROWS[4]])
def test_the_simulator_agrees(p: int, tau: int, _: int, found: int) -> None:
    figures = simulated(p, 100, tau)
    assert 100 * figures["compute_used"] == pytest.approx(found, abs=1.0)
    rounds_a_day = 24 * figures["rounds_per_hour"]
    assert figures["server_gb_in_per_day"] == pytest.approx(4 * rounds_a_day * BYTES, rel=0.1)


def test_an_h_below_the_bound_loses_compute() -> None:
    assert round(BYTES * 1e9 / (100e6 / 8)) == 33
    below, above = simulated(4, 30, 13, 0.5), simulated(4, 40, 13, 0.5)
    assert below["compute_used"] < 0.93
    assert below["contributions_counted"] < 0.9
    assert above["compute_used"] > 0.99
    assert above["contributions_counted"] > 0.99


def test_losses_of_codecs_are_the_measured_ones() -> None:
    measured = {
        name: (float(loss), bits)
        for name, loss, bits in re.findall(
            r"^\| (\S+/\S+) \| \d \| \S+ \| (\S+) % \| (\S+ \+ \S+) ", PARITY, re.MULTILINE
        )
    }
    rows = table("| up / down | bits a parameter, up + down | loss against fp32 both ways | |")
    for name, bits, loss, _ in rows:
        up, down = name.split(" / ")
        key = next(k for k in measured if k.replace("+ef", "") == f"{up}/{down}")
        assert measured[key] == (float(loss.split(" %")[0].replace("−", "-")), bits)


@pytest.mark.parametrize(
    ("run", "printed"),
    [
        ("H=10", "| 10 | −1.4 % against 50 | here |"),
        ("H=100", "| 100 | +1.7 % against 50 |"),
        ("alpha=0", "+6.9 % here"),
        ("workers=2", "2 workers −9.6 %"),
        ("workers=8", "8 workers +15.7 % against 4"),
        ("dropped=30%", "30 % +0.7 %"),
        ("dropped=50%", "half +1.0 % here"),
        ("async delayed", "−1.9 % against synchronous rounds here"),
        ("async delayed, DyLU", "−2.9 % with DyLU"),
        ("uneven, DyLU", "end 3.9 % below"),
    ],
)
def test_other_figures_are_the_measured_ones(run: str, printed: str) -> None:
    [loss] = re.findall(rf"^\| {re.escape(run)} \| \d \| \S+ \| (\S+) % ", PARITY, re.MULTILINE)
    assert printed in " ".join(TEXT.split())
    assert f"{abs(float(loss)):.1f} %" in printed
    if "below" not in printed:
        assert ("−" if float(loss) < 0 else "+") in printed


def test_the_defaults_are_those_of_the_code() -> None:
    config = RunConfig()
    rows = {row[0]: row[1] for row in table("| flag | default | what to know |")}
    for flag, default in rows.items():
        assert f"{getattr(config, flag.strip('`-').replace('-', '_')):}" in (default, f"{default}.0")
    for flag, value in ((100, config.sync_every), (0.5, config.mixing_alpha), (0.9, config.outer_momentum)):
        assert flag == value


def test_what_a_day_costs_is_the_formulas() -> None:
    """In docs/getting-started.md."""
    document = Path(ROOT / "docs" / "getting-started.md").read_text()
    rows = re.findall(
        r"^\| .*?([\d.]+) (M|B) parameters \| (\d+) \| ([\d.]+) s \| (\d+) GB a day \| (\d+) GB a day \|$",
        document,
        re.MULTILINE,
    )
    assert len(rows) == 4
    for size, unit, h, seconds, each, sent in rows:
        parameters = float(size) * {"M": 1e6, "B": 1e9}[unit]
        gigabytes = 86400 / (int(h) * float(seconds)) * BYTES * parameters / 1e9
        assert int(each) == pytest.approx(gigabytes, abs=0.6)
        assert int(sent) == pytest.approx(2 * gigabytes, abs=0.6)
