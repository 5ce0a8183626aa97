"""A worker's share of the data: a sampler for data sets with an index, and a filter for streams.

All workers go through the same order; of `count` shares each takes every count-th record, beginning at its own index.
So shares are disjoint and cover everything, as long as all workers agree on `count`. docs/data.md tells what happens
while they do not: somebody joins, leaves, or comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DistributedSampler, IterableDataset, get_worker_info

if TYPE_CHECKING:
    from diloco_client.hook import Outer
    from diloco_client.trainer import Shard

Record = TypeVar("Record")


class ShardedSampler(DistributedSampler[int]):
    """Indices of this worker's share of a data set, for `DataLoader(data, sampler=...)`.

    `data` is the data set, or its length. With `shuffle` an epoch goes through a permutation, which follows from `seed`
    and the epoch alone and is the same on all workers: give them the same seed, length and order of records. It takes 8
    bytes a record.

    Each iteration is an epoch. The share is looked up when it begins and kept until it ends, so `len` stays true and
    the ranks of an island do not drift apart. Shares differ in length by one record at most; those of ranks in an
    island are cut to equal lengths, for their steps must be in step.

    It is a DistributedSampler, which tells Lightning that the ranks' shares have been divided already.
    """

    def __init__(self, outer: Outer, data: Sized | int, *, shuffle: bool = True, seed: int = 0) -> None:
        records = range(data if isinstance(data, int) else len(data))
        super().__init__(records, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self._outer, self._data, self._shuffle, self._seed = outer, data, shuffle, seed
        self._epoch = 0
        self._ended = False
        self._loaded = False
        self._began_at = 0
        """Records of the epoch's order that lay behind all workers when the iteration began."""
        self._given = 0
        self._count = 1

    def __len__(self) -> int:
        """Indices of an epoch that begins now."""
        return self._length(self._outer.rank_shard)

    def _length(self, share: Shard) -> int:
        total = self._total()
        if share.count != self._outer.shard.count:
            return total // share.count
        return len(range(share.index, total, share.count))

    def _total(self) -> int:
        return self._data if isinstance(self._data, int) else len(self._data)

    def __iter__(self) -> Iterator[int]:
        share = self._outer.rank_shard
        length, begin = self._length(share), -(-self._began_at // share.count) if self._loaded else 0
        if self._ended or 0 < length <= begin:
            self._epoch, begin = self._epoch + 1, 0
        self._ended = self._loaded = False
        self._began_at, self._given, self._count = begin * share.count, 0, share.count
        order = self._order()
        for k in range(begin, length):
            self._given += 1
            at = share.index + k * share.count
            yield at if order is None else int(order[at])
        self._ended = True

    def _order(self) -> torch.Tensor | None:
        """(records,) int64, the epoch's permutation; None for the order as it is."""
        if not self._shuffle:
            return None
        # torch uses 32 bits of a seed: neighbouring seeds are spread, so that none begins with another's second epoch.
        generator = torch.Generator().manual_seed((self._seed * 0x9E3779B1 + self._epoch) % 2**32)
        return torch.randperm(self._total(), generator=generator)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch. Trainers call it; without it each iteration is the epoch after the last one
        that came to its end."""
        if epoch != self._epoch:
            self._began_at = self._given = 0
        self._epoch, self._ended = epoch, False

    def state_dict(self, trained: int | None = None) -> dict[str, int]:
        """Where this epoch is, for a checkpoint of the trainer.

        `trained`: records of the present iteration that were trained on. Without it all indices that were given out
        count, and a DataLoader with `num_workers` asks for some ahead.
        """
        given = self._given if trained is None else trained
        return {"epoch": self._epoch, "behind": self._began_at + given * self._count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration goes on where `state_dict` was called, with the share that this worker has then."""
        self._epoch, self._began_at, self._given = state["epoch"], state["behind"], 0
        self._loaded, self._ended = True, False


def shard_stream(outer: Outer, records: Iterable[Record]) -> IterableDataset[Record]:
    """This worker's share of a stream of records, for `DataLoader(shard_stream(outer, records), ...)`.

    `records` must be the same on all workers, in the same order, and be neither sharded nor divided among DataLoader
    workers by itself. All of it is read, and every count-th record is passed on: where reading is what costs, divide
    files instead (`files[outer.shard.index :: outer.shard.count]`).

    The share is looked up at every record, and a new one holds from the next multiple of its count on. Processes of a
    DataLoader take turns within the share; they have that of the moment when they were started, which is at each
    iteration, or once with `persistent_workers`.
    """
    return _ShardedStream(outer, records)


class _ShardedStream(IterableDataset[Record]):
    def __init__(self, outer: Outer | _Fixed, records: Iterable[Record]) -> None:
        self._outer, self._records = outer, records

    def __iter__(self) -> Iterator[Record]:
        helper = get_worker_info()
        number, helpers = (helper.id, helper.num_workers) if helper is not None else (0, 1)
        records, read = iter(self._records), 0
        while True:
            share = self._outer.rank_shard
            island = share.count != self._outer.shard.count
            aside = -read % share.count
            among = list(islice(records, aside + share.count))[aside:]
            complete = len(among) == share.count
            mine = (read + aside) // share.count % helpers == number
            # The ranks of an island must all end at the same record: there a round that is not full is nobody's.
            if mine and share.index < len(among) and (complete or not island):
                yield among[share.index]
            if not complete:
                return
            read += aside + share.count

    def __getstate__(self) -> dict[str, Any]:
        # For a DataLoader that spawns its workers: an Outer stays in the process that joined.
        return {"_outer": _Fixed(self._outer), "_records": self._records}


class _Fixed:
    """The shares of an Outer as they are now."""

    def __init__(self, outer: Outer | _Fixed) -> None:
        self.shard: Shard = outer.shard
        self.rank_shard: Shard = outer.rank_shard
