"""A state directory: who may work in it, which run it holds, and what happens at the fault points of a real process."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from dying_server import POINTS
from workload import INFO, LAYOUT, blob_of, momentum_of, record_of, theta_of

from diloco_proto.errors import ConfigError
from diloco_server.store import (
    CorruptSnapshot,
    FaultPoints,
    StateInUse,
    StateMismatch,
    StorageFailed,
    Store,
)
from diloco_server.store import state_pb2 as pb

HERE = Path(__file__).parent


def take_snapshot(store: Store, number: int, first: int) -> None:
    draft = store.snapshots.begin(number, LAYOUT, INFO.run_id)
    draft.add(pb.FragmentState(fragment=0, version=number), theta_of(number), momentum_of(number))
    draft.finish(pb.Snapshot(rounds_committed=number, first_segment=first))


def begun(root: Path) -> Store:
    store = Store(root)
    store.begin(INFO)
    take_snapshot(store, 0, store.journal.next_segment)
    store.start_journal()
    return store


def reopened(root: Path) -> tuple[Store, list[int]]:
    store = Store(root)
    number = store.snapshots.latest()
    assert number is not None
    found = [r.frame.serial for _, r, _ in store.journal.replay(store.snapshots.read(number).first_segment)]
    return store, found


def test_a_fresh_directory_is_for_its_owner_only(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "state"
    store = Store(root)
    assert store.info is None
    store.close()
    begun(root).close()
    for path in (root, *root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    store = begun(tmp_path)
    store.journal.append(record_of(1))
    store.close()
    store.close()
    store, found = reopened(tmp_path)
    assert store.info == INFO
    assert found == [1]
    store.start_journal()
    store.journal.append(record_of(2))
    store.close()
    store, found = reopened(tmp_path)
    assert found == [1, 2]
    assert store.disk_bytes() > 1000
    store.close()


def test_run_json_can_be_read_by_people(tmp_path: Path) -> None:
    begun(tmp_path).close()
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["run_id"] == "run"
    assert content["config"] == {"outer_lr": "0.7"}
    assert content["created"] == "1970-01-01T00:00:00+00:00"
    assert content["tensors"][0] == {
        "name": "a.weight",
        "shape": [3, 5],
        "dtype": "float32",
        "role": "trained",
        "tied": ["tied"],
    }


def test_a_start_that_came_to_nothing_is_a_fresh_directory(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin(INFO)
    store.snapshots.begin(0, LAYOUT, "run")
    store.close()
    store = Store(tmp_path)
    assert store.info is None
    assert os.listdir(tmp_path / "snapshots") == []
    store.begin(dataclasses.replace(INFO, run_id="other"))
    store.close()


def test_a_second_server_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    first = Store(tmp_path)
    program = "import sys; from pathlib import Path; from diloco_server.store import Store; Store(Path(sys.argv[1]))"
    second = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert f"StateInUse: another server (process {os.getpid()}) works in {tmp_path}" in second.stderr
    with pytest.raises(StateInUse, match="stop it first, or give this one its own --state-dir"):
        Store(tmp_path)
    first.close()
    Store(tmp_path).close()


def test_another_configuration_or_model_is_refused_with_all_differences(tmp_path: Path) -> None:
    store = begun(tmp_path)
    store.check_same({"outer_lr": "0.7"}, LAYOUT.fingerprint)
    store.check_same({"outer_lr": "0.7", "of_a_later_version": "1"})
    with pytest.raises(StateMismatch) as caught:
        store.check_same({"outer_lr": "0.5"}, 15)
    assert "outer_lr: 0.7 there, 0.5 now" in str(caught.value)
    assert f"fingerprint {LAYOUT.fingerprint:016x} there, {15:016x} now" in str(caught.value)
    assert "--new" in str(caught.value)
    store.close()


def test_new_puts_the_former_run_aside_whole(tmp_path: Path) -> None:
    store = begun(tmp_path)
    store.journal.append(record_of(1))
    store.close()
    (tmp_path / "tokens").mkdir()
    store = Store(tmp_path)
    assert store.archive() == tmp_path / "old" / "run-1"
    assert store.info is None
    store.begin(INFO)
    take_snapshot(store, 0, store.journal.next_segment)
    store.start_journal()
    store.close()
    store = Store(tmp_path, new=True)
    assert store.info is None
    store.close()
    assert sorted(os.listdir(tmp_path / "old")) == ["run-1", "run-2"]
    assert sorted(os.listdir(tmp_path)) == ["journal", "lock", "old", "snapshots", "tokens"]
    former, found = reopened(tmp_path / "old" / "run-1")
    assert found == [1]
    former.close()


def test_a_roll_back_makes_its_draft_the_newest_state(tmp_path: Path) -> None:
    store = begun(tmp_path)
    for number in (1, 2):
        store.journal.append(record_of(number))
        first = store.journal.rotate()
        store.journal.durable(store.journal.position).result(30)
        take_snapshot(store, number, first)
    store.journal.append(record_of(3))
    store.close()
    store, _ = reopened(tmp_path)
    draft = store.snapshots.begin(1, LAYOUT, INFO.run_id)
    draft.add(pb.FragmentState(fragment=0), theta_of(9))
    assert store.roll_back(draft, pb.Snapshot(rounds_committed=1), 1) == tmp_path / "old" / "run-1"
    assert store.snapshots.list() == [0, 1]
    assert store.info == dataclasses.replace(INFO, lineage=2, rolled_back_to=1)
    store.start_journal()
    store.journal.append(record_of(7))
    store.close()
    store, found = reopened(tmp_path)
    assert found == [7]
    assert store.snapshots.load_arrays(1, LAYOUT.fragments[0])["theta"].tobytes() == theta_of(9).tobytes()
    store.close()
    assert sorted(os.listdir(tmp_path / "old/run-1/snapshots.newer")) == ["0000000001", "0000000002"]
    assert len(os.listdir(tmp_path / "old/run-1/journal")) == 3


def test_a_roll_back_that_does_not_get_through_is_finished_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path).close()
    store, _ = reopened(tmp_path)
    draft = store.snapshots.begin(0, LAYOUT, INFO.run_id)
    draft.add(pb.FragmentState(fragment=0), theta_of(9))
    rename = os.rename

    def full(old: Path, new: Path) -> None:
        if new.name != "pending.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        with pytest.raises(StorageFailed, match="disk is full"):
            store.roll_back(draft, pb.Snapshot(), 0)
    draft.discard()
    store.close()
    pending = (tmp_path / "pending.json").read_bytes()
    store, _ = reopened(tmp_path)
    assert store.info is not None
    assert store.info.lineage == 2
    assert store.snapshots.load_arrays(0, LAYOUT.fragments[0])["theta"].tobytes() == theta_of(9).tobytes()
    store.close()
    (tmp_path / "pending.json").write_bytes(pending)
    (tmp_path / "snapshots" / "0000000000-2").rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptSnapshot, match="to which the run was being rolled back, is gone"):
        Store(tmp_path)


def test_a_new_lineage_is_kept(tmp_path: Path) -> None:
    store = begun(tmp_path)
    assert store.new_lineage() == 2
    store.close()
    store, _ = reopened(tmp_path)
    assert store.info is not None
    assert store.info.lineage == 2
    store.close()


def test_without_a_journal_only_snapshots_count_and_a_later_journal_does_not_join_an_earlier(tmp_path: Path) -> None:
    store = begun(tmp_path)
    store.journal.append(record_of(1))
    store.close()
    store, found = reopened(tmp_path)  # from now on --durability snapshots
    assert found == [1]
    take_snapshot(store, 5, 0)
    store.close()
    store, found = reopened(tmp_path)
    assert found == []
    store.start_journal()  # and with a journal again
    first = store.journal.next_segment - 1
    store.journal.append(record_of(2))
    store.close()
    store, _ = reopened(tmp_path)
    assert first == 3, "a gap after segment 1: whoever begins from snapshot 0 does not take 3 for its sequel"
    store.close()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 1, "tensors": 3}', b"\xff\xfe\x00"])
def test_a_run_json_that_cannot_be_read_is_refused_and_new_puts_it_aside(tmp_path: Path, content: bytes) -> None:
    begun(tmp_path).close()
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(StateMismatch, match=r"run\.json cannot be read .*--new"):
        Store(tmp_path)
    Store(tmp_path, new=True).close()
    assert (tmp_path / "old" / "unknown-1" / "run.json").read_bytes() == content


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    begun(tmp_path).close()
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(StateMismatch, match="has format 99, this version of diloco knows 1: install a newer one"):
        Store(tmp_path)


def test_parts_that_are_gone_are_missed(tmp_path: Path) -> None:
    begun(tmp_path).close()
    content = (tmp_path / "run.json").read_bytes()
    (tmp_path / "run.json").unlink()
    with pytest.raises(StateMismatch, match=r"holds a journal or snapshots, but no run\.json"):
        Store(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "snapshots").rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptSnapshot, match="all snapshots are gone"):
        Store(tmp_path)


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed, match=r"cannot open .*file/state.*choose another --state-dir"):
        Store(tmp_path / "file" / "state")


def test_a_killed_server_leaves_all_that_it_acknowledged(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "dying_server.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    for point in POINTS:
        acknowledged = [int(line) for line in (tmp_path / f"{point}.acknowledged").read_text().split()]
        store = Store(tmp_path / point)
        number = store.snapshots.latest()
        assert number is not None
        saved = store.snapshots.read(number)
        fragment = store.snapshots.load_arrays(number, LAYOUT.fragments[0])
        assert fragment["theta"].tobytes() == theta_of(number).tobytes()
        first = saved.fragments[0].tokens
        found = [(r.frame.serial, bytes(b)) for _, r, b in store.journal.replay(saved.first_segment)]
        assert found == [(serial, blob_of(serial)) for serial in range(first, first + len(found))], point
        assert first + len(found) >= len(acknowledged) > 0, point
        store.start_journal()
        store.close()
        assert not [name for name in os.listdir(tmp_path / point / "snapshots") if name.startswith("tmp-")], point


def test_the_committed_stubs_are_those_of_the_proto_file(tmp_path: Path) -> None:
    package = Path(pb.__file__).parent
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(package.parent.parent)]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi")]
    subprocess.run([*command, str(package / "state.proto")], check=True, timeout=60)
    for name in ("state_pb2.py", "state_pb2.pyi"):
        made = tmp_path / "diloco_server" / "store" / name
        assert made.read_bytes() == (package / name).read_bytes(), f"{name} is stale: run `make stubs`"


def test_fault_points_strike_once_at_the_count() -> None:
    struck = []
    faults = FaultPoints({"here": 2, "there": 1}, strike=lambda: struck.append(True))
    for _ in range(5):
        faults.reach("here")
        faults.reach("elsewhere")
    assert len(struck) == 1
    assert FaultPoints.from_environment({})._left == {}
    assert FaultPoints.from_environment({"DILOCO_FAULT": "a:3,b"})._left == {"a": 3, "b": 1}
    for wrong in ("a:", "a:x", ":1", "a:0"):
        with pytest.raises(ConfigError, match="must be name:count"):
            FaultPoints.from_environment({"DILOCO_FAULT": wrong})
