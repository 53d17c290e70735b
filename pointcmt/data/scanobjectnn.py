"""ScanObjectNN (Uy et al., ICCV 2019): objects cut from scans of rooms, in its official HDF5 layout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from pointcmt.data.dataset import PointDataset, Split, check_split, class_rows, in_unit_sphere
from pointcmt.data.h5 import read_clouds
from pointcmt.data.registry import register_dataset

Variant = Literal["obj_bg", "obj_only", "pb_t50_rs"]

# in label order, as in the data set's own repository
CLASS_NAMES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow",
    "sink", "sofa", "toilet",
)  # fmt: skip
_FILES: dict[str, tuple[str, str]] = {
    "obj_bg": ("main_split", "{}_objectdataset.h5"),
    "obj_only": ("main_split_nobg", "{}_objectdataset.h5"),
    "pb_t50_rs": ("main_split", "{}_objectdataset_augmentedrot_scale75.h5"),
}


def _matches(root: Path) -> bool:
    scans = ("main_split", "main_split_nobg", "h5_files")
    return any((root / name).is_dir() for name in scans) or any(root.glob("*_objectdataset*.h5"))


@register_dataset(
    "scanobjectnn",
    matches=_matches,
    layout="the official h5_files: main_split/ and main_split_nobg/ with {training,test}_objectdataset*.h5",
)
class ScanObjectNN(PointDataset):
    """ScanObjectNN, 15 classes, 2048 points per scan; the y axis points up (``up`` says so).

    ``root`` holds ``main_split`` and ``main_split_nobg`` (or ``h5_files``, which holds them), or is the
    folder with the wanted files itself.

    Args:
        root: folder of the data.
        variant: ``"obj_bg"`` (objects with background), ``"obj_only"`` (without), or ``"pb_t50_rs"``
            (bounding boxes shifted by up to half their size, turned and scaled: the hardest).
        split: ``"train"`` or ``"test"``, the official main split.
        num_points: N; clouds give their first N points, as the public training codes take them.
        per_class: keep this many shapes of each class, drawn by ``seed``; None keeps all.
        seed: draws the shapes of ``per_class``.
        normalize: centre each cloud and scale it into the unit sphere. Off, as in the public code of
            PointMLP, RepSurf and Point-BERT, which take the files' coordinates as they are: that objects are
            off-centre is part of the task.
        dense_points: also keep this many points of each scan as ``view_points``; None projects views from
            the clouds.

    Source: files, fields and order of classes as the public code of PointMLP, Point-BERT, RepSurf and
    openpoints (PointNeXt) reads them; the vertical axis as in openpoints (``gravity_dim = 1``).

    Raises:
        FileNotFoundError: the file of this variant and split is not there (the message says where it was
            looked for).
        OSError: a truncated file.
        ValueError: another variant or split; more points than there are.
    """

    def __init__(
        self,
        root: str | Path,
        variant: Variant,
        split: Split,
        num_points: int = 1024,
        *,
        per_class: int | None = None,
        seed: int = 0,
        normalize: bool = False,
        dense_points: int | None = None,
    ) -> None:
        check_split(split)
        if variant not in get_args(Variant):
            raise ValueError(f"variant is {variant!r}; expected one of {', '.join(get_args(Variant))}")
        path = _find(Path(root), variant, split)
        clouds, labels = read_clouds(path, max(num_points, dense_points or 0))
        rows = np.arange(len(labels)) if per_class is None else class_rows(labels, per_class, seed)
        clouds = clouds[rows]
        if normalize:
            clouds, _ = in_unit_sphere(clouds, None)
        super().__init__(
            clouds[:, :num_points],
            labels[rows],
            CLASS_NAMES,
            [f"{variant}_{split}_{row:05d}" for row in rows],
            clouds[:, :dense_points] if dense_points else None,
            rows,
            up="y",
        )
        self.root, self.variant, self.split = Path(root), variant, split


def _find(root: Path, variant: str, split: Split) -> Path:
    folder, name = _FILES[variant]
    name = name.format("training" if split == "train" else "test")
    # a folder of files alone does not say whether they have background, unless it kept its name
    places = [root / folder / name, root / "h5_files" / folder / name]
    if root.name == folder or variant == "pb_t50_rs":
        places.append(root / name)
    for path in places:
        if path.is_file():
            return path
    tried = "\n  ".join(str(path) for path in places)
    raise FileNotFoundError(
        f"ScanObjectNN's {variant} {split} file is not below {root}; tried\n  {tried}\n"
        "Expected the official h5_files: main_split/ and main_split_nobg/ "
        "with {training,test}_objectdataset*.h5"
    )
