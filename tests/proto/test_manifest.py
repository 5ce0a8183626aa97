"""Manifests and layouts: every tensor has its place, the same one on both ends."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_proto.codec import BLOCK
from diloco_proto.errors import ConfigError, UnsupportedModel
from diloco_proto.manifest import DTYPES, Layout, Manifest, Pattern, Role, TensorSpec, build_layout

patterns = st.sampled_from(Pattern)
counts = st.integers(1, 12)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Layers with numbers, layers without, single tensors; some are buffers, some frozen, at least one is trained."""
    names = draw(
        st.lists(
            st.builds(
                "{}{}{}".format,
                st.sampled_from(["embed", "blocks", "model.layers"]),
                st.sampled_from(["", ".0", ".1", ".2", ".10"]),
                st.sampled_from(["", ".weight", ".bias", ".attention.q"]),
            ),
            min_size=1,
            max_size=14,
            unique=True,
        )
    )
    shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
    roles = [Role.TRAINED, *(draw(st.sampled_from(Role)) for _ in names[1:])]
    dtypes = st.sampled_from(DTYPES)
    return Manifest(tuple(TensorSpec(n, draw(shapes), draw(dtypes), r) for n, r in zip(names, roles, strict=True)))


def trained(*names: str, size: int = 1) -> Manifest:
    return Manifest(tuple(TensorSpec(n, (size,), "float32", Role.TRAINED) for n in names))


def names_of(layout: Layout) -> list[list[str]]:
    return [[s.tensor.name for s in f.slots] for f in layout.fragments]


@settings(deadline=None)
@given(manifests(), counts, patterns)
def test_every_tensor_has_one_place(manifest: Manifest, count: int, pattern: Pattern) -> None:
    layout = build_layout(manifest, count, pattern)
    placed = [s.tensor for f in layout.fragments for s in f.slots]
    assert sorted(placed, key=lambda t: t.name) == sorted(manifest.tensors, key=lambda t: t.name)
    order = {t.name: i for i, t in enumerate(manifest.tensors)}
    for index, fragment in enumerate(layout.fragments):
        assert fragment.index == index
        assert fragment.slots
        assert {s.tensor.role for s in fragment.slots} == {fragment.role}
        assert [order[s.tensor.name] for s in fragment.slots] == sorted(order[s.tensor.name] for s in fragment.slots)
        end = 0
        for slot in fragment.slots:
            assert slot.offset % BLOCK == 0
            assert end <= slot.offset < end + BLOCK
            end = slot.end
        assert end <= fragment.length < end + BLOCK
        assert fragment.length == fragment.num_blocks * BLOCK
        assert fragment.parameters == sum(s.tensor.numel for s in fragment.slots)


@settings(deadline=None)
@given(manifests(), counts, patterns)
def test_trained_fragments_come_first_then_one_of_all_buffers_then_one_of_all_frozen_tensors(
    manifest: Manifest, count: int, pattern: Pattern
) -> None:
    layout = build_layout(manifest, count, pattern)
    roles = [t.role for t in manifest.tensors]
    assert layout.num_trained == len(layout.trained) == min(count, roles.count(Role.TRAINED))
    assert all(f.role is Role.TRAINED for f in layout.trained)
    assert layout.num_scheduled == len(layout.scheduled) == layout.num_trained + (Role.BUFFER in roles)
    rest = layout.fragments[layout.num_trained :]
    assert [f.role for f in rest] == [r for r in (Role.BUFFER, Role.FROZEN) if r in roles]
    assert [f.role for f in layout.scheduled if f not in layout.trained] == [Role.BUFFER] * (Role.BUFFER in roles)


@settings(deadline=None)
@given(manifests(), st.lists(st.tuples(counts, patterns), min_size=2, max_size=2))
def test_equal_fingerprints_mean_equal_layouts(manifest: Manifest, cuts: list[tuple[int, Pattern]]) -> None:
    one, other = (build_layout(manifest, *cut) for cut in cuts)
    assert (one.fingerprint == other.fingerprint) == (one == other)
    again = build_layout(Manifest(tuple(manifest.tensors)), *cuts[0])
    assert again == one
    assert again.fingerprint == one.fingerprint < 1 << 64


@settings(deadline=None)
@given(manifests(), counts, patterns, st.data())
def test_the_fingerprint_notices_any_change_of_a_tensor(
    manifest: Manifest, count: int, pattern: Pattern, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(manifest.tensors) - 1))
    tensor = manifest.tensors[index]
    changes = [{"name": "x." + tensor.name}, {"shape": (*tensor.shape, 1)}]
    changes += [{"dtype": d} for d in DTYPES if d != tensor.dtype]
    changes += [{"role": r} for r in Role if r is not tensor.role] if tensor.role is not Role.TRAINED else []
    changed = dataclasses.replace(tensor, **data.draw(st.sampled_from(changes)))
    other = Manifest((*manifest.tensors[:index], changed, *manifest.tensors[index + 1 :]))
    assert build_layout(manifest, count, pattern).fingerprint != build_layout(other, count, pattern).fingerprint
    difference = manifest.first_difference(other)
    assert difference is not None
    assert f"tensor {index}:" in difference
    assert tensor.describe() in difference
    assert changed.describe() in difference
    assert manifest.first_difference(manifest) is None


@settings(deadline=None)
@given(manifests(), counts)
def test_balanced_fragments_differ_by_no_more_than_the_largest_tensor(manifest: Manifest, count: int) -> None:
    layout = build_layout(manifest, count, Pattern.BALANCED)
    sizes = [f.parameters for f in layout.trained]
    assert max(sizes) - min(sizes) <= max(t.numel for t in manifest.tensors if t.role is Role.TRAINED)


