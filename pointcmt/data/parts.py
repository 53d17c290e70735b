"""The labelled Princeton segmentation benchmark (Kalogerakis et al., SIGGRAPH 2010): shapes with parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pointcmt.data.checks import Up
from pointcmt.data.dataset import PointDataset, Split, check_split
from pointcmt.data.h5 import check_num_points, read_datasets
from pointcmt.data.registry import register_dataset

_FILE = "labeled_psb.h5"
_DATASETS = {
    "data": (3, "f"), "normal": (3, "f"), "pid": (2, "u"), "label": (2, "u"), "split_ours": (1, "i"),
    "id": (1, "i"), "categories": (1, "S"), "parts": (1, "S"),
}  # fmt: skip


@register_dataset("labeled_psb", matches=lambda root: (root / _FILE).is_file(), layout=_FILE)
class LabeledPSB(PointDataset):
    """380 shapes of 19 categories with people's part labels, as clouds of 2048 points in the unit sphere.

    The fields are those of ShapeNetPart's HDF5 files (``data``, ``label``, ``pid``). The set has no official
    split; the file's own takes the last 5 of 20 shapes of each category for the test.

    Args:
        root: folder of ``labeled_psb.h5``.
        split: ``"train"`` or ``"test"``.
        num_points: N; clouds give their first N points, which are independent draws.
        normals: keep the surface's normals (``dataset.normals``).
        up: the axis that points up, if it is known.

    Attributes:
        point_labels: int64 [n, N], which of ``part_names`` (``Category/part``) each point belongs to.
        category: int64 [n], as ``labels``.

    Raises:
        FileNotFoundError, OSError, ValueError: as the HDF5 reader; more points than there are.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        num_points: int = 2048,
        *,
        normals: bool = False,
        up: Up | None = None,
    ) -> None:
        check_split(split)
        path = Path(root) / _FILE
        arrays, available = read_datasets(path, _DATASETS)
        check_num_points(num_points, available, path)
        pack = dict(zip(_DATASETS, arrays, strict=True))
        rows = np.flatnonzero(pack["split_ours"] == (split == "test"))
        names = [name.decode() for name in pack["categories"]]
        parts = [name.decode() for name in pack["parts"]]
        labels = pack["label"][rows].reshape(-1).astype(np.int64)
        point_labels = pack["pid"][rows, :num_points]
        super().__init__(
            pack["data"][rows, :num_points],
            labels,
            names,
            [f"{split}/{names[k]}/{n}" for k, n in zip(labels, pack["id"][rows], strict=True)],
            source_index=rows,
            up=up,
            part_names=parts,
            point_labels=point_labels,
            category=labels,
            normals=pack["normal"][rows, :num_points] if normals else None,
        )
        self.root, self.split = Path(root), split
