"""ShapeNetPart (Yi et al., SIGGRAPH Asia 2016): shapes of 16 categories with 50 parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pointcmt.data.array_cache import cached_array
from pointcmt.data.checks import Up
from pointcmt.data.dataset import PointDataset, Split, check_split, in_unit_sphere, padded
from pointcmt.data.files import read_lines, read_text
from pointcmt.data.h5 import check_num_points, read_datasets
from pointcmt.data.labelled import read_labelled
from pointcmt.data.modelnet_off import draws
from pointcmt.data.registry import register_dataset

CATEGORIES = (
    "Airplane", "Bag", "Cap", "Car", "Chair", "Earphone", "Guitar", "Knife", "Lamp", "Laptop", "Motorbike",
    "Mug", "Pistol", "Rocket", "Skateboard", "Table",
)  # fmt: skip
PARTS = (4, 2, 2, 4, 4, 3, 3, 2, 4, 2, 6, 2, 3, 3, 3, 3)
"""Parts of each category, in label order: 0 … 3 are the airplane's, 4 and 5 the bag's."""
PART_NAMES = tuple(
    f"{name}/{number}" for name, count in zip(CATEGORIES, PARTS, strict=True) for number in range(count)
)

_CATEGORY_FILE, _SPLITS = "synsetoffset2category.txt", "train_test_split/shuffled_{}_file_list.json"
_H5_MARK = "all_object_categories.txt"


def _h5_folder(root: Path) -> Path | None:
    """The folder of the HDF5 form: the root, or hdf5_data in it."""
    for folder in (root, root / "hdf5_data"):
        if (folder / _H5_MARK).is_file() and any(folder.glob("*train*.h5")):
            return folder
    return None


def _holds(root: Path) -> bool:
    return root.is_dir() and (
        ((root / _CATEGORY_FILE).is_file() and (root / _SPLITS.format("train")).is_file())
        or _h5_folder(root) is not None
    )


@register_dataset(
    "shapenet_part",
    matches=_holds,
    layout=f"{_CATEGORY_FILE} and <synset>/*.txt (ShapeNetPart), or its HDF5 files with {_H5_MARK}",
    up="y",
)
class ShapeNetPart(PointDataset):
    """ShapeNetPart in either of its public forms; ``train`` is the official train and val together.

    The text form (``shapenetcore_partanno_segmentation_benchmark_v0_normal``) has a file for each shape with
    x y z, normal and part a line; N points of each are drawn by ``seed`` and the file's name, and some are
    repeated where it has fewer. The HDF5 form has 2048 points of each (``data``, ``label``, ``pid``), of
    which the first N are taken.

    Args:
        root: the folder.
        split: ``"train"`` or ``"test"``.
        num_points: N.
        seed: draws points of the text form.
        normals: keep the normals; of the text form only.
        cache_dir: where text is kept once parsed.
        up: the axis that points up: y, where it is not said.

    Attributes:
        point_labels: int64 [n, N], which of the 50 ``part_names`` each point belongs to.
        category: int64 [n], as ``labels``.

    Raises:
        FileNotFoundError, OSError, ValueError: files that are missing or damaged, or say other than this.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        num_points: int = 2048,
        *,
        seed: int = 0,
        normals: bool = False,
        cache_dir: str | Path | None = None,
        up: Up | None = None,
    ) -> None:
        check_split(split)
        root = Path(root)
        folder = _h5_folder(root)
        if folder is not None:
            if normals:
                raise ValueError(f"{folder}: the HDF5 form of ShapeNetPart has no normals; use its text form")
            points, point_labels, labels, ids = _read_h5(folder, split, num_points)
            normal, lengths = None, None
        else:
            points, normal, point_labels, labels, ids, lengths = _read_text(
                root, split, num_points, seed, cache_dir
            )
        _check_parts(point_labels, labels, ids)
        super().__init__(
            in_unit_sphere(points, None)[0],
            labels,
            CATEGORIES,
            ids,
            up=up or "y",
            part_names=PART_NAMES,
            point_labels=point_labels,
            category=labels,
            normals=normal if normals else None,
            lengths=lengths,
        )
        self.root, self.split = root, split


