"""ModelNet as the meshes first published (``ModelNet40/<class>/{train,test}/*.off``)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pointcmt.data.array_cache import cached_array
from pointcmt.data.checks import Up
from pointcmt.data.dataset import Split
from pointcmt.data.files import is_junk
from pointcmt.views.mesh_files import read_mesh

LAYOUT = "meshes: <class>/train/*.off, <class>/test/*.off"
FOLDERS = ("ModelNet40", "ModelNet10")
NORMALIZE = True


def matches(folder: Path) -> bool:
    return any(_meshes(folder, split) for split in ("train", "test"))


def _meshes(folder: Path, split: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(f"*/{split}/*")
        if path.suffix.lower() == ".off" and not is_junk(path.relative_to(folder))
    )


class Listing:
    """Names and labels of one split, sorted by name; :meth:`read` samples the surfaces."""

    available = 1 << 31  # a surface never runs out of points
    up: Up = "z"

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder = folder
        # classes of both splits together: one that is absent from a split keeps its number
        found = {name: _meshes(folder, name) for name in ("train", "test")}
        self.paths = found[split]
        if not self.paths:
            raise FileNotFoundError(f"{folder} has no <class>/{split}/*.off")
        self.class_names = sorted({path.parts[-3] for paths in found.values() for path in paths})
        self.labels = np.array([self.class_names.index(path.parts[-3]) for path in self.paths])
        self.names = [path.stem for path in self.paths]

    def read(
        self, rows: np.ndarray, num_points: int, *, normals: bool, seed: int, cache_dir: str | Path | None
    ) -> np.ndarray:
        """``num_points`` uniform surface points of the meshes ``rows``: float32 [n, N, 3 or 6]."""
        paths = [self.paths[row] for row in rows]

        def sample() -> np.ndarray:
            clouds = np.empty((len(paths), num_points, 6 if normals else 3), dtype=np.float32)
            for cloud, path in zip(clouds, paths, strict=True):
                name = path.relative_to(self.folder).as_posix()
                cloud[:] = sample_mesh(path, num_points, draws(seed, name))[:, : cloud.shape[1]]
            return clouds

        return cached_array(cache_dir, f"meshes2-{num_points}-{6 if normals else 3}-{seed}", paths, sample)


def draws(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on a seed and a shape's name alone, not on which others are read."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def sample_mesh(path: Path, num_points: int, generator: np.random.Generator) -> np.ndarray:
    """Points drawn uniformly on the surface of a mesh file, with face normals: float32 [num_points, 6].

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a mesh, or its surface has no area.
    """
    return sample_surface(*read_mesh(path), num_points, generator, path)


def sample_surface(
    vertices: np.ndarray,
    faces: np.ndarray,
    num_points: int,
    generator: np.random.Generator,
    where: Path | str,
) -> np.ndarray:
    """Points drawn uniformly on a surface, with face normals: float32 [num_points, 6].

    Raises:
        ValueError: the surface has no area; ``where`` names it.
    """
    import trimesh  # slow to import, and only meshes need it

    mesh = trimesh.Trimesh(vertices, faces, process=False)
    area = float(mesh.area)
    if not (np.isfinite(area) and area > 0):
        raise ValueError(f"{where} has a surface of area {area}; nothing can be sampled on it")
    points, index = trimesh.sample.sample_surface(mesh, num_points, seed=generator)
    return np.concatenate([points, mesh.face_normals[index]], axis=1).astype(np.float32)
