"""Batches on the device, in an order that follows from the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from pointcmt.data.loading import epoch_order


class Batch(NamedTuple):
    """One batch on the device; ``inputs`` are points [B, N, 3], or views [B, V, C, H, W] of an image
    folder. There may be fewer ``labels`` than inputs: those of the first ones, the others having none."""

    inputs: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index, which nobody calls


class Ordered:
    """Which rows of a dataset are in which batch: by (seed, epoch), shared among the processes.

    Args, raises: as of :class:`Batches`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        device: torch.device | str,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.n = len(dataset)
        self.dataset, self.seed, self.rank, self.world = dataset, seed, rank, world
        self.device = torch.device(device)
        if batch_size < 1:
            raise ValueError(f"the batch size is {batch_size}; expected at least 1")
        if self.n == 0:
            raise ValueError("the dataset is empty: expected at least one shape")
        self.batch_size = min(batch_size, self.n)
        if seed is not None and self.batch_size < 2 * world:
            raise ValueError(
                f"a training batch of {self.batch_size} over {world} process(es) leaves fewer than two "
                "shapes to each, and batch normalisation needs two: use a larger --batch-size or more shapes"
            )

    def __len__(self) -> int:
        if self.seed is not None:
            return self.n // self.batch_size  # the order changes each epoch, so no shape is always left out
        return -(-self.n // self.batch_size)

    def pieces(self, epoch: int) -> Iterator[np.ndarray]:
        """This process's rows of each batch of one epoch."""
        order = epoch_order(self.n, self.seed or 0, epoch, self.seed is not None)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world]


class Batches(Ordered):
    """Batches of a dataset, in an order that follows from (seed, epoch), shared among the processes.

    Args:
        dataset: items ``(input, label, index)``. One with ``points`` [n, N, 3] and ``labels`` [n] is put on
            the device whole; another is read through a ``DataLoader``.
        batch_size: over all processes.
        device: of the batches.
        seed: of the order; None keeps the dataset's order, and keeps a last batch that is not full.
        rank, world: this process and the number of them.
        workers: loading processes for a dataset without ``points``.
        what: the attribute that holds the clouds: ``points``, or ``view_points`` for views.

    Raises:
        ValueError: the dataset is empty, too small for a training batch, or holds numbers that are not
            finite or labels without a class; the shape is named.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        what: str = "points",
    ) -> None:
        super().__init__(dataset, batch_size, device, seed, rank, world)
        self.workers = workers
        self.points: Tensor | None = None
        if getattr(dataset, what, None) is not None:
            points = torch.as_tensor(getattr(dataset, what), dtype=torch.float32)
            self._require_finite(points, torch.arange(self.n))
            labels = torch.as_tensor(np.asarray(dataset.labels), dtype=torch.int64)
            classes = getattr(dataset, "num_classes", None)
            if wrong := ((labels < 0) | (labels >= (classes or 2**62))).nonzero().flatten().tolist():
                raise ValueError(
                    f"{self._shape(wrong[0])} has the label {int(labels[wrong[0]])}; expected a class from 0 "
                    f"to {'K-1' if classes is None else classes - 1}: correct the data"
                )
            self.points, self.labels = points.to(self.device), labels.to(self.device)

    def _shape(self, row: int) -> str:
        names = getattr(self.dataset, "shape_ids", None)
        return f"shape {row}" + (f" ({names[row]})" if names is not None else "")

    def _require_finite(self, inputs: Tensor, rows: Tensor) -> None:
        if bool(torch.isfinite(inputs).all()):
            return
        place = (~torch.isfinite(inputs)).nonzero()[0].tolist()
        what = f"point {place[1]}" if inputs.ndim == 3 else f"view {place[1]}"
        raise ValueError(
            f"{self._shape(int(rows[place[0]]))} holds {float(inputs[tuple(place)])} in {what}; expected "
            "finite numbers: correct or leave out that shape in the data"
        )

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """This process's part of every batch of one epoch. ``index`` are rows of the dataset."""
        return self._take([torch.from_numpy(rows) for rows in self.pieces(epoch)])

    def rows(self, rows: Tensor) -> Iterator[Batch]:
        """Batches of the given rows [m], in their order, all in this process."""
        return self._take(list(rows.split(self.batch_size)) if len(rows) else [])

    def _take(self, pieces: list[Tensor]) -> Iterator[Batch]:
        if self.points is not None:
            for piece in pieces:
                index = piece.to(self.device)
                yield Batch(self.points[index], self.labels[index], index)
            return
        loader = DataLoader(
            self.dataset, batch_sampler=[piece.tolist() for piece in pieces], num_workers=self.workers
        )
        for piece, (inputs, labels, _) in zip(pieces, loader, strict=True):
            self._require_finite(inputs, piece)
            yield Batch(inputs.to(self.device), labels.to(self.device), piece.to(self.device))