@settings(deadline=None)
@given(manifests(), counts, patterns, st.data())
def test_tensor_at_finds_the_tensor_of_a_value(
    manifest: Manifest, count: int, pattern: Pattern, data: st.DataObject
) -> None:
    fragment = data.draw(st.sampled_from(build_layout(manifest, count, pattern).fragments))
    slot = data.draw(st.sampled_from(fragment.slots))
    assert fragment.tensor_at(data.draw(st.integers(slot.offset, slot.end - 1))) == slot.tensor.name


LAYERS = ("embed.weight", *(f"blocks.{i}.{leaf}" for i in range(4) for leaf in ("w", "b")), "head.weight")


def test_strided_deals_whole_layers_in_turn() -> None:
    assert names_of(build_layout(trained(*LAYERS), 3, Pattern.STRIDED)) == [
        ["embed.weight", "blocks.2.w", "blocks.2.b"],
        ["blocks.0.w", "blocks.0.b", "blocks.3.w", "blocks.3.b"],
        ["blocks.1.w", "blocks.1.b", "head.weight"],
    ]


def test_sequential_keeps_neighbours_together() -> None:
    assert names_of(build_layout(trained(*LAYERS), 3, Pattern.SEQUENTIAL)) == [
        ["embed.weight", "blocks.0.w", "blocks.0.b"],
        ["blocks.1.w", "blocks.1.b", "blocks.2.w", "blocks.2.b"],
        ["blocks.3.w", "blocks.3.b", "head.weight"],
    ]


def test_balanced_gives_the_largest_tensors_out_first() -> None:
    sizes = {"a": 10, "b": 50, "c": 20, "d": 30}
    tensors = (TensorSpec(n, (k,), "float32", Role.TRAINED) for n, k in sizes.items())
    assert names_of(build_layout(Manifest(tuple(tensors)), 2, Pattern.BALANCED)) == [["a", "b"], ["c", "d"]]


def test_buffers_are_one_fragment_however_many_layers_they_are_of() -> None:
    names = {"0.w": Role.TRAINED, "0.mean": Role.BUFFER, "1.w": Role.TRAINED, "1.b": Role.FROZEN, "1.mean": Role.BUFFER}
    manifest = Manifest(tuple(TensorSpec(n, (65,), "float32", r) for n, r in names.items()))
    layout = build_layout(manifest, 2, Pattern.STRIDED)
    assert names_of(layout) == [["0.w"], ["1.w"], ["0.mean", "1.mean"], ["1.b"]]
    assert [s.offset for s in layout.scheduled[-1].slots] == [0, 128]
    assert (layout.num_trained, layout.num_scheduled) == (2, 3)


@pytest.mark.parametrize("pattern", Pattern)
def test_more_fragments_than_tensors(pattern: Pattern) -> None:
    layout = build_layout(trained("a.0.w", "a.0.b", "a.1.w", size=100), 7, pattern)
    assert sorted(names_of(layout)) == [["a.0.b"], ["a.0.w"], ["a.1.w"]]


def test_layers_are_split_only_when_there_are_too_few() -> None:
    manifest = trained("a.0.w", "a.0.b", "a.1.w", "a.1.b")
    assert names_of(build_layout(manifest, 2, Pattern.STRIDED)) == [["a.0.w", "a.0.b"], ["a.1.w", "a.1.b"]]
    assert names_of(build_layout(manifest, 3, Pattern.STRIDED)) == [["a.0.w", "a.1.b"], ["a.0.b"], ["a.1.w"]]


def test_a_missing_and_an_extra_tensor_are_named() -> None:
    short, long = trained("a", "b"), trained("a", "b", "c")
    assert "this worker has no more tensors" in (long.first_difference(short) or "")
    assert "c float32[1] trained" in (long.first_difference(short) or "")
    assert "c float32[1] trained, the run has no more tensors" in (short.first_difference(long) or "")


def test_a_difference_in_tied_names_alone_can_be_read() -> None:
    one = Manifest((TensorSpec("embed", (3,), "float32", Role.TRAINED, ("head",)),))
    other = Manifest((TensorSpec("embed", (3,), "float32", Role.TRAINED),))
    difference = one.first_difference(other) or ""
    assert "embed float32[3] trained (tied to head), this worker embed float32[3] trained" in difference


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", (1,), "float32"), ("b", (1,), "float32"), ("a", (2,), "float32")], "'a' is listed twice"),
        ([("a", (1,), "int64")], "'a' is int64"),
        ([("a", (1,), "float64")], "'a' is float64"),
        ([("a", (3, 0), "float32")], r"'a' has no elements \(shape \[3, 0\]\)"),
        ([], "no trained parameters"),
    ],
)
def test_what_no_run_can_have(tensors: list[tuple[str, tuple[int, ...], str]], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        Manifest(tuple(TensorSpec(*t, Role.TRAINED) for t in tensors))


@pytest.mark.parametrize("role", [Role.BUFFER, Role.FROZEN])
def test_a_model_of_which_nothing_is_trained(role: Role) -> None:
    with pytest.raises(UnsupportedModel, match="no trained parameters"):
        Manifest((TensorSpec("a", (1,), "float32", role),))


def test_no_fragments() -> None:
    with pytest.raises(ConfigError, match="num_fragments is 0"):
        build_layout(trained("a"), 0, Pattern.STRIDED)
