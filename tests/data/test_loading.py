"""Batches: the same for one seed and epoch, every shape once, also when several processes share them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard

from pointcmt.data import PointDataset, batches, loader


def numbered(count: int = 53) -> PointDataset:
    points = np.arange(count, dtype=np.float32)[:, None, None] * np.ones((1, 4, 3), dtype=np.float32)
    return PointDataset(points, np.arange(count) % 7, list("abcdefg"), [str(k) for k in range(count)])


def rows(iterable) -> list[list[int]]:
    return [batch.index.tolist() for batch in iterable]


def test_every_shape_once_with_its_label() -> None:
    data = numbered()
    seen = []
    for points, labels, index in batches(data, 8, seed=3, epoch=1):
        assert points.dtype == torch.float32 and labels.dtype == index.dtype == torch.int64
        assert torch.equal(points[:, 0, 0].long(), index) and torch.equal(labels, index % 7)
        seen += index.tolist()
    assert sorted(seen) == list(range(53)) and seen != sorted(seen)
    assert sum(len(row) for row in rows(batches(data, 8, drop_last=True))) == 48
    assert rows(batches(data, 8, shuffle=False))[0] == list(range(8))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    data = numbered()
    orders = {
        (seed, epoch): str(rows(batches(data, 8, seed=seed, epoch=epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    torch.manual_seed(5)
    np.random.seed(5)
    assert str(rows(batches(data, 8, seed=1, epoch=1))) == orders[1, 1]


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"drop_last": True}, {"num_workers": 1}])
def test_loader_gives_the_same_batches(options: dict) -> None:
    data = numbered()
    order = {key: value for key, value in options.items() if key != "num_workers"}
    loading = loader(data, 8, seed=3, **options)
    for epoch in (4, 0):  # any epoch, in any order: what resuming needs
        loading.set_epoch(epoch)
        assert rows(loading) == rows(batches(data, 8, seed=3, epoch=epoch, **order))
    assert len(loading) == len(rows(loading))


def test_accelerate_keeps_the_order_and_deals_it_out() -> None:
    data = numbered(48)
    prepared = Accelerator(cpu=True).prepare(loader(data, 8, seed=3))
    for epoch in (2, 0):
        prepared.set_epoch(epoch)
        whole = rows(batches(data, 8, seed=3, epoch=epoch))
        assert rows(prepared) == whole
        # two processes, as accelerate would deal to them
        sampler = loader(data, 8, seed=3).batch_sampler
        sampler.sampler.set_epoch(epoch)
        dealt = [list(BatchSamplerShard(sampler, 2, process)) for process in (0, 1)]
        assert [batch for pair in zip(*dealt, strict=True) for batch in pair] == whole


def test_wrong_batch_size() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        loader(numbered(), 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(batches(numbered(), 0))