class WithUnlabelled(Batches):
    """Labelled batches, and behind the clouds of each some that have no labels.

    An epoch is one of the labelled shapes. The others come in an order of their own, which follows from the
    seed and the number of the step alone, pass after pass. In ``Batch.index`` they are counted on from the n
    labelled shapes: n + row.

    Args:
        labelled: batches of training.
        unlabelled: the other clouds.
        ratio: how many of them to each labelled cloud.

    Raises:
        ValueError: a ratio of which a batch has none, or clouds of another size.
    """

    def __init__(self, labelled: Batches, unlabelled: Any, ratio: float) -> None:
        count = round(ratio * labelled.batch_size)
        if labelled.points is None or labelled.seed is None:
            raise ValueError("clouds without labels stand behind training batches of clouds in memory")
        if count < labelled.world:
            raise ValueError(
                f"--unlabelled-ratio {ratio} of a batch of {labelled.batch_size} leaves no cloud to each of "
                f"{labelled.world} process(es); give a larger ratio, or 0 for none"
            )
        self.__dict__.update(labelled.__dict__)
        points = torch.as_tensor(unlabelled.points, dtype=torch.float32)
        if points.shape[1:] != labelled.points.shape[1:]:
            raise ValueError(
                f"the clouds without labels are {list(points.shape[1:])} and the labelled ones "
                f"{list(labelled.points.shape[1:])}; expected points [N, C] of one size"
            )
        self.others, self.count = points.to(self.device), count
        self.passes: dict[int, np.ndarray] = {}  # the orders that the latest step was taken from

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(super().epoch(epoch)):
            rows = self.rows_of_step(epoch * len(self) + number)[self.rank :: self.world].to(self.device)
            yield Batch(
                torch.cat([batch.inputs, self.others[rows]]),
                batch.labels,
                torch.cat([batch.index, rows + self.n]),
            )

    def rows_of_step(self, step: int) -> Tensor:
        """Rows of the clouds without labels in a step, over all processes."""
        first, total = step * self.count, len(self.others)
        wanted = np.arange(first, first + self.count)
        self.passes = {
            number: self.passes[number]
            if number in self.passes
            else epoch_order(total, (self.seed or 0) + 1_000_003, number)
            for number in range(wanted[0] // total, wanted[-1] // total + 1)
        }
        return torch.tensor([self.passes[place // total][place % total] for place in wanted.tolist()])


def batches_of(
    parts: Mapping[str, Any],
    batch_size: int,
    seed: int,
    accelerator: Accelerator,
    workers: int = 0,
    what: str = "points",
) -> tuple[Batches, dict[str, Batches]]:
    """This process's training batches of the part ``train``, in an order of ``seed``; and those of the other
    parts by name, in the data's order."""

    def made(name: str, order: int | None) -> Batches:
        rank, world = accelerator.process_index, accelerator.num_processes
        return Batches(parts[name], batch_size, accelerator.device, order, rank, world, workers, what)

    return made("train", seed), {name: made(name, None) for name in parts if name != "train"}
