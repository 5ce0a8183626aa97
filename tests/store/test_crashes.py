"""Whatever a crash leaves of what was not synced: nothing acknowledged is lost, nothing is invented.

A failure names its seed. DILOCO_CRASH_POINTS sets how many crashes there are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import count

import pytest
from turning import Turning
from workload import Violation, crash_points

POINTS = int(os.environ.get("DILOCO_CRASH_POINTS", "10000"))

SYNCS = {
    "Draft.finish: directory snapshots",
    "Draft.prepare: directory tmp-N",
    "Draft.prepare: directory tmp-N-N",
    "Draft.prepare: file outer.safetensors",
    "Draft.prepare: file state.pb",
    "Draft.prepare: file theta.safetensors",
    "Replay._settle: directory journal",
    "Replay._settle: file N.log",
    "Snapshots.prune: directory snapshots",
    "Store.__init__: directory root",
    "Store.__init__: directory snapshots",
    "Store._finish_pending: directory root",
    "Store._go_back: directory run-N",
    "Store._go_back: directory snapshots",
    "Store._go_back: directory snapshots.newer",
    "Store._make_old: directory old",
    "Store._make_old: directory root",
    "Store._make_old: directory run-N",
    "Store._put_aside: directory run-N",
    "Store._write_info: directory root",
    "Store.begin: directory ..",
    "Store.roll_back: directory snapshots",
    "Writer.begin: directory journal",
    "Writer.begin: file N.log",
    "Writer.sync: file N.log",
    "write_atomically: file pending.json.tmp",
    "write_atomically: file run.json.tmp",
}
"""Every place in the store's code where something is synced."""

ENOUGH = 100
"""Seeds within which a missing sync does harm."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of cut tails would be logged."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(600)
def test_after_any_crash_all_that_was_acknowledged_is_there_and_nothing_else() -> None:
    points = 0
    for seed in count():
        try:
            points += crash_points(seed, share=0.3)[0]
        except Violation as violation:
            raise AssertionError(f"seed {seed}: {violation}") from violation
        if points >= POINTS:
            return


def test_a_crash_while_it_goes_back_or_over_to_another_run_leaves_one_of_them_whole() -> None:
    points = 0
    for seed in count():
        try:
            points += Turning(seed, share=0.3).points
        except Violation as violation:
            raise AssertionError(f"seed {seed}: {violation}") from violation
        if points >= POINTS / 10:
            return


def test_every_sync_is_known() -> None:
    found = set(Turning(0, share=0.0).sites)
    for seed in range(5):
        found |= crash_points(seed, share=0.1)[1]
    assert found == SYNCS


@pytest.mark.parametrize("site", sorted(SYNCS))
def test_without_this_sync_a_crash_does_harm(site: str) -> None:
    for seed in range(ENOUGH):
        try:
            crash_points(seed, share=0.3, switched_off=frozenset({site}))
            Turning(seed, share=0.3, switched_off=frozenset({site}))
        except Violation:
            return
    pytest.fail(f"no crash within {ENOUGH} seeds did any harm")
