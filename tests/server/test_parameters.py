"""theta as its readers see it: one version at a time, bit for bit, while commits go on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_worker import encoded_fp32, flat, manifest_of

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import BLOCK, Encoded, decode, digest, encode_fragment, read_frame, subtract
from diloco_proto.codec.formats import Floats
from diloco_proto.errors import NonFiniteParameter, SnapshotExpired
from diloco_proto.manifest import Layout, Manifest, Pattern, Role, TensorSpec, build_layout
from diloco_server import RunConfig
from diloco_server.config import DOWNLINK
from diloco_server.outer import DELAYED
from diloco_server.parameters import (
    KEPT_SHARE,
    KEPT_SHARE_DELAYED,
    KEPT_UPDATES,
    Parameters,
    Snapshot,
    prepare_seed,
    snapshot_frames,
    snapshot_item,
)

SIZE = 600_000
"""Values: three frames of a snapshot."""


def layout_of(*sizes: int, frozen: int = 0) -> Layout:
    return build_layout(manifest_of(*sizes, frozen=frozen), len(sizes), Pattern.STRIDED)


def noise(seed: int, size: int = SIZE) -> Floats:
    return flat(np.random.default_rng(seed).standard_normal(size).astype(np.float32))


def seeded(size: int = SIZE, **changes) -> Parameters:
    config = RunConfig(**({"downlink_codec": "int4"} | changes))
    parameters = Parameters(layout_of(size), config.outer_settings())
    seed(parameters, noise(0, size))
    return parameters


def seed(parameters: Parameters, values: Floats, fragment: int = 0, layout: Layout | None = None) -> None:
    layout = layout or layout_of(values.size)
    parameters.seed(fragment, prepare_seed(layout.fragments[fragment], values))


def step(parameters: Parameters, seed: int, size: int = SIZE) -> None:
    payload = encode_fragment(RunConfig().uplink, noise(seed, size))
    update, counted = parameters.commit(0, [payload], [1.0])
    assert counted
    parameters.publish(0, update)


def theta(parameters: Parameters, fragment: int = 0) -> Floats:
    """As a reader gets it."""
    snapshot = parameters.pin(fragment)
    try:
        return read(snapshot, snapshot_frames(snapshot, 0))
    finally:
        parameters.unpin(snapshot)


def read(snapshot: Snapshot, messages: Iterator[bytes], out: Floats | None = None) -> Floats:
    out = np.full(snapshot.num_blocks * BLOCK, np.nan, np.float32) if out is None else out
    for message in messages:
        frame = read_frame(pb.PullReply.FromString(message).frame)
        start = frame.first_block * BLOCK
        decode(frame.format, frame.scales, frame.codes, out[start : start + frame.num_blocks * BLOCK])
    return out


def alive(arrays: list[weakref.ref]) -> int:
    return len({id(a) for a in (ref() for ref in arrays) if a is not None})


# -- seeding --


def test_the_seed_is_version_0() -> None:
    parameters = seeded()
    assert parameters.version(0) == 0
    assert np.array_equal(theta(parameters), noise(0))
    assert parameters.digest(0) == digest(noise(0))
    assert parameters.updates_since(0, 0) == []
    assert parameters.last_update_bytes(0) == 0


def test_tiny_magnitudes_are_flushed_when_theta_is_seeded() -> None:
    parameters = seeded(64)
    seed(parameters, flat([2.0**-101, -(2.0**-120), 2.0**-100, -0.0, 1.0]))
    assert theta(parameters).tolist()[:5] == [0.0, 0.0, 2.0**-100, 0.0, 1.0]
    assert not np.signbit(theta(parameters)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**126])
def test_a_seed_that_cannot_be_names_the_tensor(bad: float) -> None:
    (fragment,) = build_layout(manifest_of(100, 30), 1, Pattern.STRIDED).fragments
    values = flat(np.zeros(192))
    values[128 + 29] = bad
    with pytest.raises(NonFiniteParameter, match=r"tensor 'layers\.1\.weight'"):
        prepare_seed(fragment, values)


def test_a_frozen_fragment_is_read_like_the_others() -> None:
    layout = layout_of(10, frozen=5)
    parameters = Parameters(layout, RunConfig().outer_settings())
    seed(parameters, flat([1, 2, 3, 4, 5]), 1, layout)
    assert [v.version for v in parameters.versions()] == [0, 0]
    snapshot = parameters.pin(1)
    assert read(snapshot, snapshot_frames(snapshot, 0)).tolist()[:5] == [1, 2, 3, 4, 5]


# -- updates --


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "int8", "int4", "int3", "e3m0", "mxfp4"])
def test_whoever_subtracts_the_updates_has_theta_bit_for_bit(fmt: str) -> None:
    parameters = seeded(1000, downlink_codec=fmt)
    mine = theta(parameters)
    for version in range(3):
        step(parameters, version, 1000)
        (update,) = parameters.updates_since(0, version) or ()
        assert (update.item.version, update.item.kind) == (version + 1, pb.ITEM_UPDATE)
        assert update.item.frames == len(update.messages)
        for message in update.messages:
            frame = read_frame(pb.PullReply.FromString(message).frame)
            start = frame.first_block * BLOCK
            subtract(frame.format, frame.scales, frame.codes, mine[start : start + frame.num_blocks * BLOCK])
        assert update.digest == parameters.digest(0) == digest(mine)
        assert np.array_equal(theta(parameters).view(np.uint32), mine.view(np.uint32))
        assert parameters.last_update_bytes(0) == sum(map(len, update.messages))


@pytest.mark.parametrize(("optimizer", "share"), [("nesterov", KEPT_SHARE), (DELAYED, KEPT_SHARE_DELAYED)])
@pytest.mark.parametrize("fmt", DOWNLINK)
def test_updates_are_kept_while_a_snapshot_would_be_larger(fmt: str, optimizer: str, share: float) -> None:
    size, steps = 6400, 20
    parameters = seeded(size, downlink_codec=fmt, outer_optimizer=optimizer)
    sizes = []
    for version in range(steps):
        step(parameters, version, size)
        sizes.append(parameters.last_update_bytes(0))
    assert parameters.updates_since(0, steps) == []
    assert parameters.updates_since(0, steps + 1) is None, "a reader of another past takes a snapshot"
    for behind in range(1, steps + 1):
        together = sum(sizes[-behind:])
        kept = behind <= KEPT_UPDATES or together < share * 4 * size
        updates = parameters.updates_since(0, steps - behind)
        if kept and (behind == 1 or together < 4 * size):
            assert updates is not None
            assert [u.version for u in updates] == list(range(steps - behind + 1, steps + 1))
        else:
            assert updates is None


@pytest.mark.parametrize(
    ("size", "optimizer", "fmt", "least"),
    [
        (64_000, "nesterov", "int4", 2),
        (64_000, DELAYED, "int4", 7),
        (64_000, DELAYED, "fp32", 1),
        (64, "nesterov", "fp32", 1),
    ],
)
def test_who_is_further_behind_takes_a_snapshot(size: int, optimizer: str, fmt: str, least: int) -> None:
    parameters = seeded(size, downlink_codec=fmt, outer_optimizer=optimizer)
    for version in range(14):
        step(parameters, version, size)
    offered = [behind for behind in range(1, 15) if parameters.updates_since(0, 14 - behind) is not None]
    assert offered[0] == 1, "whatever its size: who is up to date reads no snapshot"
    assert least <= len(offered) <= 1.5 * least


def test_what_an_update_will_replace_makes_room_for_it() -> None:
    large, small = seeded(1 << 16, downlink_codec="int8"), seeded(1 << 16, downlink_codec="int3")
    for parameters in (large, small):
        parameters.make_room(0)
        assert parameters.updates_since(0, 0) == [], "there is none"
        step(parameters, 0, 1 << 16)
        step(parameters, 1, 1 << 16)
        parameters.make_room(0)
    assert large.updates_since(0, 1) is None
    assert large.last_update_bytes(0) > small.last_update_bytes(0) > 0, "status and metrics still tell of it"
    assert len(small.updates_since(0, 1) or []) == 1, "both will be kept"
    for parameters in (large, small):
        step(parameters, 2, 1 << 16)
        assert len(parameters.updates_since(0, 2) or []) == 1


def test_a_committed_step_is_not_seen_before_it_is_published() -> None:
    parameters = seeded(1000)
    before = parameters.versions()
    update, _ = parameters.commit(0, [encode_fragment(RunConfig().uplink, noise(1, 1000))], [1.0])
    assert parameters.versions() == before
    assert parameters.updates_since(0, 0) == []
    parameters.publish(0, update)
    assert parameters.version(0) == 1
    assert parameters.digest(0) == update.digest != before[0].digest


# -- a round that overflows --


@pytest.mark.parametrize("optimizer", ["nesterov", "sgd", DELAYED])
@pytest.mark.parametrize("fmt", ["fp32", "int4", "bf16", "e3m0"])
def test_a_round_that_overflows_is_void_and_leaves_everything_as_it_was(fmt: str, optimizer: str) -> None:
    hit, spared = (seeded(1000, downlink_codec=fmt, outer_optimizer=optimizer, outer_lr=100.0) for _ in range(2))
    for parameters in (hit, spared):
        step(parameters, 1, 1000)
    before = theta(hit)
    huge = np.zeros(1024, np.float32)
    huge[700] = 2.0**125
    payloads = [encoded_fp32(huge)] if optimizer == DELAYED else [encoded_fp32(noise(2, 1000)), encoded_fp32(huge)]
    update, counted = hit.commit(0, payloads, [1.0] * len(payloads))
    hit.publish(0, update)
    assert not counted
    assert hit.version(0) == 2
    assert hit.digest(0) == spared.digest(0)
    assert np.array_equal(theta(hit).view(np.uint32), before.view(np.uint32))
    mine = before.copy()
    for message in update.messages:
        frame = read_frame(pb.PullReply.FromString(message).frame)
        subtract(frame.format, frame.scales, frame.codes, mine)
    assert np.array_equal(mine.view(np.uint32), before.view(np.uint32)), "the published update is zero"
    for parameters in (hit, spared):  # momentum and residual are untouched too
        step(parameters, 3, 1000)
    assert hit.digest(0) == spared.digest(0)


def test_a_contribution_that_is_scaled_down_is_counted() -> None:
    parameters = seeded(64, downlink_codec="fp32", outer_optimizer="sgd", outer_lr=1.0)
    huge = encoded_fp32(flat([2.0**125] * 64))
    update, counted = parameters.commit(0, [huge], [1.0], scales=[2.0**-124])
    assert counted
    parameters.publish(0, update)
    assert np.array_equal(theta(parameters), noise(0, 64) - np.float32(2))


def test_contributions_that_are_steps_of_their_own_make_one_nesterov_step() -> None:
    delayed, usual = (
        seeded(64, downlink_codec="fp32", outer_optimizer=optimizer) for optimizer in (DELAYED, "nesterov")
    )
    payloads = [encoded_fp32(noise(i, 64)) for i in (1, 2)]
    for payload in payloads:
        delayed.publish(0, delayed.commit(0, [payload], [1.0], delay=2)[0])
    usual.publish(0, usual.commit(0, payloads, [1.0, 1.0])[0])
    np.testing.assert_allclose(theta(delayed), theta(usual), rtol=1e-5, atol=1e-6)


# -- buffers --


def with_buffers(start: float, **changes) -> tuple[Parameters, int]:
    """A model of one parameter and a buffer, seeded with this value; the index of the buffer's fragment."""
    tensors = (TensorSpec("weight", (1,), "float32", Role.TRAINED), TensorSpec("mean", (1,), "float32", Role.BUFFER))
    layout = build_layout(Manifest(tensors), 1, Pattern.STRIDED)
    parameters = Parameters(layout, RunConfig(num_fragments=1, downlink_codec="int4", **changes).outer_settings())
    (fragment,) = (f.index for f in layout.fragments if f.role is Role.BUFFER)
    seed(parameters, flat([start]), fragment, layout)
    return parameters, fragment