def _check_parts(point_labels: np.ndarray, labels: np.ndarray, ids: list[str]) -> None:
    """A shape's points have parts of its category."""
    first = np.concatenate([[0], np.cumsum(PARTS)])
    wrong = (point_labels < first[labels][:, None]) | (point_labels >= first[labels + 1][:, None])
    if wrong.any():
        row, point = (int(place[0]) for place in np.nonzero(wrong))
        raise ValueError(
            f"shape {ids[row]!r}: point {point} has the part {point_labels[row, point]}, and those of "
            f"{CATEGORIES[labels[row]]} are {first[labels[row]]} to {first[labels[row] + 1] - 1}"
        )


def _read_h5(folder: Path, split: Split, num_points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list]:
    names = ("train", "val") if split == "train" else ("test",)
    files = [path for name in names for path in sorted(folder.glob(f"*{name}*.h5"))]
    if not files:
        raise FileNotFoundError(f"{folder} has no *{split}*.h5")
    clouds, parts, labels, ids = [], [], [], []
    for path in files:
        expected = {"data": (3, "f"), "label": (0, "iu"), "pid": (2, "iu")}
        (data, label, pid), available = read_datasets(path, expected, num_points)
        check_num_points(num_points, available, path)
        if data.shape[2] != 3 or len(label.reshape(-1)) != len(data) or pid.shape != (len(data), available):
            raise ValueError(
                f"{path} holds data {list(data.shape)}, label {list(label.shape)} and pid {list(pid.shape)}; "
                "expected [n, N, 3], [n] or [n, 1], and [n, N]"
            )
        if label.max(initial=0) >= len(CATEGORIES):
            raise ValueError(f"{path} has the category {label.max()}; ShapeNetPart has {len(CATEGORIES)}")
        clouds.append(data.astype(np.float32))
        parts.append(pid[:, :num_points].astype(np.int64))
        labels.append(label.reshape(-1).astype(np.int64))
        ids += [f"{split}/{CATEGORIES[k]}/{path.stem}-{row}" for row, k in enumerate(labels[-1])]
    return np.concatenate(clouds), np.concatenate(parts), np.concatenate(labels), ids


def _read_text(
    root: Path, split: Split, num_points: int, seed: int, cache_dir: str | Path | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str], np.ndarray | None]:
    if num_points < 1:
        raise ValueError(f"num_points is {num_points}; expected at least 1")
    synsets = {}
    for number, line in read_lines(root / _CATEGORY_FILE):
        name, _, synset = line.partition("\t") if "\t" in line else line.partition(" ")
        if name not in CATEGORIES or not synset.strip():
            raise ValueError(
                f"{root / _CATEGORY_FILE}, line {number}: {line!r}; expected one of "
                f"{', '.join(CATEGORIES)} and its synset"
            )
        synsets[synset.strip()] = CATEGORIES.index(name)
    files: list[tuple[int, Path]] = []
    for name in ("train", "val") if split == "train" else ("test",):
        listed = root / _SPLITS.format(name)
        for entry in json.loads(read_text(listed)):
            synset, shape = str(entry).split("/")[-2:]
            if synset not in synsets:
                raise ValueError(f"{listed} names {entry!r}, whose category {_CATEGORY_FILE} does not")
            files.append((synsets[synset], root / synset / f"{shape}.txt"))
    files.sort(key=lambda item: (item[0], item[1].name))

    def read() -> np.ndarray:
        """[n, N + 1, 7]: coordinates, normal, part; below each how many points are its own."""
        rows = np.zeros((len(files), num_points + 1, 7), dtype=np.float32)
        for row, (_, path) in zip(rows, files, strict=True):
            cloud = read_labelled(path)
            if cloud.normals is None or cloud.labels is None:
                raise ValueError(f"{path}: expected x y z, a unit normal and a part on each line")
            drawn = draws(seed, f"{path.parent.name}/{path.stem}").permutation(len(cloud.points))
            order, row[num_points, 0] = padded(drawn, num_points)
            row[:num_points] = np.column_stack(
                [cloud.points[order], cloud.normals[order], cloud.labels[order]]
            )
        return rows

    made = cached_array(
        cache_dir, f"shapenetpart1-{split}-{num_points}-{seed}", [path for _, path in files], read
    )
    labels = np.array([label for label, _ in files], dtype=np.int64)
    ids = [f"{split}/{CATEGORIES[label]}/{path.stem}" for label, path in files]
    lengths = made[:, num_points, 0].astype(np.int64)
    made = made[:, :num_points]
    short = lengths if (lengths < num_points).any() else None
    return made[..., :3], made[..., 3:6], made[..., 6].astype(np.int64), labels, ids, short
