"""What every labelled set of point clouds has in common, and how to take a part of one."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pointcmt.data.checks import Up, check_coordinates
from pointcmt.data.files import same_files
from pointcmt.data.labelled import check_point_labels
from pointcmt.types import Batch, Views
from pointcmt.views import pixels_of, unit_sphere

Split = Literal["train", "test"]


def check_split(split: str) -> None:
    """Raise ``ValueError`` unless ``split`` is ``"train"`` or ``"test"``."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")


def in_unit_sphere(points: np.ndarray, dense: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Clouds [n, N, 3 or 6] by :func:`pointcmt.views.unit_sphere`, and a denser sampling of the same shapes
    in the same frame: the student's cloud and the views show the same thing."""
    coordinates = points[..., :3]
    clouds = [unit_sphere(torch.from_numpy(np.ascontiguousarray(coordinates, dtype=np.float32))).numpy()]
    if dense is not None:
        centre = coordinates.mean(1, keepdims=True)
        radius = np.linalg.norm(coordinates - centre, axis=-1).max(1)[:, None, None]
        dense = ((dense - centre) / np.where(radius > 0, radius, 1)).astype(np.float32)
    if points.shape[2] == 6:
        clouds.append(points[..., 3:])
    return np.concatenate(clouds, axis=-1), dense


def padded(rows: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """``count`` rows: the first of ``rows``, and where there are fewer all again and again; and how many of
    them are no repetition."""
    return rows[np.arange(count) % len(rows)], min(len(rows), count)


class StoredViews(NamedTuple):
    """Images of n shapes, with the cameras they were taken by.

    Attributes:
        images: uint8 [n, V, C, H, W].
        view_matrix, projection_matrix: float32 [n, V, 4, 4], as of ``pointcmt.types.Views``, from the clouds'
            coordinates.
    """

    images: np.ndarray
    view_matrix: np.ndarray
    projection_matrix: np.ndarray

    def take(self, rows: Tensor, cameras: Tensor, points: Tensor) -> Views:
        """Some views of some shapes, on the device of the points.

        Args:
            rows: int64 [B].
            cameras: int64 [B, V'], which of the views.
            points: [B, N, 3], whose pixels are wanted; all that fall into the image count as visible, as they
                do where the points were measured by that camera.
        """
        place = rows.cpu().numpy()[:, None], cameras.cpu().numpy()
        images = torch.from_numpy(self.images[place]).to(points.device).float() / 255
        view = torch.from_numpy(self.view_matrix[place]).to(points.device)
        projection = torch.from_numpy(self.projection_matrix[place]).to(points.device)
        pixels, inside = pixels_of(points, view, projection)
        return Views(images, pixels, inside, view, projection)


class PointDataset(Dataset[tuple[Tensor, int, int]]):
    """n labelled clouds of N points in memory; an item is ``(points [N, C] float32, label int, index int)``.

    C is 3 (coordinates), or 6 where the set was asked for normals. ``index`` is the row in *this* set,
    so a :class:`FeatureCache` made for it is indexed by it. :meth:`batch` gives shapes with all that is
    known of them.

    Attributes:
        points: float32 [n, N, C], one array, for fast batched access.
        view_points: float32 [n, M, 3], what views are projected from: a denser sampling of the same
            shapes in the same frame where there is one, else the coordinates in ``points``. Images of a
            shape are usually finer than its cloud; this is where that is said.
        labels: int64 [n].
        class_names: K names; ``class_names[label]`` names a label.
        shape_ids: n unique names such as ``"train/airplane/airplane_0627"``, which match image folders to
            clouds: split, class and the shape's own name, because file names alone are not unique.
        source_index: int64 [n], the rows this set was cut from (see :func:`subset`), else ``0 … n-1``.
        up: the axis of the clouds that points up, ``"x"``, ``"y"`` or ``"z"``; None where it is not known.
        normals, colors, features: float32 [n, N, 3], [n, N, 3] and [n, N, F], or None.
        point_labels: int64 [n, N], class of each point, negative where it has none; or None.
        part_names: names of the point labels; empty where there are none.
        category: int64 [n], or None.
        lengths: int64 [n], how many of the N points are the cloud's own, the rest being repeated; or None.
        rooms: the n whole rooms (``pointcmt.data.scenes.Room``) that the clouds are crops of, or None.
        stored_views: real images of the n shapes with their cameras, or None.

    Raises:
        ValueError: arrays that do not fit together, labels that are not whole numbers with a name, or
            coordinates that are not finite or absurd; the shape is named.
    """

    # what rows of a set may have beside points and labels: dtype and number of axes
    FIELDS: ClassVar[dict[str, tuple[type, int]]] = {
        "normals": (np.float32, 3),
        "colors": (np.float32, 3),
        "features": (np.float32, 3),
        "point_labels": (np.int64, 2),
        "category": (np.int64, 1),
        "lengths": (np.int64, 1),
    }
    normals: np.ndarray | None = None
    colors: np.ndarray | None = None
    features: np.ndarray | None = None
    point_labels: np.ndarray | None = None
    category: np.ndarray | None = None
    lengths: np.ndarray | None = None
    rooms: list[Any] | None = None
    stored_views: StoredViews | None = None

    def __init__(
        self,
        points: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        shape_ids: Sequence[str],
        view_points: np.ndarray | None = None,
        source_index: np.ndarray | None = None,
        *,
        up: Up | None = None,
        part_names: Sequence[str] = (),
        **fields: np.ndarray | None,
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
        if up not in (None, "x", "y", "z"):
            raise ValueError(f"up is {up!r}; expected 'x', 'y' or 'z', or None where it is not known")
        self.points = np.ascontiguousarray(points, dtype=np.float32)
        self.class_names = list(class_names)
        check_class_names(self.class_names)
        self.shape_ids = list(shape_ids)
        self.labels = check_labels(labels, len(self.class_names), self.shape_ids)
        self.source_index = (
            np.arange(len(points)) if source_index is None else np.asarray(source_index, dtype=np.int64)
        )
        self.up: Up | None = up
        self.part_names = list(part_names)
        self._view_points = (
            None if view_points is None else np.ascontiguousarray(view_points, dtype=np.float32)
        )
        for name, value in fields.items():
            if name not in self.FIELDS:
                raise TypeError(f"a set has no field {name!r}; expected one of {', '.join(self.FIELDS)}")
            if value is None:
                continue
            dtype, axes = self.FIELDS[name]
            expected = points.shape[: min(axes, 2)]
            if value.ndim != axes or value.shape[:2] != expected:
                raise ValueError(
                    f"{name} have shape {list(value.shape)}; expected "
                    f"[{', '.join(map(str, expected))}{', …' if axes == 3 else ''}]"
                )
            setattr(self, name, np.ascontiguousarray(value, dtype=dtype))
        if self.point_labels is not None and self.part_names:
            check_point_labels(self.point_labels, self.part_names, self.shape_ids)
        self._fingerprint: str | None = None
        check_coordinates(self.points, self.shape_ids)
        if self._view_points is not None:
            check_coordinates(self._view_points, self.shape_ids, "view point")

    def fields(self) -> dict[str, np.ndarray]:
        """What the rows have beside points and labels, by name."""
        return {name: value for name in self.FIELDS if (value := getattr(self, name)) is not None}

    def batch(self, rows: Sequence[int] | np.ndarray | Tensor) -> Batch:
        """The shapes ``rows`` int [B] as tensors on the CPU, with everything that is known of them."""
        index = np.asarray(rows, dtype=np.int64).reshape(-1)
        tensors = {name: torch.from_numpy(value[index]) for name, value in self.fields().items()}
        points = torch.from_numpy(self.points[index])
        if points.shape[2] == 6:
            points, tensors["normals"] = points[..., :3].contiguous(), points[..., 3:].contiguous()
        labels = torch.from_numpy(self.labels[index])
        return Batch(points=points, labels=labels, index=torch.from_numpy(index), **tensors)

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
        """SHA-256 of the contents: points, view points, labels, further fields, names, and the up axis.

        Two sets with one fingerprint hold the same shapes in the same order, whatever file they came
        from; so features computed from one serve the other.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            arrays = {"points": self.points, "labels": self.labels, "view_points": self._view_points}
            for name, array in {**arrays, **self.fields()}.items():
                if array is not None:
                    digest.update(f"{name}{array.shape}".encode())
                    digest.update(array.data)
            names = (*self.class_names, "", *self.shape_ids, "", *self.part_names, "", f"up {self.up}")
            digest.update("\0".join(names).encode("utf-8", "surrogateescape"))
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
    made = PointDataset(
        dataset.points[rows],
        dataset.labels[rows],
        dataset.class_names,
        [dataset.shape_ids[row] for row in rows],
        None if dense is None else dense[rows],
        dataset.source_index[rows],
        up=dataset.up,
        part_names=dataset.part_names,
        **{name: value[rows] for name, value in dataset.fields().items()},
    )
    if dataset.rooms is not None:
        made.rooms = [dataset.rooms[row] for row in rows]
    if dataset.stored_views is not None:
        made.stored_views = StoredViews(*(part[rows] for part in dataset.stored_views))
    return made


def check_class_names(names: Sequence[str]) -> None:
    """Warns of classes that one name in two spellings makes: capitals, or an accent stored in two ways, as
    systems differ in them."""
    for other, name in same_files(names):
        warnings.warn(
            f"the classes {other!a} and {name!a} differ in nothing but capitals or how an "
            "accent is stored, and count as two; if they are one, give their folders one name",
            UserWarning,
            stacklevel=3,
        )


def check_labels(labels: np.ndarray, classes: int, shape_ids: Sequence[str]) -> np.ndarray:
    """Labels as int64 [n], each with a class name.

    Raises:
        ValueError: a label that is not a whole number, or without a name; the shape is named.
    """
    values = np.asarray(labels).reshape(-1)
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64) if values.dtype.kind in "iufb" else None
    if whole is None or not np.array_equal(whole, values):
        raise ValueError(f"labels are {values.dtype} such as {values[:3].tolist()}; expected whole numbers")
    if len(wrong := np.flatnonzero((whole < 0) | (whole >= classes))):
        raise ValueError(
            f"shape {shape_ids[wrong[0]]!r} (row {wrong[0]}) has label {whole[wrong[0]]}: labels run from "
            f"{whole.min()} to {whole.max()}, but there are {classes} class names"
        )
    return whole


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
