"""S3DIS (Armeni et al., CVPR 2016): 272 rooms of six areas, 13 classes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from pointcmt.data.array_cache import cached_array, cached_path
from pointcmt.data.checks import Up
from pointcmt.data.dataset import PointDataset, Split, check_split
from pointcmt.data.files import read_lines
from pointcmt.data.h5 import check_num_points, read_datasets
from pointcmt.data.labelled import LabelledCloud, labelled_rows, read_labelled
from pointcmt.data.registry import register_dataset
from pointcmt.data.scenes import Room, SceneDataset, make_room

CLASSES = (
    "ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair", "sofa", "bookcase",
    "board", "clutter",
)  # fmt: skip

_NAME = re.compile(r"Area_(\d)_(\w+)")
_ROOM_LIST = "room_filelist.txt"


def _files(root: Path) -> list[tuple[int, str, Path]]:
    """(area, name, file or folder) of each room: prepared ``Area_1_office_1.npy``, or ``Area_1/office_1/``
    with ``Annotations/``."""
    prepared = [
        (int(found[1]), path.stem, path)
        for path in sorted(root.glob("Area_*.npy"))
        if (found := _NAME.fullmatch(path.stem))
    ]
    original = [
        (int(path.parent.parent.name[-1]), f"{path.parent.parent.name}_{path.parent.name}", path.parent)
        for path in sorted(root.glob("Area_[1-6]/*/Annotations"))
    ]
    return prepared or original


@register_dataset(
    "s3dis",
    matches=lambda root: root.is_dir() and bool(_files(root)),
    layout="Area_<k>_<room>.npy with x y z r g b label a row, or Area_<k>/<room>/Annotations/*.txt (S3DIS)",
    up="z",
)
class S3DIS(SceneDataset):
    """S3DIS by rooms: one area is the test set, the others are for training.

    Rooms are thinned to a point for each cube of ``voxel`` metres; a crop is the ``num_points`` points
    nearest to one by chance. PointNeXt takes 0.04 m and 24,000 points. ``rooms[k].whole()`` has all points.

    Args:
        root: the folder.
        split: ``"train"`` or ``"test"``.
        num_points: points of a crop.
        seed: of the crops that are kept as ``points``.
        voxel: edge of the cubes in metres; 0 keeps all points.
        test_area: 1 to 6.
        cache_dir: where the original text is kept once parsed; needed for it.

    Raises:
        FileNotFoundError: no room of that split.
        ValueError: a room that is damaged or has a NaN, or a label outside the classes; it is named.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        num_points: int = 24_000,
        *,
        seed: int = 0,
        voxel: float = 0.04,
        test_area: int = 5,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_split(split)
        if not voxel >= 0:
            raise ValueError(f"voxel is {voxel}; expected an edge in metres, or 0")
        root = Path(root)
        found = [
            (name, path) for area, name, path in _files(root) if (area == test_area) == (split == "test")
        ]
        if not found:
            raise FileNotFoundError(
                f"{root} has no {split} rooms where area {test_area} is the test set; expected "
                "Area_<k>_<room>.npy, or Area_<k>/<room>/Annotations"
            )
        rooms: list[Room] = []
        for name, path in found:
            if path.is_file():
                cloud, file = read_labelled(path), path
            else:
                cloud, file = _parsed(path, name, cache_dir)
            rooms.append(make_room(name, cloud, voxel, file))
        super().__init__(rooms, CLASSES, num_points, seed=seed, shape_ids=[f"{split}/{n}" for n, _ in found])
        self.root, self.split = root, split


def _parsed(folder: Path, name: str, cache_dir: str | Path | None) -> tuple[LabelledCloud, Path]:
    """The room of an original folder, and the file in ``cache_dir`` that keeps it."""
    if cache_dir is None:
        raise ValueError(
            f"{folder.parent.parent} holds S3DIS as text, which is slow to read: give --data-cache FOLDER, "
            "where it is kept once parsed"
        )
    files = sorted((folder / "Annotations").glob("*.txt"))

    def read() -> np.ndarray:
        parts = []
        for path in files:
            kind = path.stem.rpartition("_")[0]
            # stairs are no class of the benchmark; its converters count them as clutter
            label = CLASSES.index(kind) if kind in CLASSES else CLASSES.index("clutter")
            cloud = read_labelled(path, labelled=False)
            if cloud.colors is None:
                raise ValueError(f"{path}: expected x y z r g b on each line")
            columns = [cloud.points, 255 * cloud.colors, np.full(len(cloud.points), label)]
            parts.append(np.column_stack(columns).astype(np.float32))
        if not parts:
            raise FileNotFoundError(f"{folder / 'Annotations'} holds no *.txt")
        return np.concatenate(parts)

    rows = cached_array(cache_dir, f"s3dis1-{name}", files, read)
    file = cached_path(cache_dir, f"s3dis1-{name}", files)
    return labelled_rows(rows, file), file


@register_dataset(
    "s3dis_blocks",
    matches=lambda root: (root / _ROOM_LIST).is_file() and (root / "all_files.txt").is_file(),
    layout=f"{_ROOM_LIST}, all_files.txt and ply_data_all_*.h5 (S3DIS in blocks of 1 m × 1 m)",
    up="z",
)
class S3DISBlocks(PointDataset):
    """S3DIS in the prepared blocks of PointNet (``indoor3d_sem_seg_hdf5_data``): 4096 points of 1 m × 1 m.

    A point has x y z in its block, r g b, and where it is in its room: 9 channels (``points``, ``colors``,
    ``features``).

    Args:
        root: the folder.
        split: ``"train"`` or ``"test"``.
        num_points: of each block the first so many.
        test_area: 1 to 6.
        up: the axis that points up: z.

    Raises:
        FileNotFoundError, OSError, ValueError: files that are missing or damaged, or say other than this.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        num_points: int = 4096,
        *,
        test_area: int = 5,
        up: Up | None = None,
    ) -> None:
        check_split(split)
        root = Path(root)
        names = [line for _, line in read_lines(root / _ROOM_LIST)]
        clouds, labels = [], []
        for _, line in read_lines(root / "all_files.txt"):
            path = root / Path(line).name
            (data, label), available = read_datasets(path, {"data": (3, "f"), "label": (2, "iu")})
            check_num_points(num_points, available, path)
            if data.shape[2] != 9 or label.shape != data.shape[:2]:
                raise ValueError(
                    f"{path} holds data {list(data.shape)} and label {list(label.shape)}; expected "
                    "[n, N, 9] and [n, N]"
                )
            clouds.append(data[:, :num_points].astype(np.float32))
            labels.append(label[:, :num_points].astype(np.int64))
        data, point_labels = np.concatenate(clouds), np.concatenate(labels)
        if len(names) != len(data):
            raise ValueError(f"{root / _ROOM_LIST} names {len(names)} blocks, and the files hold {len(data)}")
        rows = np.flatnonzero(np.array([f"Area_{test_area}" in name for name in names]) == (split == "test"))
        if not len(rows):
            raise FileNotFoundError(f"{root} has no {split} blocks where area {test_area} is the test set")
        super().__init__(
            data[rows, :, :3],
            np.zeros(len(rows), dtype=np.int64),
            ["block"],
            [f"{split}/{names[row]}/{row}" for row in rows],
            source_index=rows,
            up=up or "z",
            part_names=CLASSES,
            point_labels=point_labels[rows],
            colors=data[rows, :, 3:6],
            features=data[rows, :, 6:],
        )
        self.root, self.split = root, split