def toward(base: float, local: float) -> Encoded:
    return encoded_fp32(flat([base - local]))


@pytest.mark.parametrize("optimizer", ["nesterov", "sgd"])
def test_buffers_become_the_mean_of_the_workers_whatever_the_settings(optimizer: str) -> None:
    parameters, fragment = with_buffers(5.0, outer_optimizer=optimizer, outer_lr=0.1)
    for a, b in ((1.0, 9.0), (-3.5, 2.5), (0.0, 0.0)):
        base = float(theta(parameters, fragment)[0])
        update, counted = parameters.commit(fragment, [toward(base, a), toward(base, b)], [3.0, 1.0])
        assert counted
        assert update.item.codec == pb.CODEC_FP32
        parameters.publish(fragment, update)
        np.testing.assert_allclose(theta(parameters, fragment)[0], 0.75 * a + 0.25 * b, rtol=1e-6, atol=1e-6)


@given(workers=st.integers(1, 9), data=st.data())
@settings(deadline=None, max_examples=40)
def test_buffers_of_an_asynchronous_run_settle_without_overshooting(workers: int, data: st.DataObject) -> None:
    """A variance that went below zero would break the model. Every worker pushes once a period, in some order."""
    parameters, fragment = with_buffers(1.0, outer_optimizer=DELAYED)
    bases = [1.0] * workers
    for _ in range(12):
        for worker in data.draw(st.permutations(range(workers))):
            update, _ = parameters.commit(fragment, [toward(bases[worker], 0.01)], [1.0], delay=workers)
            parameters.publish(fragment, update)
            bases[worker] = float(theta(parameters, fragment)[0])
            assert bases[worker] > 0
    assert bases[-1] < 0.1


