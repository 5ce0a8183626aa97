"""Snapshots: what other tools see, what comes back, and what is refused."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from faulty_files import FaultyFiles
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_proto.manifest import Layout, Manifest, Pattern, Role, TensorSpec, build_layout
from diloco_server.store import CorruptSnapshot, Draft, NoSnapshot, Snapshots, StorageFailed
from diloco_server.store import state_pb2 as pb
from diloco_server.store.files import Files, OsFiles

MANIFEST = Manifest(
    (
        TensorSpec("embed.weight", (7, 3), "float32", Role.TRAINED, ("head.weight",)),
        TensorSpec("blocks.0.weight", (64, 2), "bfloat16", Role.TRAINED),
        TensorSpec("blocks.1.schicht_ß", (1,), "float32", Role.TRAINED),
        TensorSpec("scale", (), "float32", Role.TRAINED),
        TensorSpec("norm.running_mean", (65,), "float32", Role.BUFFER),
        TensorSpec("table", (2, 2, 2), "float16", Role.FROZEN),
    )
)
LAYOUT = build_layout(MANIFEST, 2, Pattern.STRIDED)
NAMES = ("theta", "momentum", "residual", "buffer")


def values(layout: Layout, seed: int) -> list[dict[str, np.ndarray]]:
    """Arrays by fragment: momentum and buffer of trained ones only, a residual of all that have rounds. Their padding
    is not 0, as formats without a code for 0 leave it."""
    random = np.random.default_rng(seed)
    found = []
    for fragment in layout.fragments:
        wanted = {Role.TRAINED: NAMES, Role.BUFFER: ("theta", "residual"), Role.FROZEN: ("theta",)}[fragment.role]
        arrays = {name: random.standard_normal(fragment.length).astype(np.float32) for name in wanted}
        found.append(arrays)
    return found


def fill(draft: Draft, layout: Layout, seed: int, order: list[int] | None = None) -> None:
    arrays = values(layout, seed)
    for index in order or range(len(layout.fragments)):
        draft.add(pb.FragmentState(fragment=index, version=100 + index), **arrays[index])


def write(snapshots: Snapshots, number: int, layout: Layout = LAYOUT) -> Path:
    draft = snapshots.begin(number, layout, "run")
    fill(draft, layout, number)
    return draft.finish(pb.Snapshot(run_id="run", rounds_committed=number, first_segment=number + 1))


def made(files: Files) -> Snapshots:
    files.mkdir("")
    files.mkdir("snapshots")
    return Snapshots(files)


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    return made(OsFiles(tmp_path / "state"))


def test_it_comes_back_as_it_was_given(snapshots: Snapshots) -> None:
    draft = snapshots.begin(5, LAYOUT, "run")
    fill(draft, LAYOUT, 5, order=[3, 1, 0, 2])
    path = draft.finish(pb.Snapshot(run_id="run", rounds_committed=5, first_segment=2))
    assert path == snapshots.path(5)
    assert snapshots.list() == [5]
    assert snapshots.latest() == 5
    saved = snapshots.read(5)
    assert [(f.fragment, f.version) for f in saved.fragments] == [(0, 100), (1, 101), (2, 102), (3, 103)]
    assert (saved.run_id, saved.first_segment) == ("run", 2)
    for fragment, expected in zip(LAYOUT.fragments, values(LAYOUT, 5), strict=True):
        found = snapshots.load_arrays(5, fragment)
        assert list(found) == [name for name in NAMES if name in expected]
        for name, array in found.items():
            assert array.tobytes() == expected[name].tobytes()
    assert list(snapshots.load_arrays(5, LAYOUT.fragments[0], ("theta",))) == ["theta"]


def test_other_tools_read_it_under_the_models_own_names(snapshots: Snapshots) -> None:
    path = write(snapshots, 3)
    arrays = values(LAYOUT, 3)
    tensors = safetensors.torch.load_file(path / "theta.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {t.name: t.shape for t in MANIFEST.tensors}
    for fragment in LAYOUT.fragments:
        for slot in fragment.slots:
            expected = arrays[fragment.index]["theta"][slot.offset : slot.end]
            assert tensors[slot.tensor.name].numpy().tobytes() == expected.tobytes()
    with safetensors.safe_open(path / "theta.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["run_id"] == "run"
    assert metadata["tied.embed.weight"] == "head.weight"
    assert [metadata[f"version.{i}"] for i in range(4)] == ["100", "101", "102", "103"]
    outer = safetensors.numpy.load_file(path / "outer.safetensors")
    assert set(outer) == {f"{n}.{p}" for p in (0, 1) for n in NAMES[1:]} | {"residual.2"}
    assert outer["momentum.1"].tobytes() == arrays[1]["momentum"].tobytes()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=6),
    st.integers(1, 4),
    st.text(min_size=1, max_size=5),
)
def test_any_model_can_be_read_by_safetensors(shapes: list[list[int]], fragments: int, name: str) -> None:
    tensors = tuple(TensorSpec(f"{name}.{i}", tuple(s), "float32", Role.TRAINED) for i, s in enumerate(shapes))
    layout = build_layout(Manifest(tensors), fragments, Pattern.BALANCED)
    files = FaultyFiles()
    write(made(files), 0, layout)
    for file in ("theta", "outer"):
        data = files.open(f"snapshots/0000000000/{file}.safetensors").read(0, 1 << 20)
        found = safetensors.numpy.load(data)
        if file == "theta":
            assert {n: t.shape for n, t in found.items()} == {t.name: t.shape for t in tensors}


@pytest.mark.parametrize("name", ["theta.safetensors", "outer.safetensors", "state.pb"])
def test_damage_is_named_together_with_what_to_begin_from(name: str) -> None:
    files = FaultyFiles()
    snapshots = made(files)
    for number in (1, 2):
        write(snapshots, number)
    content = files.open(f"snapshots/0000000002/{name}").read(0, 1 << 20)
    errors = []
    for offset in range(0, len(content), 7):
        damaged = files.kill()
        damaged.open(f"snapshots/0000000002/{name}").write(offset, [bytes([content[offset] ^ 1])])
        try:
            saved = Snapshots(damaged).read(2)
            arrays = [Snapshots(damaged).load_arrays(2, fragment) for fragment in LAYOUT.fragments]
        except CorruptSnapshot as error:
            errors.append(str(error))
            continue
        assert saved == snapshots.read(2)  # the damage is where nobody has to read
        for found, expected in zip(arrays, values(LAYOUT, 2), strict=True):
            assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in expected.items()}
    assert len(errors) > len(content) / 7 / 2
    for error in errors:
        assert f"0000000002/{name} is damaged" in error
        assert "begins from snapshot 1 and replays the journal" in error
    truncated = files.kill()
    truncated.open(f"snapshots/0000000002/{name}").truncate(len(content) // 2)
    with pytest.raises(CorruptSnapshot):
        [Snapshots(truncated).load_arrays(2, fragment) for fragment in LAYOUT.fragments]


def test_one_that_was_interrupted_leaves_the_older_and_no_trace() -> None:
    files = FaultyFiles()
    snapshots = made(files)
    write(snapshots, 1)
    draft = snapshots.begin(2, LAYOUT, "run")
    draft.add(pb.FragmentState(fragment=0), np.ones(LAYOUT.fragments[0].length, np.float32))
    after = Snapshots(files.kill())
    assert after.list() == [1]
    after.remove_temporaries()
    assert after._files.listdir("snapshots") == ["0000000001"]
    assert after.load_arrays(1, LAYOUT.fragments[0])["theta"].tobytes() == values(LAYOUT, 1)[0]["theta"].tobytes()


def test_a_discarded_one_leaves_no_trace(snapshots: Snapshots) -> None:
    draft = snapshots.begin(2, LAYOUT, "run")
    fill(draft, LAYOUT, 2)
    draft.discard()
    draft.discard()
    assert os.listdir(snapshots._files.root / "snapshots") == []


@pytest.mark.parametrize("operation", ["create", "write", "sync", "rename"])
def test_a_full_disk_costs_the_snapshot_and_nothing_else(operation: str) -> None:
    files = FaultyFiles()
    snapshots = made(files)
    write(snapshots, 1)

    def fail(name: str, path: str) -> None:
        if name == operation:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.on_operation = fail
    with pytest.raises(StorageFailed, match="cannot write .*snapshots/tmp-0000000002 .*MB free.*disk is full"):
        write(snapshots, 2)
    assert files.listdir("snapshots") == ["0000000001"]
    files.on_operation = None
    write(snapshots, 2)
    assert snapshots.list() == [1, 2]


def test_only_the_newest_are_kept(snapshots: Snapshots) -> None:
    for number in (1, 2, 3, 4):
        write(snapshots, number)
    assert snapshots.oldest_segment() == 2
    assert snapshots.prune(2) == [1, 2]
    assert snapshots.list() == [3, 4]
    assert snapshots.oldest_segment() == 4
    assert snapshots.prune(0) == [3]
    assert os.listdir(snapshots._files.root / "snapshots") == ["0000000004"]
    with pytest.raises(NoSnapshot, match="no snapshot 3 in .*kept are: 4"):
        snapshots.read(3)


def test_pruning_leaves_one_that_is_being_written(snapshots: Snapshots) -> None:
    for number in (1, 2):
        write(snapshots, number)
    draft = snapshots.begin(3, LAYOUT, "run")
    fill(draft, LAYOUT, 3)
    snapshots.prune(1)
    draft.finish(pb.Snapshot(rounds_committed=3, first_segment=1))
    assert snapshots.list() == [2, 3]


def test_a_number_can_be_taken_again_and_the_later_one_counts(snapshots: Snapshots) -> None:
    write(snapshots, 7)
    draft = snapshots.begin(7, LAYOUT, "run")
    fill(draft, LAYOUT, 8)
    draft.finish(pb.Snapshot(rounds_committed=7, first_segment=9))
    assert snapshots.list() == [7]
    assert snapshots.read(7).first_segment == 9
    assert snapshots.load_arrays(7, LAYOUT.fragments[0])["theta"].tobytes() == values(LAYOUT, 8)[0]["theta"].tobytes()
    assert snapshots.prune(3) == []
    assert os.listdir(snapshots._files.root / "snapshots") == ["0000000007-2"]


def test_those_without_a_journal_hold_no_segment_back(snapshots: Snapshots) -> None:
    draft = snapshots.begin(1, LAYOUT, "run")
    fill(draft, LAYOUT, 1)
    draft.finish(pb.Snapshot(rounds_committed=1))
    assert snapshots.oldest_segment() == 0
    write(snapshots, 4)
    assert snapshots.oldest_segment() == snapshots.newest_segment() == 5


def test_no_second_copy_of_the_model_is_made(tmp_path: Path) -> None:
    tensors = tuple(TensorSpec(f"blocks.{i}.weight", (1 << 19,), "float32", Role.TRAINED) for i in range(4))
    layout = build_layout(Manifest(tensors), 4, Pattern.STRIDED)
    snapshots = made(OsFiles(tmp_path))
    theta = np.ones(1 << 19, np.float32)
    tracemalloc.start()
    try:
        draft = snapshots.begin(1, layout, "run")
        for index in range(4):
            draft.add(pb.FragmentState(fragment=index), theta, momentum=theta)
        draft.finish(pb.Snapshot(first_segment=1))
        assert tracemalloc.get_traced_memory()[1] < theta.nbytes / 4
        tracemalloc.reset_peak()
        snapshots.load_arrays(1, layout.fragments[2], ("theta",))
        assert tracemalloc.get_traced_memory()[1] < 1.25 * theta.nbytes
    finally:
        tracemalloc.stop()
