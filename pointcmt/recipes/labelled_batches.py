"""Batches of clouds with a label for each point, in an order that follows from the seed and the epoch
alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pointcmt.data import PointDataset
from pointcmt.data.scenes import draw
from pointcmt.recipes.batches import Ordered
from pointcmt.types import Batch


class LabelledBatches(Ordered):
    """Batches of a set, shared among the processes, with everything that is known of its clouds.

    Args:
        dataset: has ``point_labels``; of one with ``rooms`` training sees new crops at every epoch.
        batch_size: clouds of a batch over all processes.
        device: of the batches.
        seed: of the order and the crops; None keeps the set's order and its own crops, and keeps a last batch
            that is not full.
        rank, world: this process and the number of them.

    Raises:
        ValueError: no labels, an empty set, or one too small for a training batch.
    """

    dataset: PointDataset

    def __init__(
        self,
        dataset: PointDataset,
        batch_size: int,
        device: torch.device | str,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if dataset.point_labels is None:
            raise ValueError(
                "the data has no labels of points: give a set that has them (--dataset shapenet_part, s3dis, "
                "s3dis_blocks, labeled_psb, depth_tables, or labelled_folder for your own)"
            )
        super().__init__(dataset, batch_size, device, seed, rank, world)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """This process's part of every batch of one epoch; ``index`` are rows of the set."""
        for rows in self.pieces(epoch):
            batch = self._crops(rows, epoch) if self._draws() else self.dataset.batch(rows)
            yield batch.to(self.device)

    def _draws(self) -> bool:
        return self.seed is not None and self.dataset.rooms is not None

    def _crops(self, rows: np.ndarray, epoch: int) -> Batch:
        """A new crop of each room."""
        assert self.dataset.rooms is not None
        count, up = self.dataset.num_points, self.dataset.up or "z"
        known = [*self.dataset.fields(), "points"]
        crops: list[dict[str, Any]] = []
        for row in rows:
            generator = np.random.default_rng([self.seed or 0, epoch, int(row)])
            crops.append(draw(self.dataset.rooms[row], count, generator, up))
        fields = {
            name: torch.from_numpy(np.stack([crop[name] for crop in crops]))
            for name in crops[0]
            if name in known
        }
        # each crop is its own whole or padded, whatever the one is that the set keeps
        fields["lengths"] = torch.tensor([crop["lengths"] for crop in crops])
        return Batch(index=torch.from_numpy(np.asarray(rows, dtype=np.int64)), **fields)
