"""Shares of the data: disjoint, complete, of even length, and a worker's own as long as it is one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy import Proxy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import diloco_client
from diloco_client import ShardedSampler, shard_stream
from diloco_client.link import Shard
from diloco_client.transport import Retry
from diloco_server import RunConfig, serve

LENGTHS, COUNTS = st.integers(0, 200), st.integers(1, 9)
QUICK = settings(max_examples=60, deadline=None)

FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
"""What Python 3.12 says of every DataLoader with workers, wherever there are threads."""


class Worker:
    """Something that has shares, as an Outer does."""

    def __init__(self, index: int, count: int, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks
        self.shard = Shard(index, count)

    @property
    def rank_shard(self) -> Shard:
        return Shard(self.shard.index + self.shard.count * self.rank, self.shard.count * self.ranks)


def samplers(length: int, count: int, **options: Any) -> list[ShardedSampler]:
    return [ShardedSampler(Worker(i, count), length, **options) for i in range(count)]


class Numbers(IterableDataset[int]):
    """0, 1, 2 …"""

    def __init__(self, end: int) -> None:
        self.end = end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.end))


def streams(end: int, count: int) -> list[IterableDataset[int]]:
    return [shard_stream(Worker(i, count), Numbers(end)) for i in range(count)]


# -- who has what --


@QUICK
@given(LENGTHS, COUNTS, st.booleans(), st.integers(0, 3))
def test_sampled_shares_are_disjoint_and_cover(length: int, count: int, shuffle: bool, epoch: int) -> None:
    found = samplers(length, count, shuffle=shuffle, seed=7)
    for sampler in found:
        sampler.set_epoch(epoch)
    shares = [list(sampler) for sampler in found]
    assert sorted(itertools.chain(*shares)) == list(range(length))
    assert [len(sampler) for sampler in found] == [len(share) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares == [list(s) for s in shares_of_epoch(length, count, shuffle, epoch)], "the same on any machine"


def shares_of_epoch(length: int, count: int, shuffle: bool, epoch: int) -> list[list[int]]:
    again = samplers(length, count, shuffle=shuffle, seed=7)
    for sampler in again:
        for _ in range(epoch):
            list(sampler)  # epochs follow each other without set_epoch
    return [list(sampler) for sampler in again]


@QUICK
@given(LENGTHS, COUNTS)
def test_streamed_shares_are_disjoint_cover_and_keep_the_order(end: int, count: int) -> None:
    shares = [list(stream) for stream in streams(end, count)]
    assert sorted(itertools.chain(*shares)) == list(range(end))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@QUICK
@given(LENGTHS, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_ranks_of_islands_have_equal_lengths_and_leave_out_less_than_a_round(length: int, islands: list[int]) -> None:
    """Islands of different sizes, among them single processes, beside each other."""
    count, given_out = len(islands), Counter[int]()
    for index, ranks in enumerate(islands):
        members = [Worker(index, count, rank, ranks) for rank in range(ranks)]
        for shares in (
            [list(ShardedSampler(m, length, shuffle=False)) for m in members],
            [list(shard_stream(m, Numbers(length))) for m in members],
        ):
            assert len({len(share) for share in shares}) == 1
            island = list(itertools.chain(*shares))
            assert set(island) <= set(range(index, length, count))
            assert len(island) > len(range(index, length, count)) - (ranks if ranks > 1 else 1) - 1
            given_out.update(island)
    assert set(given_out.values()) <= {2}, "once by the samplers, once by the streams"


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = ShardedSampler(Worker(0, 1), 50)
    orders = [tuple(first), tuple(first), tuple(ShardedSampler(Worker(0, 1), 50, seed=1))]
    assert len(set(orders)) == 3
    first.set_epoch(0)
    assert tuple(first) == orders[0]


def test_the_data_set_may_be_given_itself_and_grow() -> None:
    data = list(range(10))
    sampler = ShardedSampler(Worker(1, 2), data, shuffle=False)
    assert list(sampler) == [1, 3, 5, 7, 9]
    data.append(10)
    data.append(11)
    assert list(sampler) == [1, 3, 5, 7, 9, 11]


# -- changes --


def test_a_sampler_keeps_its_share_until_the_epoch_ends() -> None:
    worker = Worker(0, 1)
    sampler = ShardedSampler(worker, 9, shuffle=False)
    epoch = iter(sampler)
    assert [next(epoch) for _ in range(3)] == [0, 1, 2]
    worker.shard = Shard(0, 3)
    assert list(epoch) == [3, 4, 5, 6, 7, 8]
    assert list(sampler) == [0, 3, 6]


@QUICK
@given(COUNTS, COUNTS, st.integers(0, 30))
def test_a_stream_is_disjoint_again_from_the_next_multiple_of_the_new_count_on(old: int, new: int, at: int) -> None:
    """Workers that hear of it at the same record; those beyond the old count join there."""
    workers = [Worker(i, old) for i in range(old)]
    running = [iter(shard_stream(w, Numbers(10_000))) for w in workers]
    before = [[next(s) for _ in range(at)] for s in running]
    for worker, index in zip(workers, range(min(old, new)), strict=False):
        worker.shard = Shard(index, new)
    after = [list(itertools.islice(s, 20)) for s in running[:new]]
    assert sorted(itertools.chain(*before)) == list(range(old * at))
    first = -(-old * at // new) * new
    for index, share in enumerate(after):
        assert share == list(range(first + index, 10_000, new))[:20]


@QUICK
@given(st.integers(1, 200), COUNTS, COUNTS, st.integers(0, 200), st.booleans())
def test_a_resumed_epoch_gives_what_was_left_and_nothing_twice(
    length: int, old: int, new: int, at: int, shuffle: bool
) -> None:
    """All workers of `old` save at the same time; `new` of them go on."""
    before, states = [], []
    for sampler in samplers(length, old, shuffle=shuffle):
        before += list(itertools.islice(sampler, min(at, length // old)))
        states.append(sampler.state_dict())
    assert all(state == states[0] for state in states)
    left, following = [], []
    for sampler in samplers(length, new, shuffle=shuffle):
        sampler.load_state_dict(states[0])
        assert sampler.state_dict() == states[0]
        sampler.set_epoch(states[0]["epoch"])  # as trainers do
        share = list(sampler)
        # Who has nothing left of the epoch goes on with the next one.
        (left if sampler.state_dict()["epoch"] == states[0]["epoch"] else following).append(share)
    given_out = before + list(itertools.chain(*left))
    assert len(set(given_out)) == len(given_out)
    assert len(given_out) > length - new
    assert all(len(share) in (length // new, -(-length // new)) for share in following)
    assert len(before) < length or not any(left)


@FORKS
def test_what_a_loader_has_asked_for_ahead_is_not_trained_on() -> None:
    sampler = ShardedSampler(Worker(0, 2), 40)
    whole = list(sampler)
    sampler.set_epoch(0)
    loader = DataLoader(range(40), batch_size=2, sampler=sampler, num_workers=1, prefetch_factor=4)
    batches = iter(loader)
    trained = [int(x) for _ in range(3) for x in next(batches)]
    assert trained == whole[:6]
    assert sampler.state_dict()["behind"] > 12
    resumed = ShardedSampler(Worker(0, 2), 40)
    resumed.load_state_dict(sampler.state_dict(trained=6))
    assert list(resumed) == whole[6:]


def test_a_loop_that_was_left_begins_its_epoch_anew() -> None:
    sampler = ShardedSampler(Worker(0, 1), 10)
    begun = list(itertools.islice(sampler, 4))
    assert list(sampler)[:4] == begun


# -- DataLoader workers --


@FORKS
@pytest.mark.parametrize(("kind", "number"), [("fork", 2), ("fork", 1), ("spawn", 1)])
def test_processes_of_a_loader_divide_the_share_among_themselves(kind: str, number: int) -> None:
    """Workers with different numbers of them do not get into each other's share."""
    loaded = DataLoader(
        shard_stream(Worker(1, 3), Numbers(50)), batch_size=None, num_workers=number, multiprocessing_context=kind
    )
    assert sorted(map(int, loaded)) == list(range(1, 50, 3))


