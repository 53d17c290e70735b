"""Tables with objects on them, seen by a depth camera: labelled points beside the camera's own picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pointcmt.data.dataset import PointDataset, Split, StoredViews, check_split, padded
from pointcmt.data.h5 import read_datasets
from pointcmt.data.modelnet_off import draws
from pointcmt.data.registry import register_dataset

CLASSES = ("table", "object")

_FILE = "mosd_stride4.h5"
_DATASETS = {
    "xyz_mm": (4, "i"), "label": (3, "u"), "color_jpeg": (1, "O"), "split": (1, "i"), "name": (1, "S"),
}  # fmt: skip
# pixel = 525 · (x, y) / z + (319.5, 239.5), which fits all of the file's points within 0.55 pixels
_FOCAL, _WIDTH, _HEIGHT, _STRIDE = 525.0, 640, 480, 4
_FIRST_OBJECT = 20  # labels below are the table's planes


@register_dataset("depth_tables", matches=lambda root: (root / _FILE).is_file(), layout=_FILE, up="y")
class DepthTables(PointDataset):
    """107 frames of a depth camera that looks at a table with objects (the set's own split, 45 and 62).

    The cloud is N of the frame's measured points, drawn by ``seed`` and the frame's name, without scale and
    place: in the unit sphere, x to the right, y up, z towards the camera. Points are of the table or of an
    object. ``colors`` are the picture's at the point's pixel, and ``stored_views`` has the picture itself
    with its camera: real images, with where each point is in them.

    Args:
        root: folder of ``mosd_stride4.h5``.
        split: ``"train"`` or ``"test"``.
        num_points: N.
        seed: draws points.

    Raises:
        FileNotFoundError, OSError, ValueError: no such file, or a damaged one.
    """

    def __init__(self, root: str | Path, split: Split, num_points: int = 2048, *, seed: int = 0) -> None:
        from PIL import Image

        check_split(split)
        if num_points < 1:
            raise ValueError(f"num_points is {num_points}; expected at least 1")
        path = Path(root) / _FILE
        arrays, _ = read_datasets(path, _DATASETS)
        pack = dict(zip(_DATASETS, arrays, strict=True))
        rows = np.flatnonzero(pack["split"] == (split == "test"))
        names = [pack["name"][row].decode() for row in rows]
        points = np.empty((len(rows), num_points, 3), dtype=np.float32)
        colors = np.empty_like(points)
        labels = np.empty((len(rows), num_points), dtype=np.int64)
        lengths = np.empty(len(rows), dtype=np.int64)
        pictures = np.empty((len(rows), 1, 3, _HEIGHT // 2, _WIDTH // 2), dtype=np.uint8)
        cameras = np.tile(np.eye(4, dtype=np.float32), (len(rows), 1, 1, 1))
        for k, row in enumerate(rows):
            picture = Image.open(io.BytesIO(bytes(pack["color_jpeg"][row]))).convert("RGB")
            if picture.size != (_WIDTH, _HEIGHT):
                raise ValueError(f"{path}, {names[k]}: the picture is {picture.size}; expected 640 × 480")
            line, column = np.nonzero(pack["xyz_mm"][row].any(-1))
            if not len(line):
                raise ValueError(f"{path}, {names[k]}: no pixel has a depth")
            order, lengths[k] = padded(draws(seed, names[k]).permutation(len(line)), num_points)
            line, column = line[order], column[order]
            measured = pack["xyz_mm"][row][line, column].astype(np.float32) / 1000
            centre = measured.mean(0)
            radius = float(np.linalg.norm(measured - centre, axis=1).max()) or 1.0
            points[k] = (measured - centre) / radius * np.array([1, -1, -1], dtype=np.float32)
            half = _STRIDE // 2
            colors[k] = np.asarray(picture)[_STRIDE * line + half, _STRIDE * column + half] / 255
            labels[k] = pack["label"][row][line, column] >= _FIRST_OBJECT
            pictures[k, 0] = np.asarray(picture.resize((_WIDTH // 2, _HEIGHT // 2))).transpose(2, 0, 1)
            # back to the camera's axes and metres
            cameras[k, 0, :3, :3] = radius * np.diag([1, -1, -1])
            cameras[k, 0, :3, 3] = centre
        projection = np.zeros((4, 4), dtype=np.float32)
        projection[0, 0], projection[1, 1] = 2 * _FOCAL / _WIDTH, 2 * _FOCAL / _HEIGHT
        projection[2, 2] = projection[3, 2] = 1
        super().__init__(
            points,
            np.zeros(len(rows), dtype=np.int64),
            ["frame"],
            [f"{split}/frame/{name.replace('/', '-')}" for name in names],
            source_index=rows,
            up="y",
            part_names=CLASSES,
            point_labels=labels,
            colors=colors,
            lengths=lengths if (lengths < num_points).any() else None,
        )
        self.stored_views = StoredViews(pictures, cameras, np.tile(projection, (len(rows), 1, 1, 1)))
        self.root, self.split = Path(root), split
