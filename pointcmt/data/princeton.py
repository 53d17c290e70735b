"""The Princeton shape benchmark (Shilane et al., SMI 2004): meshes by class paths, in one HDF5 pack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

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
_COURSE = {"label69": (1, "i"), "names69": (1, "S")}


def mesh_of(pack: dict[str, np.ndarray], row: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices float32 [n, 3] and triangles int64 [m, 3] of one mesh of the pack.

    Raises:
        ValueError: faces that name vertices that are not there.
    """
    vertices = slice(*pack["vertex_offset"][row : row + 2])
    faces = pack["faces"][slice(*pack["face_offset"][row : row + 2])].astype(np.int64)
    corners = pack["vertices_q"][vertices] * float(pack["step"][row]) + pack["lo"][row]
    if len(faces) and faces.max() >= len(corners):
        raise ValueError(f"{where}: faces name vertices beyond the {len(corners)} there are")
    return corners, faces


def read_pack(root: str | Path, course: bool = False) -> tuple[Path, dict[str, np.ndarray]]:
    """The pack's file and its arrays; with ``course`` the 69 classes of a course too."""
    path, wanted = Path(root) / _FILE, {**_DATASETS, **(_COURSE if course else {})}
    arrays, _ = read_datasets(path, wanted)
    return path, dict(zip(wanted, arrays, strict=True))


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
        course: in place of the official classes the 36 of a university course's 69 that have at least three
            meshes in either split; other meshes are left out, and ``level`` and ``shared`` say nothing.
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
        course: bool = False,
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
        pack, names, rows, labels = _listed(path, split, level, shared, course)
        if per_class is not None:
            chosen = class_rows(labels, per_class, seed)
            rows, labels = rows[chosen], labels[chosen]
        wanted = max(num_points, dense_points or 0)
        ids = [f"m{number}" for number in pack["id"][rows]]
        columns = 6 if normals else 3

        def sample() -> np.ndarray:
            clouds = np.empty((len(rows), wanted, columns), dtype=np.float32)
            for cloud, row, name in zip(clouds, rows.tolist(), ids, strict=True):
                corners, faces = mesh_of(pack, row, f"{path}, {name}")
                drawn = sample_surface(corners, faces, wanted, draws(seed, name), f"{path}, {name}")
                cloud[:] = drawn[:, :columns]
            return clouds

        kind = "course" if course else f"{level}-{shared}"
        settings = f"princeton1-{split}-{kind}-{per_class}-{wanted}-{seed}" + "-normals" * normals
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


def _register(name: str, **fixed: Any) -> None:
    """``--dataset name``: the benchmark with some of its arguments fixed."""

    @register_dataset(name, layout=_FILE)
    @wraps(PrincetonShapes)  # its parameters are those that the options go by
    def build(*args: Any, **options: Any) -> PrincetonShapes:
        return PrincetonShapes(*args, **(options | fixed))


_register("princeton36", course=True)
_register("princeton-coarse", level=1)  # animal, building, furniture …


def meshes_of(
    root: Path, split: Split, level: int = 2, shared: bool = True, course: bool = False
) -> dict[Path, Callable[[], tuple[np.ndarray, np.ndarray]]]:
    """``<split>/<class>/<name>`` of each mesh of a split, and what gives its vertices [n, 3] and triangles
    [m, 3]; names as in ``PrincetonShapes.shape_ids``.

    Args:
        root, split, level, shared, course: as of :class:`PrincetonShapes`.
    """
    path = root / _FILE
    pack, names, rows, labels = _listed(path, split, level, shared, course)
    return {
        Path(split, names[label].replace("/", "-"), f"m{pack['id'][row]}"): partial(
            mesh_of, pack, row, f"{path}, m{pack['id'][row]}"
        )
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True)
    }


def _listed(
    path: Path, split: Split, level: int, shared: bool, course: bool
) -> tuple[dict[str, np.ndarray], list[str], np.ndarray, np.ndarray]:
    """The pack's arrays, the class names, and rows and labels of a split's meshes."""
    pack = read_pack(path.parent, course)[1]
    in_test = pack["split"] == 1
    if course:
        known, course_names = pack["label69"], [name.decode() for name in pack["names69"]]
        classes = np.array(["" if label < 0 else course_names[label] for label in known])
        names = [
            name
            for name in sorted(course_names)
            if min((classes[~in_test] == name).sum(), (classes[in_test] == name).sum()) >= 3
        ]
    else:
        classes = np.array(["/".join(name.decode().split("/")[:level]) for name in pack["cls"]])
        names = sorted(set(classes[~in_test]) & set(classes[in_test]) if shared else set(classes))
    rows = np.flatnonzero((in_test == (split == "test")) & np.isin(classes, names))
    return pack, names, rows, np.searchsorted(names, classes[rows])