# -- real workers --


def train(outer: diloco_client.Outer, step: Callable[[], None]) -> None:
    """Until all have had their rounds, and the server knows it."""
    for _ in range(8):
        step()
    outer.flush(together=True)


def join(address: str, name: str) -> tuple[diloco_client.Outer, Callable[[], None]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return diloco_client.join(address, model, optimizer, worker_id=name), step


@pytest.fixture
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diloco_client.transport.Retry", lambda: Retry(first=0.02, cap=0.2))


@pytest.mark.usefixtures("_quick_retries")
def test_a_worker_keeps_its_share_when_its_connection_is_cut_and_when_it_is_started_again(
    together: Callable[..., list[Any]],
) -> None:
    """It is the second of two, and the first has left meanwhile: it does not get the lowest that is free."""
    config = RunConfig(sync_every=4, num_fragments=2, overlap_steps=1, min_workers=2)
    with serve(config) as server, Proxy(server.port) as link:
        pair = together(2, lambda i: join(link.address, f"w{i}"))
        assert {outer.shard for outer, _ in pair} == {Shard(0, 2), Shard(1, 2)}
        together(2, lambda i: train(*pair[i]))
        link.cut()
        together(2, lambda i: train(*pair[i]))
        first, second = sorted((outer for outer, _ in pair), key=lambda outer: outer.shard.index)
        assert (first.shard, second.rank_shard) == (Shard(0, 2), Shard(1, 2))
        share = list(ShardedSampler(second, 11))
        first.close()
        second.close()
        again = join(link.address, second.worker_id)[0]
        assert list(ShardedSampler(again, 11)) == share
        again.close()


@pytest.mark.usefixtures("_quick_retries")
def test_shares_outlive_the_server_and_grow_in_number_with_a_worker_more(
    tmp_path: Path, together: Callable[..., list[Any]]
) -> None:
    config = RunConfig(sync_every=4, num_fragments=2, overlap_steps=1, min_workers=2)
    with Proxy(upstream_port=0) as link:
        with serve(config, state_dir=tmp_path) as server:
            link.upstream_port = server.port
            workers = together(2, lambda i: join(link.address, f"w{i}"))
            shares = [outer.shard for outer, _ in workers]
            together(2, lambda i: train(*workers[i]))
        with serve(config, state_dir=tmp_path) as server:
            link.upstream_port = server.port
            together(2, lambda i: train(*workers[i]))
            assert [outer.shard for outer, _ in workers] == shares
            workers.append(join(link.address, "w2"))
            together(3, lambda i: train(*workers[i]))
            dealt = [list(ShardedSampler(outer, 50)) for outer, _ in workers]
            assert sorted(itertools.chain(*dealt)) == list(range(50))
            for outer, _ in workers:
                outer.close()
