"""Batches in an order that depends on the seed and the epoch alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from pointcmt.data.dataset import PointDataset


class Batch(NamedTuple):
    """B clouds of one set.

    Attributes:
        points: float32 [B, N, C].
        labels: int64 [B].
        index: int64 [B], their rows in the set, as :class:`FeatureCache` wants them.
    """

    points: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no batch needs


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The rows 0 … count-1 in the order of an epoch: int64 [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)


def batches(
    dataset: PointDataset,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Iterator[Batch]:
    """One epoch of a set in memory, without workers or collation: the fast way on one process.

    The order depends on ``seed`` and ``epoch`` alone and is that of :func:`loader`.

    Raises:
        ValueError: a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    order = epoch_order(len(dataset), seed, epoch, shuffle)
    stop = len(order) - len(order) % batch_size if drop_last else len(order)
    for start in range(0, stop, batch_size):
        yield _take(dataset, order[start : min(start + batch_size, stop)])


class EpochLoader(DataLoader[Batch]):
    """A ``DataLoader`` of :class:`Batch` that is told the epoch: ``loader.set_epoch(epoch)``.

    What ``accelerate.Accelerator.prepare`` makes of it has ``set_epoch`` too and deals every process its
    own batches of the same order.
    """

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.sampler.set_epoch(epoch)  # type: ignore[union-attr]


def loader(
    dataset: PointDataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    **options: Any,
) -> EpochLoader:
    """A loader of :class:`Batch` for loops that want a ``DataLoader``, such as accelerate's.

    Call ``set_epoch(epoch)`` before each epoch: the order depends on ``seed`` and that number alone, so a
    run that resumes at epoch e sees what the uninterrupted one saw. A batch is cut from the set's one array
    at once, never collated item by item; so workers are rarely worth their while.

    Args:
        dataset: the set.
        batch_size: clouds per batch (and per process under accelerate).
        seed: draws the orders.
        shuffle: False keeps the set's own order in every epoch.
        drop_last: leave out the last batch where it is not full (BatchNorm fails on a batch of one).
        options: further arguments of ``DataLoader``, such as ``num_workers`` or ``pin_memory``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    sampler = BatchSampler(EpochSampler(len(dataset), seed, shuffle), batch_size, drop_last)
    return EpochLoader(_WholeBatches(dataset), batch_sampler=sampler, collate_fn=_as_it_is, **options)


class EpochSampler(Sampler[int]):
    """Rows in the order of :func:`epoch_order`; ``set_epoch`` as in ``DistributedSampler``."""

    def __init__(self, count: int, seed: int = 0, shuffle: bool = True) -> None:
        self.count, self.seed, self.shuffle, self.epoch = count, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.count, self.seed, self.epoch, self.shuffle).tolist())


class _WholeBatches(Dataset[Batch]):
    """Gives ``DataLoader`` a whole batch for a list of rows."""

    def __init__(self, dataset: PointDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Batch:
        return _take(self.dataset, np.array([row]))

    def __getitems__(self, rows: list[int]) -> Batch:
        return _take(self.dataset, np.array(rows))


def _take(dataset: PointDataset, rows: np.ndarray) -> Batch:
    return Batch(
        torch.from_numpy(dataset.points[rows]),
        torch.from_numpy(dataset.labels[rows]),
        torch.from_numpy(rows.astype(np.int64)),
    )


def _as_it_is(batch: Any) -> Batch:
    return batch
