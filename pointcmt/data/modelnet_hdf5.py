"""ModelNet40 as HDF5 files of points sampled on the surface (``modelnet40_ply_hdf5_2048``)."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import numpy as np

from pointcmt.data.checks import Up
from pointcmt.data.dataset import Split
from pointcmt.data.files import read_json, read_lines, read_names
from pointcmt.data.h5 import check_num_points, read_clouds

LAYOUT = "HDF5: train_files.txt, test_files.txt, ply_data_train*.h5, ply_data_test*.h5"
FOLDERS = ("modelnet40_ply_hdf5_2048", "modelnet40_ply_hdf5_1024")
NORMALIZE = False  # published in the unit sphere already


def matches(folder: Path) -> bool:
    return (folder / "train_files.txt").is_file() or any(folder.glob("ply_data_*.h5"))


class Listing:
    """Names and labels of one split, in the order of its files; :meth:`read` gives the points."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder = folder
        self.files = _files(folder, split)
        # labels are a few bytes beside gzip-packed points, but one file is read in one go: keep both
        loaded = [read_clouds(path) for path in self.files]
        points = {cloud.shape[1] for cloud, _ in loaded}
        if len(points) > 1:
            raise ValueError(f"the h5 files of {folder} differ in points per shape: {sorted(points)}")
        self._points = np.concatenate([cloud for cloud, _ in loaded])
        self.available = self._points.shape[1]
        self.labels = np.concatenate([label for _, label in loaded])
        self.class_names = _class_names(folder, int(self.labels.max(initial=0)) + 1)
        # the public copies of 2048 points are y-up; those of 1024 that are about were made from z-up meshes
        self.up: Up | None = {2048: "y", 1024: "z"}.get(self.available)  # type: ignore[assignment]
        self.names = [
            name
            for path, (cloud, _) in zip(self.files, loaded, strict=True)
            for name in _ids(path, len(cloud))
        ]

    def read(
        self, rows: np.ndarray, num_points: int, *, normals: bool, seed: int, cache_dir: str | Path | None
    ) -> np.ndarray:
        """The first ``num_points`` points of the shapes ``rows``: float32 [n, N, 3]."""
        if normals:
            raise ValueError(
                f"{self.folder} is the HDF5 form of ModelNet40, which has no normals; "
                "use modelnet40_normal_resampled or the meshes, or normals=False"
            )
        check_num_points(num_points, self.available, self.folder)
        return self._points[rows, :num_points]


def _files(folder: Path, split: Split) -> list[Path]:
    listed = folder / f"{split}_files.txt"
    if listed.is_file():
        # copies differ in what precedes the file name ("data/modelnet40_ply_hdf5_2048/…"): only it counts
        names = [PurePosixPath(line).name for _, line in read_lines(listed)]
        if not names:
            raise ValueError(f"{listed} is empty; expected the names of the h5 files, one per line")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{listed} names {twice[0]} twice; its shapes would count twice")
    else:
        names = sorted(path.name for path in folder.glob(f"ply_data_{split}*.h5"))
        if not names:
            raise FileNotFoundError(f"{folder} has neither {listed.name} nor ply_data_{split}*.h5")
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist, though {listed} lists it")
    return [folder / name for name in names]


def _class_names(folder: Path, at_least: int) -> list[str]:
    path = folder / "shape_names.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it names the classes, one per line, in label order")
    names = read_names(path)
    if len(names) < at_least:
        raise ValueError(
            f"{path} names {len(names)} classes, but the h5 files hold label {at_least - 1}; expected labels "
            f"from 0 to {len(names) - 1}. Count from 0, or name the classes that are missing"
        )
    return names


def _ids(path: Path, count: int) -> list[str]:
    """Names such as ``airplane_0627`` from ``ply_data_train_0_id2file.json``; else file name and row."""
    matched = re.fullmatch(r"(.*?)_?(\d+)", path.stem)
    listed = path.with_name(f"{matched[1]}_{matched[2]}_id2file.json") if matched else None
    if listed is None or not listed.is_file():
        return [f"{path.stem}_{row:04d}" for row in range(count)]
    # entries are "airplane_0627" or "airplane/airplane_0627.ply"
    entries = read_json(listed)
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(
            f"{listed} is no list of names; expected one such as airplane/airplane_0627.ply a shape"
        )
    names = [PurePosixPath(entry).name.removesuffix(".ply") for entry in entries]
    if len(names) != count:
        raise ValueError(f"{listed} names {len(names)} shapes, but {path.name} holds {count}")
    return names
