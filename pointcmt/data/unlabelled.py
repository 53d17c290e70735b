"""Clouds without labels: the rest of a labelled set, another set, or a folder of files in no order."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pointcmt.data.array_cache import cached_array
from pointcmt.data.clouds import SUFFIXES
from pointcmt.data.dataset import PointDataset, in_unit_sphere, subset
from pointcmt.data.files import is_junk
from pointcmt.data.folder import draw_points
from pointcmt.data.modelnet_off import draws

NO_CLASS = "unlabelled"


def without_labels(dataset: PointDataset) -> PointDataset:
    """The same clouds, and nothing of their classes: every label is 0, of the one class ``unlabelled``."""
    return PointDataset(
        dataset.points,
        np.zeros(len(dataset), dtype=np.int64),
        [NO_CLASS],
        dataset.shape_ids,
        dataset._view_points,
        dataset.source_index,
        up=dataset.up,
    )


def loose_clouds(
    root: Path,
    num_points: int,
    dense_points: int | None = None,
    *,
    seed: int = 0,
    normalize: bool = True,
    cache_dir: Path | None = None,
) -> PointDataset:
    """All clouds and meshes in and below a folder, whatever the folders are called, without labels.

    Points are drawn as :class:`~pointcmt.data.PointFolder` does.

    Raises:
        FileNotFoundError: no such folder, or none in it.
        ValueError: a file that cannot be read; the message names it.
    """
    paths = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file() and not is_junk(path.relative_to(root))
        if path.suffix.lower() != ".csv" or path.parent != root  # a list of files, as PointFolder has it
    ]
    if not paths:
        raise FileNotFoundError(
            f"{root} holds no clouds: expected the folder of a data set (pointcmt check-data), or files of "
            f"{', '.join(SUFFIXES)} in it or below it"
        )
    wanted = max(num_points, dense_points or 0)

    def read() -> np.ndarray:
        clouds = np.empty((len(paths), wanted, 3), dtype=np.float32)
        for cloud, path in zip(clouds, paths, strict=True):
            cloud[:], _ = draw_points(path, wanted, False, draws(seed, path.relative_to(root).as_posix()))
        return clouds

    clouds = cached_array(cache_dir, f"loose1-{wanted}-{seed}", paths, read)
    points, dense = clouds[:, :num_points], clouds[:, :dense_points] if dense_points else None
    if normalize:
        points, dense = in_unit_sphere(points, dense)
    ids = [path.relative_to(root).as_posix() for path in paths]
    return PointDataset(points, np.zeros(len(points), dtype=np.int64), [NO_CLASS], ids, dense)


def apart_from(dataset: PointDataset, others: list[PointDataset]) -> tuple[PointDataset, int]:
    """The clouds of ``dataset`` that are in none of the others, to the last bit, and how many were."""
    known = {_digest(cloud) for other in others for cloud in other.points}
    fresh = np.array([_digest(cloud) not in known for cloud in dataset.points], dtype=bool)
    return (dataset if fresh.all() else subset(dataset, fresh)), int((~fresh).sum())


def _digest(cloud: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(cloud).tobytes(), digest_size=16).digest()
