"""What every labelled set of point clouds has in common, and how to take a part of one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Split = Literal["train", "test"]


def check_split(split: str) -> None:
    """Raise ``ValueError`` unless ``split`` is ``"train"`` or ``"test"``."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")


def unit_sphere(points: np.ndarray) -> np.ndarray:
    """Centre clouds [..., N, 3] on the mean of their points and scale the farthest point to distance 1.

    The normalisation of PointNet's public code (``pc_normalize``). A cloud whose points all coincide
    becomes all zeros.
    """
    centred = points - points.mean(axis=-2, keepdims=True)
    radius = np.sqrt((centred**2).sum(-1)).max(-1)[..., None, None]
    return (centred / np.where(radius > 0, radius, 1)).astype(np.float32)


class PointDataset(Dataset[tuple[Tensor, int, int]]):
    """n labelled clouds of N points in memory; an item is ``(points [N, C] float32, label int, index int)``.

    C is 3 (coordinates), or 6 where the set was asked for normals. ``index`` is the row in *this* set,
    so a :class:`FeatureCache` made for it is indexed by it.

    Attributes:
        points: float32 [n, N, C], one array, for fast batched access (:func:`pointcmt.data.batches`).
        view_points: float32 [n, M, 3], what views are projected from: a denser sampling of the same
            shapes in the same frame where there is one, else the coordinates in ``points``. Images of a
            shape are usually finer than its cloud; this is where that is said.
        labels: int64 [n].
        class_names: K names; ``class_names[label]`` names a label.
        shape_ids: n names such as ``"airplane_0627"``, unique, which match image folders to clouds.
        source_index: int64 [n], the rows this set was cut from (see :func:`subset`), else ``0 … n-1``.
    """

    def __init__(
        self,
        points: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        shape_ids: Sequence[str],
        view_points: np.ndarray | None = None,
        source_index: np.ndarray | None = None,
    ) -> None:
        if points.ndim != 3 or points.shape[2] not in (3, 6):
            raise ValueError(f"points have shape {list(points.shape)}; expected [n, N, 3] or [n, N, 6]")
        if len(labels) != len(points) or len(shape_ids) != len(points):
            raise ValueError(
                f"{len(points)} clouds, {len(labels)} labels and {len(shape_ids)} shape_ids; "
                "expected as many of each"
            )
        if view_points is not None and (view_points.ndim != 3 or view_points.shape[::2] != (len(points), 3)):
            raise ValueError(
                f"view_points have shape {list(view_points.shape)}; expected [{len(points)}, M, 3]"
            )
        self.points = np.ascontiguousarray(points, dtype=np.float32)
        self.labels = np.ascontiguousarray(labels, dtype=np.int64).reshape(-1)
        self.class_names = list(class_names)
        self.shape_ids = list(shape_ids)
        self.source_index = (
            np.arange(len(points)) if source_index is None else np.asarray(source_index, dtype=np.int64)
        )
        self._view_points = (
            None if view_points is None else np.ascontiguousarray(view_points, dtype=np.float32)
        )
        self._fingerprint: str | None = None
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(
                f"labels run from {self.labels.min()} to {self.labels.max()}, "
                f"but there are {len(self.class_names)} class names"
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_points(self) -> int:
        return self.points.shape[1]

    @property
    def view_points(self) -> np.ndarray:
        return self.points[..., :3] if self._view_points is None else self._view_points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        index = range(len(self))[index]  # negative indices; IndexError past the end
        return torch.from_numpy(self.points[index].copy()), int(self.labels[index]), index

    def fingerprint(self) -> str:
        """SHA-256 of the contents: points, view points, labels, class names and shape ids.

        Two sets with one fingerprint hold the same shapes in the same order, whatever file they came
        from; so features computed from one serve the other.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for array in (self.points, self.labels, self._view_points):
                if array is not None:
                    digest.update(repr(array.shape).encode())
                    digest.update(array.data)
            digest.update("\0".join((*self.class_names, "", *self.shape_ids)).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def subset(dataset: PointDataset, indices: Sequence[int] | np.ndarray | Tensor) -> PointDataset:
    """The rows ``indices`` of ``dataset``, in that order, with every attribute of :class:`PointDataset` kept.

    The new set counts its items from 0; ``source_index`` says which row of the set first loaded each
    one was.

    Raises:
        ValueError: an index outside the set, or a boolean mask of another length.
    """
    rows = np.asarray(indices)
    if rows.dtype == bool:
        if len(rows) != len(dataset):
            raise ValueError(f"a mask of {len(rows)} values for a set of {len(dataset)} shapes")
        rows = np.flatnonzero(rows)
    rows = rows.astype(np.int64).reshape(-1)
    if len(rows) and not (rows.min() >= 0 and rows.max() < len(dataset)):
        raise ValueError(f"indices from {rows.min()} to {rows.max()} for a set of {len(dataset)} shapes")
    dense = dataset._view_points
    return PointDataset(
        dataset.points[rows],
        dataset.labels[rows],
        dataset.class_names,
        [dataset.shape_ids[row] for row in rows],
        None if dense is None else dense[rows],
        dataset.source_index[rows],
    )


def class_rows(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows of ``per_class`` shapes of every class (all of a class that has fewer), in ascending order.

    Which ones is drawn by ``seed`` for each class alone, so the choice for one class does not depend on
    the others, and fewer per class is a part of more per class.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; expected at least 1, or None for all")
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, int(label)]).permutation(len(rows))
        chosen.append(rows[order[:per_class]])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def holdout(dataset: PointDataset, fraction: float, seed: int = 0) -> tuple[PointDataset, PointDataset]:
    """Split into ``(kept, held out)``, class by class, so that both have the classes in like proportion.

    Every class with at least two shapes gives at least one to each side.

    Args:
        dataset: what to split.
        fraction: part of each class to hold out, between 0 and 1, both excluded.
        seed: draws which shapes.

    Raises:
        ValueError: a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; expected a number between 0 and 1, both excluded")
    held = np.zeros(len(dataset), dtype=bool)
    for label in np.unique(dataset.labels):
        rows = np.flatnonzero(dataset.labels == label)
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        order = np.random.default_rng([seed, int(label)]).permutation(len(rows))
        held[rows[order[:count]]] = True
    return subset(dataset, ~held), subset(dataset, held)
