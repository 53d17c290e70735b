"""ModelNet40 (Wu et al., CVPR 2015) in the three forms in which it is public."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from pointcmt.data import modelnet_hdf5, modelnet_off, modelnet_resampled
from pointcmt.data.checks import Up
from pointcmt.data.dataset import PointDataset, Split, check_split, class_rows, in_unit_sphere
from pointcmt.data.registry import register_dataset

# ModelNet10 is these classes of ModelNet40, in the same split (3991 train, 908 test)
MODELNET10 = (
    "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet",
)  # fmt: skip
_FORMATS = (modelnet_hdf5, modelnet_resampled, modelnet_off)
# beside the HDF5 files of ShapeNetPart and S3DIS, whose names are those of ModelNet40's
_OTHERS = ("all_object_categories.txt", "room_filelist.txt")


def _found(root: Path) -> tuple[ModuleType, Path] | None:
    """The module of the form found in ``root`` or in a folder of a public name below it."""
    for source in _FORMATS:
        for folder in (root, *(root / name for name in source.FOLDERS)):
            if source.matches(folder):
                return source, folder
    return None


@register_dataset(
    "modelnet40",
    matches=lambda root: _found(root) is not None and not any((root / name).is_file() for name in _OTHERS),
    layout="; ".join(source.LAYOUT for source in _FORMATS),
)
class ModelNet40(PointDataset):
    """ModelNet40: 9843 training and 2468 test shapes of 40 classes.

    ``root`` may hold any of the public forms, or be the folder above one that kept its public name:

    - HDF5: ``train_files.txt``, ``test_files.txt`` and ``ply_data_*.h5`` with 2048 (or 1024) points.
      Shape ids come from ``ply_data_*_id2file.json`` where those files are.
    - resampled text, ``modelnet40_normal_resampled``: ``<class>/<class>_0001.txt`` with 10 000 points
      and normals, ``modelnet40_train.txt`` and so on.
    - the meshes as first published: ``<class>/{train,test}/*.off``, sampled uniformly on the surface.

    The axis that points up is left as it is in the files, and recorded (``up``): z in the meshes, the text
    and the HDF5 files of 1024 points, y in the HDF5 files of 2048; not known for others.

    Args:
        root: folder of the data.
        split: ``"train"`` or ``"test"``, the official split.
        num_points: N. Clouds give their first N points, as the public training codes take them. None is as
            many as there are, at most 2048.
        classes: ``"modelnet40"``, or ``"modelnet10"`` for its ten-class part.
        per_class: keep this many shapes of each class, drawn by ``seed``; None keeps all.
        seed: draws the shapes of ``per_class``, and the points on the surface of meshes.
        normals: items are [N, 6] with unit normals; not for the HDF5 form, which has none.
        normalize: centre each cloud and scale it into the unit sphere. None does as the public codes do:
            text and meshes are normalised, HDF5 files (published normalised) left as they are.
        dense_points: also keep this many points of each shape as ``view_points``, for finer views than
            the clouds a student sees; None projects views from the clouds.
        cache_dir: where parsed text files and sampled meshes are kept as one binary file, so that only
            the first use is slow; None keeps nothing.
        up: the axis that points up, where the files are otherwise than said above; it changes no point.

    Raises:
        FileNotFoundError: ``root`` holds none of the forms (the message lists them), or a listed file is
            missing.
        OSError: a truncated HDF5 file.
        ValueError: another split; more points than there are; normals from HDF5; a damaged file.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        num_points: int | None = 1024,
        *,
        classes: Literal["modelnet40", "modelnet10"] = "modelnet40",
        per_class: int | None = None,
        seed: int = 0,
        normals: bool = False,
        normalize: bool | None = None,
        dense_points: int | None = None,
        cache_dir: str | Path | None = None,
        up: Up | None = None,
    ) -> None:
        check_split(split)
        if classes not in ("modelnet40", "modelnet10"):
            raise ValueError(f"classes is {classes!r}; expected 'modelnet40' or 'modelnet10'")
        if num_points is not None and num_points < 1:
            raise ValueError(f"num_points is {num_points}; expected at least 1")
        source, folder = _recognise(Path(root))
        listing = source.Listing(folder, split)
        if num_points is None:
            num_points = min(listing.available, 2048)
        rows = np.arange(len(listing.labels))
        names = list(listing.class_names)
        if classes == "modelnet10":
            keep = [name for name in names if name in MODELNET10]
            if len(keep) != len(MODELNET10):
                raise ValueError(f"{folder} has only {keep} of ModelNet10's classes {list(MODELNET10)}")
            rows = rows[np.isin(listing.labels, [names.index(name) for name in keep])]
            names = keep
        relabel = {listing.class_names.index(name): label for label, name in enumerate(names)}
        labels = np.array([relabel[label] for label in listing.labels[rows].tolist()], dtype=np.int64)
        if per_class is not None:
            chosen = class_rows(labels, per_class, seed)
            rows, labels = rows[chosen], labels[chosen]

        wanted = max(num_points, dense_points or 0)
        clouds = listing.read(rows, wanted, normals=normals, seed=seed, cache_dir=cache_dir)
        dense = clouds[..., :3] if dense_points else None
        clouds = clouds[:, :num_points]
        if source.NORMALIZE if normalize is None else normalize:
            clouds, dense = in_unit_sphere(clouds, dense)
        ids = [
            f"{split}/{names[label]}/{listing.names[row]}"
            for row, label in zip(rows.tolist(), labels.tolist(), strict=True)
        ]
        try:
            super().__init__(clouds, labels, names, ids, dense, rows, up=up or listing.up)
        except ValueError as error:  # of a shape: its file is not known there
            raise ValueError(f"{folder}: {error}") from None
        self.root, self.split = folder, split


def _recognise(root: Path) -> tuple[ModuleType, Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; ModelNet40 needs one in {_layouts()}")
    if (found := _found(root)) is not None:
        return found
    content = sorted(path.name for path in root.iterdir())
    shown = ", ".join(content[:8]) + (", …" if len(content) > 8 else "") or "nothing"
    raise FileNotFoundError(f"{root} holds {shown}; ModelNet40 was looked for in {_layouts()}")


def _layouts() -> str:
    return "one of the layouts " + "; ".join(
        f"({number}) {source.LAYOUT}" for number, source in enumerate(_FORMATS, 1)
    )
