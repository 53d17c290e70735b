"""The Princeton shape benchmark (Shilane et al., SMI 2004): meshes by class paths, in one HDF5 pack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from pointcmt.data.array_cache import cached_array
from pointcmt.data.checks import Up
from pointcmt.data.dataset import PointDataset, Split, check_split, class_rows, in_unit_sphere
from pointcmt.data.h5 import read_datasets
from pointcmt.data.modelnet_off import draws, sample_surface
from pointcmt.data.registry import register_dataset

_FILE = "psb_meshes.h5"
_DATASETS = {
    "vertices_q": (2, "u"), "faces": (2, "u"), "vertex_offset": (1, "i"), "face_offset": (1, "i"),
    "lo": (2, "f"), "step": (1, "f"), "cls": (1, "S"), "split": (1, "i"), "id": (1, "i"),
}  # fmt: skip


def is_princeton(root: Path) -> bool:
    """Whether a folder holds the pack."""
    return (root / _FILE).is_file()


@register_dataset("princeton", matches=is_princeton, layout=_FILE)
class PrincetonShapes(PointDataset):
    """The Princeton shape benchmark, its official split into 907 training and 907 test meshes (less a few
    that the pack lacks), sampled uniformly on the surface and scaled into the unit sphere.

    Its classes are paths, such as ``vehicle/car/sedan``; of the finest only some are in both splits, so
    ``level`` says how many parts of the path count. Which axis is up differs from model to model.

    Args:
        root: folder of ``psb_meshes.h5``.
        split: ``"train"`` or ``"test"``, the official ones.
        num_points: N.
        level: parts of the class path, 1 (animal, building, …) to 4.
        shared: leave out classes that are not in both splits.
        normals: items are [N, 6] with the unit normals of the faces.
        normalize: scale into the unit sphere; False leaves the coordinates of the meshes.
        per_class, seed, dense_points, cache_dir, up: as in :class:`~pointcmt.data.ModelNet40`.

    Raises:
        FileNotFoundError, OSError: no such file, or a damaged one.
        ValueError: a value out of range, or a pack that contradicts itself.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        num_points: int = 1024,
        *,
        level: int = 2,
        shared: bool = True,
        normals: bool = False,
        normalize: bool = True,
        per_class: int | None = None,
        seed: int = 0,
        dense_points: int | None = None,
        cache_dir: str | Path | None = None,
        up: Up | None = None,
    ) -> None:
        check_split(split)
        if num_points < 1 or level < 1:
            raise ValueError(f"num_points {num_points} and level {level}: expected at least 1")
        path = Path(root) / _FILE
        pack, names, rows, labels = _listed(path, split, level, shared)
        if per_class is not None:
            chosen = class_rows(labels, per_class, seed)
            rows, labels = rows[chosen], labels[chosen]
        wanted = max(num_points, dense_points or 0)
        ids = [f"m{number}" for number in pack["id"][rows]]
        columns = 6 if normals else 3

        def sample() -> np.ndarray:
            clouds = np.empty((len(rows), wanted, columns), dtype=np.float32)
            for cloud, row, name in zip(clouds, rows, ids, strict=True):
                corners, faces = _mesh(path, pack, row)
                drawn = sample_surface(corners, faces, wanted, draws(seed, name), f"{path}, {name}")
                cloud[:] = drawn[:, :columns]
            return clouds

        settings = f"princeton1-{split}-{level}-{shared}-{per_class}-{wanted}-{seed}" + "-normals" * normals
        clouds = cached_array(cache_dir, settings, [path], sample)
        dense = clouds[..., :3] if dense_points else None
        points = clouds[:, :num_points]
        if normalize:
            points, dense = in_unit_sphere(points, dense)
        flat = [names[label].replace("/", "-") for label in labels]
        super().__init__(
            points,
            labels,
            names,
            [f"{split}/{name}/{shape}" for name, shape in zip(flat, ids, strict=True)],
            dense,
            rows,
            up=up,
        )
        self.root, self.split = Path(root), split


def meshes_of(
    root: Path, split: Split, level: int = 2, shared: bool = True
) -> dict[Path, Callable[[], tuple[np.ndarray, np.ndarray]]]:
    """``<split>/<class>/<name>`` of each mesh of a split, and what gives its vertices [n, 3] and triangles
    [m, 3]; names as in ``PrincetonShapes.shape_ids``.

    Args:
        root, split, level, shared: as of :class:`PrincetonShapes`.
    """
    path = root / _FILE
    pack, names, rows, labels = _listed(path, split, level, shared)
    return {
        Path(split, names[label].replace("/", "-"), f"m{pack['id'][row]}"): partial(_mesh, path, pack, row)
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True)
    }


def _listed(
    path: Path, split: Split, level: int, shared: bool
) -> tuple[dict[str, np.ndarray], list[str], np.ndarray, np.ndarray]:
    """The pack's arrays, the class names, and rows and labels of a split's meshes."""
    arrays, _ = read_datasets(path, _DATASETS)
    pack = dict(zip(_DATASETS, arrays, strict=True))
    classes = np.array(["/".join(name.decode().split("/")[:level]) for name in pack["cls"]])
    in_test = pack["split"] == 1
    names = sorted(set(classes[~in_test]) & set(classes[in_test]) if shared else set(classes))
    rows = np.flatnonzero((in_test == (split == "test")) & np.isin(classes, names))
    return pack, names, rows, np.searchsorted(names, classes[rows])


def _mesh(path: Path, pack: dict[str, np.ndarray], row: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [n, 3] and triangles [m, 3] of one mesh of the pack."""
    faces = pack["faces"][slice(*pack["face_offset"][row : row + 2])].astype(np.int64)
    corners = pack["vertices_q"][slice(*pack["vertex_offset"][row : row + 2])]
    corners = corners * float(pack["step"][row]) + pack["lo"][row]
    if len(faces) and faces.max() >= len(corners):
        raise ValueError(
            f"{path}, m{pack['id'][row]}: faces name vertices beyond the {len(corners)} there are"
        )
    return corners, faces