# -- readers --


def test_a_reader_sees_one_version_while_commits_go_on() -> None:
    parameters = seeded()
    expected = theta(parameters)
    snapshot = parameters.pin(0)
    messages = snapshot_frames(snapshot, 0)
    mine = read(snapshot, iter([next(messages)]))
    with ThreadPoolExecutor(1) as threads:  # as the server does
        threads.submit(step, parameters, 1).result()
    read(snapshot, messages, mine)
    assert np.array_equal(mine, expected)
    assert snapshot_item(snapshot, 0).digest == digest(mine)
    parameters.unpin(snapshot)
    assert not np.array_equal(theta(parameters), expected)


def test_a_snapshot_is_resumed_at_a_frame() -> None:
    parameters = seeded()
    snapshot = parameters.pin(0)
    whole = list(snapshot_frames(snapshot, 0))
    assert [snapshot_item(snapshot, skip).frames for skip in range(5)] == [3, 2, 1, 0, 0]
    for skip in range(5):
        assert list(snapshot_frames(snapshot, skip)) == whole[skip:]


def test_readers_of_one_version_share_one_copy() -> None:
    parameters = seeded()
    first = parameters.pin(0)
    assert parameters.pin(0) is first
    parameters.unpin(first)
    step(parameters, 1)
    assert np.array_equal(read(first, snapshot_frames(first, 0)), noise(0)), "the other one still reads it"


