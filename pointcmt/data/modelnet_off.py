"""ModelNet as the meshes first published (``ModelNet40/<class>/{train,test}/*.off``)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pointcmt.data.array_cache import cached_array
from pointcmt.data.dataset import Split

LAYOUT = "meshes: <class>/train/*.off, <class>/test/*.off"
FOLDERS = ("ModelNet40", "ModelNet10")
NORMALIZE = True


def matches(folder: Path) -> bool:
    return any(next(folder.glob(f"*/{split}/*.off"), None) for split in ("train", "test"))


class Listing:
    """Names and labels of one split, sorted by name; :meth:`read` samples the surfaces."""

    available = 1 << 31  # a surface never runs out of points

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder = folder
        self.class_names = sorted(path.name for path in folder.iterdir() if (path / split).is_dir())
        found = [sorted((folder / name / split).glob("*.off")) for name in self.class_names]
        self.paths = [path for paths in found for path in paths]
        if not self.paths:
            raise FileNotFoundError(f"{folder} has no <class>/{split}/*.off")
        self.labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found])
        self.shape_ids = [path.stem for path in self.paths]

    def read(
        self, rows: np.ndarray, num_points: int, *, normals: bool, seed: int, cache_dir: str | Path | None
    ) -> np.ndarray:
        """``num_points`` uniform surface points of the meshes ``rows``: float32 [n, N, 3 or 6]."""
        paths = [self.paths[row] for row in rows]

        def sample() -> np.ndarray:
            clouds = np.empty((len(paths), num_points, 6 if normals else 3), dtype=np.float32)
            for cloud, path in zip(clouds, paths, strict=True):
                cloud[:] = sample_mesh(path, num_points, seed)[:, : cloud.shape[1]]
            return clouds

        return cached_array(cache_dir, f"meshes-{num_points}-{6 if normals else 3}-{seed}", paths, sample)


def sample_mesh(path: Path, num_points: int, seed: int) -> np.ndarray:
    """Points drawn uniformly on the surface of a mesh file, with face normals: float32 [num_points, 6].

    The draw depends on the seed and the file's name alone, not on which other files are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a mesh, or its surface has no area.
    """
    import trimesh  # slow to import, and only meshes need it

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        mesh = trimesh.load_mesh(path, process=False)
        area = float(mesh.area)
    except Exception as error:  # trimesh raises what its parsers happen to raise
        raise ValueError(
            f"{path} cannot be read as a mesh ({type(error).__name__}: {error}); download it again"
        ) from error
    if not (np.isfinite(area) and area > 0):
        raise ValueError(f"{path} has a surface of area {area}; nothing can be sampled on it")
    name = int.from_bytes(hashlib.sha256(path.stem.encode()).digest()[:8], "little")
    generator = np.random.default_rng([seed, name])
    points, faces = trimesh.sample.sample_surface(mesh, num_points, seed=generator)
    return np.concatenate([points, mesh.face_normals[faces]], axis=1).astype(np.float32)
