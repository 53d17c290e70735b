"""Rooms: clouds of any size with a label for each point, of which training sees crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointcmt.data.checks import Up
from pointcmt.data.dataset import PointDataset, padded
from pointcmt.data.labelled import LabelledCloud, check_point_labels, read_labelled
from pointcmt.ops import voxel_subsample


@dataclass(frozen=True)
class Room:
    """A cloud of m points with labels, thinned to one point for each occupied cube, where it was asked for.

    Attributes:
        name: unique.
        cloud: the points that training sees, with labels.
        low, high: float32 [3], the corners of the whole room.
        file: where all its points are; None: ``cloud`` has them all.
    """

    name: str
    cloud: LabelledCloud
    low: np.ndarray
    high: np.ndarray
    file: Path | None = None

    def whole(self) -> LabelledCloud:
        """All points of the room, read again where it was thinned."""
        return self.cloud if self.file is None else read_labelled(self.file)


def make_room(name: str, cloud: LabelledCloud, voxel: float = 0.0, file: Path | None = None) -> Room:
    """A room of a cloud with labels; ``voxel`` > 0 keeps one point of each cube of that edge.

    ``file`` is where the whole cloud can be read again; without it the whole stays in memory, unthinned.
    """
    low, high = cloud.points.min(0), cloud.points.max(0)
    if voxel > 0 and file is not None:
        kept, _ = voxel_subsample(torch.from_numpy(cloud.points - low), voxel)
        return Room(name, cloud.rows(kept.numpy()), low, high, file)
    return Room(name, cloud, low, high)


def nearest(points: np.ndarray, centre: np.ndarray, count: int) -> np.ndarray:
    """Rows of the ``count`` points of [m, 3] nearest to ``centre`` [3], ascending; all where there are fewer.

    Ties at the border are broken by the row.
    """
    if len(points) <= count:
        return np.arange(len(points))
    distance = np.square(points - centre).sum(1)
    bound = np.partition(distance, count - 1)[count - 1]
    inside = np.flatnonzero(distance < bound)
    border = np.flatnonzero(distance == bound)
    return np.sort(np.concatenate([inside, border[: count - len(inside)]]))


def framed(
    cloud: LabelledCloud,
    rows: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    up: Up = "z",
    own: int | None = None,
) -> dict[str, np.ndarray]:
    """The fields of a ``Batch`` for one crop of a room.

    Coordinates are relative to the crop's mean, and along ``up`` to the room's lowest point; ``features`` are
    where each point is in the room, 0 … 1 along each axis: with colours the 9 channels of PointNet and its
    followers on S3DIS.

    Args:
        cloud: of the room.
        rows: int [N], the crop's points.
        low, high: the room's corners.
        up: the axis that points up.
        own: how many of the rows are the crop's own, the rest being repeated; None: all.
    """
    points = cloud.points[rows]
    origin = points[:own].mean(0)
    origin["xyz".index(up)] = low["xyz".index(up)]
    extent = np.maximum(high - low, 1e-6)
    fields = {
        "points": points - origin,
        "features": ((points - low) / extent).astype(np.float32),
    }
    for name, part in (("colors", cloud.colors), ("normals", cloud.normals), ("point_labels", cloud.labels)):
        if part is not None:
            fields[name] = part[rows]
    return fields


class SceneDataset(PointDataset):
    """Rooms, and a crop of each by ``seed``; training draws others with :meth:`draw`.

    A crop is the ``num_points`` points nearest to a point by chance; a room with fewer gives all of them and
    then some again (``lengths``).

    Args:
        rooms: at least one.
        class_names: names of the labels.
        num_points: N.
        seed: of the crops that are kept as ``points``.
        up: the axis that points up.

    Raises:
        ValueError: no room, or a label without a name; the room is named.

    Source: voxels of 0.04 m and 24,000 points around a random centre are those of PointNeXt on S3DIS
    (Qian et al. 2022; guochengqian/PointNeXt, cfgs/s3dis).
    """

    def __init__(
        self,
        rooms: Sequence[Room],
        class_names: Sequence[str],
        num_points: int,
        *,
        seed: int = 0,
        up: Up = "z",
        shape_ids: Sequence[str] | None = None,
    ) -> None:
        if not rooms:
            raise ValueError("there are no rooms; expected at least one")
        if num_points < 1:
            raise ValueError(f"num_points is {num_points}; expected at least 1")
        for room in rooms:
            assert room.cloud.labels is not None
            check_point_labels(room.cloud.labels[None], class_names, [room.name])
        crops = [draw(room, num_points, np.random.default_rng([seed, n]), up) for n, room in enumerate(rooms)]
        common = set.intersection(*(set(crop) for crop in crops)) - {"points", "lengths"}
        lengths = np.array([crop["lengths"] for crop in crops])
        super().__init__(
            np.stack([crop["points"] for crop in crops]),
            np.zeros(len(rooms), dtype=np.int64),
            ["room"],
            list(shape_ids) if shape_ids is not None else [room.name for room in rooms],
            up=up,
            part_names=class_names,
            lengths=lengths if (lengths < num_points).any() else None,
            **{name: np.stack([crop[name] for crop in crops]) for name in sorted(common)},
        )
        self.rooms = list(rooms)


def draw(room: Room, num_points: int, generator: np.random.Generator, up: Up = "z") -> dict[str, Any]:
    """One crop of a room around a point by chance: the fields of a ``Batch``, and ``lengths``."""
    points = room.cloud.points
    rows = nearest(points, points[generator.integers(len(points))], num_points)
    rows, own = padded(generator.permutation(rows), num_points)
    return {**framed(room.cloud, rows, room.low, room.high, up, own), "lengths": own}
