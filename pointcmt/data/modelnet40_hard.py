"""ModelNet40Hard: CAD shapes made as hard as scans, after ScanObjectNN's PB_T50_RS."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pointcmt.data.array_cache import cached_array
from pointcmt.data.checks import Up, guess_up
from pointcmt.data.dataset import PointDataset, Split
from pointcmt.data.modelnet40 import ModelNet40
from pointcmt.data.registry import register_dataset

_TRIES = 50  # own choice; few shapes need more than some draws of the box
_VERSION = 1  # to be raised when the shapes come out otherwise, so that kept files are made anew


@register_dataset("modelnet40hard", layout="as modelnet40; made on the fly with --dataset modelnet40hard")
class ModelNet40Hard(PointDataset):
    """ModelNet40 with every shape turned, in clutter, and cut out by a box that misses it by half.

    ScanObjectNN's hardest variant cuts objects out of scanned rooms by perturbed boxes (T50: shifted by up
    to half the size; R: turned; S: scaled), so that parts are lost and background comes in. Where those
    scans are not at hand, this makes the like of real CAD shapes. For each shape, in this order:

    1. R: it is turned about the vertical axis by any angle.
    2. It is put in a room: a floor under it, a wall behind it at a distance by chance, and at its side
       another shape of the same split, turned too and of 0.5 to 1 times its size. Floor and wall are as
       dense as the shape is on its bounding box.
    3. T50: its bounding box is shifted along each axis by U[-0.5, 0.5] of its size; S: and its sides
       scaled by U[0.75, 1.25], each on its own. What lies in the box is kept. The box is drawn again where
       less than ``min_visible`` of the shape would be left.
    4. N points are drawn from what is kept, without repetition where there are enough.
    5. The *box*, not the object, is centred, and the farthest point scaled to distance 1: the object
       is off-centre by up to half its size.

    From Uy et al. are what is done to the box (moved, turned, scaled), the half of T50, and that background
    comes in. Own choices, since CAD shapes stand in no room: the range of S; the turn about the vertical
    alone; floor, wall and neighbour, their distances, sizes and density; ``min_visible`` and that the box is
    drawn again; to centre and scale by the box.

    The draw of a shape depends on ``seed``, the split and its shape id alone: the test set is fixed for
    good, and so is the training set (as the files of PB_T50_RS are), whatever ``per_class`` is; only the
    neighbour is drawn from the shapes that were loaded.

    Args:
        root: folder of ModelNet40, in any of its forms.
        split: ``"train"`` or ``"test"``.
        num_points: N.
        per_class: as in :class:`ModelNet40`.
        seed: draws everything.
        min_visible: least part of a shape's points in its box.
        cache_dir: keeps what was made, so that only the first use is slow; None keeps nothing.
        up: as in :class:`ModelNet40`; shapes are turned, and stand, about it.

    Attributes:
        foreground: bool [n, N], which points belong to the object (as ScanObjectNN's ``mask`` tells).
        Further attributes are those of :class:`PointDataset`.

    Raises:
        What :class:`ModelNet40` raises; ValueError for ``min_visible`` outside (0, 0.5].
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        num_points: int = 1024,
        *,
        per_class: int | None = None,
        seed: int = 0,
        min_visible: float = 0.2,
        cache_dir: str | Path | None = None,
        up: Up | None = None,
    ) -> None:
        if not 0 < min_visible <= 0.5:
            raise ValueError(f"min_visible is {min_visible}; expected above 0, at most 0.5")
        clean = ModelNet40(root, split, None, per_class=per_class, seed=seed, cache_dir=cache_dir, up=up)
        if num_points < 1:
            raise ValueError(f"num_points is {num_points}; expected at least 1")
        # where the copy's axis is not known, the shapes' symmetries tell it
        up = clean.up or guess_up(clean.points, clean.labels).axis
        axes = [("xyz".index(up) + step) % 3 for step in (1, 2, 3)]  # two across, and up last

        def make() -> np.ndarray:
            """Coordinates, and 1 for the object's own points: [n, N, 4]."""
            made = np.empty((len(clean), num_points, 4), dtype=np.float32)
            for row, shape_id in enumerate(clean.shape_ids):
                # of the shape's own name, which is unique in ModelNet
                own_name = shape_id.rpartition("/")[2]
                name = int.from_bytes(hashlib.sha256(f"{split} {own_name}".encode()).digest()[:8], "little")
                generator = np.random.default_rng([seed, name])
                neighbour = clean.points[generator.integers(len(clean))]
                scene, own = _room(clean.points[row][:, axes], neighbour[:, axes], generator)
                cut, made[row, :, 3] = _cut(scene, own, num_points, min_visible, generator)
                made[row, :, axes] = cut.T
            return made

        key = f"hard{_VERSION}-{num_points}-{min_visible:g}-{seed}-{split}-{clean.fingerprint()[:16]}"
        made = cached_array(cache_dir, key, [], make)
        self.foreground = made[..., 3] > 0
        super().__init__(
            made[..., :3],
            clean.labels,
            clean.class_names,
            clean.shape_ids,
            source_index=clean.source_index,
            up=up,
        )
        self.root, self.split = clean.root, split


