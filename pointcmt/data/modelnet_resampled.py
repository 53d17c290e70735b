"""ModelNet40 as text files with normals (``modelnet40_normal_resampled``, from PointNet++'s authors)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pointcmt.data.array_cache import cached_array
from pointcmt.data.checks import Up
from pointcmt.data.dataset import Split
from pointcmt.data.files import is_junk, read_lines, read_names, within
from pointcmt.data.h5 import check_num_points

LAYOUT = "resampled text: modelnet40_train.txt, modelnet40_test.txt, <class>/<class>_0001.txt"
FOLDERS = ("modelnet40_normal_resampled",)
NORMALIZE = True


def matches(folder: Path) -> bool:
    return (folder / "modelnet40_train.txt").is_file() or (folder / "modelnet40_test.txt").is_file()


class Listing:
    """Names and labels of one split, in the order of its list; :meth:`read` gives the points."""

    available = 10_000
    up: Up = "z"

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder = folder
        listed = folder / f"modelnet40_{split}.txt"
        if not listed.is_file():
            raise FileNotFoundError(f"{listed} does not exist; it lists the shapes of the {split} split")
        lines = [(number, name) for number, name in read_lines(listed) if not is_junk(Path(name))]
        self.names = [name for _, name in lines]
        named = folder / "modelnet40_shape_names.txt"
        classes = [name.rpartition("_")[0] for name in self.names]
        # without a list of names, classes of either split count: a class absent from one keeps its number
        other = [
            name
            for path in folder.glob("modelnet40_t*.txt")
            if path.stem != named.stem
            for _, name in read_lines(path)
        ]
        self.class_names = (
            read_names(named) if named.is_file() else sorted({name.rpartition("_")[0] for name in other})
        )
        for (number, name), label in zip(lines, classes, strict=True):
            if label not in self.class_names:
                raise ValueError(
                    f"{listed}, line {number}: {name!r} is of class {label!r}, which {named} does not name"
                )
        self.labels = np.array([self.class_names.index(name) for name in classes], dtype=np.int64)
        self.paths = [
            within(folder, f"{label}/{name}.txt", f"{listed}, line {number}")
            for label, (number, name) in zip(classes, lines, strict=True)
        ]

    def read(
        self, rows: np.ndarray, num_points: int, *, normals: bool, seed: int, cache_dir: str | Path | None
    ) -> np.ndarray:
        """The first ``num_points`` rows of the files ``rows``: float32 [n, N, 3], or 6 with normals."""
        paths = [self.paths[row] for row in rows]
        columns = 6 if normals else 3

        def parse() -> np.ndarray:
            clouds = np.empty((len(paths), num_points, columns), dtype=np.float32)
            for cloud, path in zip(clouds, paths, strict=True):
                cloud[:] = _parse(path, num_points)[:, :columns]
            return clouds

        return cached_array(cache_dir, f"resampled-{num_points}-{columns}", paths, parse)


def _parse(path: Path, num_points: int) -> np.ndarray:
    """The first rows of one file: float32 [num_points, 6]."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, though the split lists it")
    try:
        rows = np.loadtxt(
            path, delimiter=",", dtype=np.float32, ndmin=2, max_rows=num_points, encoding="utf-8"
        )
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); expected rows of x,y,z,nx,ny,nz") from error
    if rows.shape[1] != 6:
        raise ValueError(f"{path} has rows of {rows.shape[1]} numbers; expected x,y,z,nx,ny,nz")
    check_num_points(num_points, len(rows), path)
    return rows