def test_a_reader_that_stands_still_expires_and_its_copy_is_freed() -> None:
    parameters = seeded()
    slow = parameters.pin(0)
    messages = snapshot_frames(slow, 0)
    next(messages)
    copy = weakref.ref(slow.theta)
    step(parameters, 1)
    assert copy() is not None
    second = parameters.pin(0)
    step(parameters, 2)
    assert copy() is None, "memory must not depend on how many slow readers there are"
    with pytest.raises(SnapshotExpired, match="version 0 of fragment 0 was overtaken"):
        next(messages)
    with pytest.raises(SnapshotExpired):
        next(snapshot_frames(slow, 0))
    parameters.unpin(slow)
    read(second, snapshot_frames(second, 0))
    parameters.unpin(second)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["pin", "pin", "read", "commit", "commit", "unpin"]), max_size=25), st.data())
def test_any_readers_at_any_time(actions: list[str], data: st.DataObject) -> None:
    parameters = seeded(100, downlink_codec="fp32")
    versions = [theta(parameters)]
    held: list[Snapshot] = []
    copies: list[weakref.ref] = []
    for action in actions:
        if action == "pin":
            held.append(parameters.pin(0))
            assert held[-1].version == len(versions) - 1
            copies.append(weakref.ref(held[-1].theta))
        elif action == "commit":
            step(parameters, len(versions), 100)
            versions.append(theta(parameters))
        elif held:
            snapshot = held.pop(data.draw(st.integers(0, len(held) - 1)))
            try:
                assert np.array_equal(read(snapshot, snapshot_frames(snapshot, 0)), versions[snapshot.version])
            except SnapshotExpired:
                assert snapshot.version < len(versions) - 2
            if action == "read":
                held.append(snapshot)
            else:
                parameters.unpin(snapshot)
            snapshot = None  # or this test would keep its array alive
        assert alive(copies) <= 2, "theta, and one copy of an older version"
    while held:
        parameters.unpin(held.pop())
    assert alive(copies) <= 1