def _turned(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """About the z axis by any angle."""
    angle = generator.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def _room(shape: np.ndarray, neighbour: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """The shape, then a neighbour, floor and wall: float64 [m, 3]; and how many points are the shape's."""
    shape, neighbour = _turned(shape, generator), _turned(neighbour, generator)
    low, high = shape.min(0), shape.max(0)
    size = np.maximum(high - low, 1e-3)
    # at its side: at a random bearing, as far off as both reach, less a little or a gap
    bearing = generator.uniform(0, 2 * np.pi)
    neighbour = (neighbour - neighbour.mean(0)) * generator.uniform(0.5, 1.0)
    reach = np.linalg.norm(size[:2]) / 2 + np.linalg.norm(neighbour[:, :2], axis=1).max()
    place = (low + high)[:2] / 2 + generator.uniform(0.6, 1.0) * reach * np.array(
        [np.cos(bearing), np.sin(bearing)]
    )
    neighbour = neighbour + np.array([*place, low[2] - neighbour[:, 2].min()])

    box_area = 2 * (size[0] * size[1] + size[1] * size[2] + size[0] * size[2])
    density = len(shape) / box_area
    # the box can reach as far as half its size and half the growth of its sides beyond the shape
    from_, to = low - 0.65 * size, high + 0.65 * size
    extent = to - from_
    floor = from_ + extent * generator.random((round(density * extent[0] * extent[1]), 3))
    floor[:, 2] = low[2]
    wall = from_ + extent * generator.random((round(density * extent[0] * extent[2]), 3))
    wall[:, 1] = high[1] + generator.uniform(0.02, 0.6) * size[1]
    wall = wall[wall[:, 2] >= low[2]]
    return np.concatenate([shape, neighbour, floor, wall]), len(shape)


def _cut(
    scene: np.ndarray, own: int, num_points: int, min_visible: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points float64 [num_points, 3] in a perturbed box of the first ``own`` points, and which are those."""
    low, high = scene[:own].min(0), scene[:own].max(0)
    size = np.maximum(high - low, 1e-3)
    for _ in range(_TRIES):
        centre = (low + high) / 2 + generator.uniform(-0.5, 0.5, 3) * size
        half = size / 2 * generator.uniform(0.75, 1.25, 3)
        inside = (np.abs(scene - centre) <= half).all(1)
        if inside[:own].mean() >= min_visible:
            break
    else:  # a shape whose points are nearly all in corners: leave its box unshifted
        centre, inside = (low + high) / 2, (np.abs(scene - (low + high) / 2) <= size).all(1)
    rows = np.flatnonzero(inside)
    if len(rows) >= num_points:
        rows = generator.permutation(rows)[:num_points]
    else:  # every point once, then some again
        again = generator.choice(rows, num_points - len(rows))
        rows = generator.permutation(np.concatenate([rows, again]))
    points = scene[rows] - centre
    return points / np.linalg.norm(points, axis=1).max(), rows < own
