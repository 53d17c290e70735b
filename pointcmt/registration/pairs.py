"""Pairs of clouds with the motion between them: made from shapes by the published protocols, or real scans.

Throughout ``target ≈ source @ rotation.T + translation``: the motion takes the source to the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import h5py
import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from pointcmt.data import PointDataset, subset

Protocol = Literal["prnet", "independent", "rpmnet"]
Crop = Callable[[np.ndarray], np.ndarray]
"""Points [N, 3] → [N]; a crop keeps the points of the least values."""

FAR = 500.0
"""How far away the far point of a crop is; PRNet's public code."""
KEPT_FAR = 0.75
"""Part of the points that a far-point crop keeps: 768 of 1024."""
KEPT_HALF_SPACE = 0.7
"""Part of the points that a half-space crop keeps; RPMNet's public code. 717 of 1024."""
CLIP = 0.05
"""Largest noise on a coordinate, in the units of the unit sphere; all public codes."""
OVERLAP_DISTANCE = 0.05
"""Default of :func:`measured_overlap`, in the units of the unit sphere."""


class Pair(NamedTuple):
    """Two clouds and the motion between them, in numpy.

    Attributes:
        source: float32 [N, 3].
        target: float32 [M, 3].
        rotation: float32 [3, 3] and
        translation: float32 [3], with ``target ≈ source @ rotation.T + translation``.
        overlap: part of the source's points whose place the target shows too. Made pairs: exact, whether
            or not the target has a point just there; files of pairs: what the file says.
        label: class of the shape; -1 where there is none.
        name: what the pair is of.
    """

    source: np.ndarray
    target: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray
    overlap: float
    label: int = -1
    name: str = ""


class PairBatch(NamedTuple):
    """B pairs of equally many points, as tensors; the fields are those of :class:`Pair`.

    ``labels`` and ``index`` are int64 [B]; ``index`` are the rows of the shapes.
    """

    source: Tensor
    target: Tensor
    rotation: Tensor
    translation: Tensor
    overlap: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no batch needs

    def to(self, device: torch.device | str) -> PairBatch:
        """A copy on ``device``."""
        return PairBatch(*(value.to(device) for value in self))


@dataclass(frozen=True)
class PairOptions:
    """How a shape becomes a pair of clouds."""

    protocol: Protocol = "independent"
    """prnet: both clouds lose what is farthest from one far point, in their own frames: 95 % overlap, easy.
    independent: each from its own far point, and each sampled by itself. rpmnet: each cut by its own
    half-space."""
    sampled_twice: bool | None = None
    """Whether the clouds are two samples of the shape, as of two scans, or hold the very same points;
    default: as the protocol says."""
    noise: float = 0.0
    """Standard deviation of the noise on coordinates (clipped at 0.05), drawn for each cloud."""
    rotation: float = 45.0
    """Largest rotation in degrees. Up to 90: three Euler angles between 0 and this; above: about any axis."""
    translation: float = 0.5
    """Largest translation along each axis, in the units of the unit sphere."""
    pair_points: int = 1024
    """Points of a shape before the crop."""

    def __post_init__(self) -> None:
        if self.protocol not in ("prnet", "independent", "rpmnet"):
            raise ValueError(f"protocol {self.protocol!r}: expected prnet, independent or rpmnet")
        if self.noise < 0 or self.translation < 0 or not 0 <= self.rotation <= 180 or self.pair_points < 8:
            raise ValueError(
                f"noise {self.noise}, translation {self.translation}, rotation {self.rotation}, "
                f"pair_points {self.pair_points}: expected noise and translation of 0 or more, a rotation in "
                "0 … 180, and at least 8 points"
            )

    @property
    def twice(self) -> bool:
        """Whether the two clouds are samples of their own."""
        return self.protocol == "independent" if self.sampled_twice is None else self.sampled_twice

    def describe(self) -> str:
        """The protocol in words, to print beside a figure."""
        crop = {
            "prnet": "one far point for both clouds, each in its own frame, 0.75 kept",
            "independent": "a far point for each cloud, 0.75 kept",
            "rpmnet": "a half-space for each cloud, 0.70 kept",
        }[self.protocol]
        samples = "sampled twice" if self.twice else "the same points in both"
        angles = "Euler angles" if self.rotation <= 90 else "an angle about any axis"
        return (
            f"{self.protocol}: {self.pair_points} points, {samples}; {crop}; {angles} up to "
            f"{self.rotation:g} degrees, translation up to {self.translation:g}, noise {self.noise:g} "
            f"(clipped at {CLIP:g})"
        )


class ShapePairs:
    """Pairs made of the shapes of a data set, one per shape.

    The order of things is that of the public codes: N points of the shape, the source; the target is the
    source moved (prnet, rpmnet: the same points; sampled twice: other points of the shape); each cloud is
    shuffled, given noise, cropped.

    - ``prnet`` (WangYueFt/prnet, jiahaowork/idam, CMIGNet): the far point is U[0,1]³ ± 500·(1,1,1), the same
      coordinates for both clouds in their own frames; the 0.75·N points nearest to it stay.
    - ``independent``: the far point of each cloud lies in any direction, drawn for each.
    - ``rpmnet`` (yewzijian/RPMNet): each keeps the 0.7·N points on one side of a plane of any direction. (Its
      public code crops before it moves and adds noise after; the clouds are alike.)

    Clouds are sampled twice from ``view_points`` where the set has at least 2 N of them, so that no point is
    in both; else from what there is: then N is at most half of the points there are.

    Args:
        dataset: shapes in the unit sphere.
        options: the protocol.
        seed: draws everything. Pair i follows from (seed, i) alone, so a test set is the same whatever the
            batches are; with ``epoch`` from (seed, epoch, i): new pairs in each epoch of training.

    Raises:
        ValueError: the shapes have too few points.
    """

    def __init__(self, dataset: PointDataset, options: PairOptions, seed: int = 0) -> None:
        self.dataset, self.options, self.seed = dataset, options, seed
        self.labels = dataset.labels
        dense = dataset.view_points
        self._clouds = (
            dense
            if dense.shape[1] >= max(dataset.num_points, 2 * options.pair_points)
            else (dataset.points[..., :3])
        )
        available = self._clouds.shape[1]
        self.count = min(options.pair_points, available // 2 if options.twice else available)
        if self.count < 8:
            raise ValueError(f"shapes of {available} points are too few for pairs of clouds; expected 16")

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def kept(self) -> int:
        """Points of each cloud after the crop."""
        part = KEPT_HALF_SPACE if self.options.protocol == "rpmnet" else KEPT_FAR
        return round(part * self.count)

    def pair(self, index: int, epoch: int | None = None) -> Pair:
        """The pair made of shape ``index``; another one for each ``epoch``, the same always without."""
        index = range(len(self))[index]
        key = [self.seed, index] if epoch is None else [self.seed, index, epoch + 1]
        random = np.random.default_rng(key)
        options = self.options
        cloud = self._clouds[index].astype(np.float64)
        rotation, translation = draw_motion(random, options.rotation, options.translation)
        drawn = random.permutation(len(cloud))
        source = cloud[drawn[: self.count]]
        other = cloud[drawn[self.count : 2 * self.count]] if options.twice else source
        target = other @ rotation.T + translation
        source, target = random.permutation(source), random.permutation(target)
        noisy = [self._noise(points, random) for points in (source, target)]
        if options.protocol == "rpmnet":
            crops = [half_space(direction(random)) for _ in noisy]
        elif options.protocol == "prnet":
            crops = [from_far_point(random.uniform(0, 1, 3) + FAR * random.choice([-1, 1]))] * 2
        else:
            crops = [from_far_point(FAR * direction(random)) for _ in noisy]
        scores = [crop(points) for crop, points in zip(crops, noisy, strict=True)]
        kept = [np.sort(np.argpartition(score, self.kept - 1)[: self.kept]) for score in scores]
        # the places of the source that the target shows: exact also where the two have no point in common
        shown = crops[1](source[kept[0]] @ rotation.T + translation) <= scores[1][kept[1]].max() + 1e-9
        return Pair(
            noisy[0][kept[0]].astype(np.float32),
            noisy[1][kept[1]].astype(np.float32),
            rotation.astype(np.float32),
            translation.astype(np.float32),
            float(shown.mean()),
            int(self.dataset.labels[index]),
            self.dataset.shape_ids[index],
        )

    def complete(self, rows: Sequence[int] | np.ndarray | range) -> Tensor:
        """The whole clean shapes, float32 [B, L, 3], in the frame of the source."""
        return torch.from_numpy(np.ascontiguousarray(self._clouds[np.asarray(rows, dtype=np.int64)]))

    def batch(self, rows: Sequence[int] | np.ndarray, epoch: int | None = None) -> PairBatch:
        """The pairs of some shapes, together."""
        return collate([self.pair(int(row), epoch) for row in rows], rows)

    def _noise(self, points: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if not self.options.noise:
            return points
        return points + np.clip(self.options.noise * random.standard_normal(points.shape), -CLIP, CLIP)


def collate(pairs: Sequence[Pair], rows: Sequence[int] | np.ndarray) -> PairBatch:
    """Pairs of equally many points as one batch."""

    def together(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(np.stack([getattr(pair, name) for pair in pairs]), dtype=dtype)

    return PairBatch(
        together("source"),
        together("target"),
        together("rotation"),
        together("translation"),
        together("overlap"),
        together("label", torch.int64),
        torch.as_tensor(np.asarray(rows), dtype=torch.int64),
    )


def draw_motion(
    random: np.random.Generator, degrees: float, translation: float
) -> tuple[np.ndarray, np.ndarray]:
    """A rotation [3, 3] and a translation [3] as the protocols draw them.

    Up to 90 degrees ``Rx·Ry·Rz`` with each angle in U[0, degrees] (DCP, PRNet, IDAM, RPMNet: one-sided);
    above, any axis and an angle in U[0, degrees] (GMCNet, DeepGMR). The translation is
    U[-translation, translation]³.
    """
    if degrees <= 90:
        x, y, z = random.uniform(0, degrees, 3)
        rotation = Rotation.from_euler("zyx", [z, y, x], degrees=True).as_matrix()
    else:
        angle = np.radians(random.uniform(0, degrees))
        rotation = Rotation.from_rotvec(angle * direction(random)).as_matrix()
    return rotation, random.uniform(-translation, translation, 3)


def direction(random: np.random.Generator) -> np.ndarray:
    """A unit vector [3], all directions alike."""
    vector = random.standard_normal(3)
    return vector / np.linalg.norm(vector)


def from_far_point(far: np.ndarray) -> Crop:
    """The crop that keeps the points nearest to a place far away."""
    # ‖p − far‖ to full precision: squares of 500 would leave nine digits of a coordinate
    length = np.linalg.norm(far)
    return lambda points: (points**2).sum(1) / (2 * length) - points @ (far / length)


def half_space(along: np.ndarray) -> Crop:
    """The crop that keeps the points farthest along a direction."""
    return lambda points: -(points @ along)


def measured_overlap(
    source: np.ndarray,
    target: np.ndarray,
    rotation: np.ndarray,
    translation: np.ndarray,
    distance: float = OVERLAP_DISTANCE,
) -> float:
    """Part of the source's points that have a point of the aligned target within ``distance``."""
    if len(source) == 0 or len(target) == 0:
        return 0.0
    near, _ = cKDTree(target).query(source @ rotation.T + translation, distance_upper_bound=distance)
    return float(np.isfinite(near).mean())


def category_halves(dataset: PointDataset) -> tuple[PointDataset, PointDataset]:
    """The shapes of the first half of the labels, and those of the second: seen and unseen categories.

    ModelNet40: 0-19 (airplane … lamp) and 20-39 (laptop … xbox), as PRNet, IDAM, RPMNet and CMIGNet split it.

    Raises:
        ValueError: fewer than two classes.
    """
    if dataset.num_classes < 2:
        raise ValueError(f"{dataset.num_classes} class cannot be split into seen and unseen categories")
    first = dataset.labels < dataset.num_classes // 2
    return subset(dataset, first), subset(dataset, ~first)


class PairBatches:
    """Batches of a :class:`ShapePairs`, for a training loop.

    Args:
        pairs: the pairs.
        batch_size: over all processes.
        device: of the batches.
        seed: of the order, which then changes with each epoch as the pairs do, and the last batch that is not
            full is left out; None keeps the order and the pairs, and all batches.
        rank, world: this process and the number of them.
    """

    def __init__(
        self,
        pairs: ShapePairs,
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.n = len(pairs)
        if batch_size < 1 or self.n == 0:
            raise ValueError(f"batches of {batch_size} out of {self.n} pairs: expected at least 1 of each")
        self.pairs, self.seed, self.rank, self.world = pairs, seed, rank, world
        self.device = torch.device(device)
        self.batch_size = min(batch_size, self.n)
        if seed is not None and self.batch_size < 2 * world:
            raise ValueError(
                f"a training batch of {self.batch_size} over {world} process(es) leaves fewer than two pairs "
                "to each, and the contrastive loss needs two: use a larger --batch-size or more shapes"
            )

    def __len__(self) -> int:
        return self.n // self.batch_size if self.seed is not None else -(-self.n // self.batch_size)

    def epoch(self, epoch: int = 0) -> Iterator[PairBatch]:
        """This process's part of every batch of one epoch."""
        order = np.arange(self.n)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        for number in range(len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size][self.rank :: self.world]
            if len(rows):
                yield self.pairs.batch(rows, None if self.seed is None else epoch).to(self.device)


class ThreeDMatchPairs:
    """The pairs of 3DMatch or 3DLoMatch in one HDF5 file.

    Its layout: ``fragments/<scene>/<n>`` int16 [N, 3], metres after times the file's attribute ``scale``;
    groups ``3DMatch`` and ``3DLoMatch`` with ``scene`` (index into ``scenes``), ``ij``, ``T_j_to_i`` and
    ``overlap``. Source is fragment j, target fragment i.

    Args:
        path: the file.
        group: ``3DMatch`` (overlap of at least 0.3) or ``3DLoMatch`` (0.1 to 0.3).
        consecutive: keep the pairs of neighbouring fragments, which the benchmark's recall leaves out.

    Raises:
        FileNotFoundError, ValueError: no such file, or another layout.
    """

    def __init__(self, path: str | Path, group: str = "3DMatch", consecutive: bool = False) -> None:
        self.path = Path(path)
        with _h5(self.path) as file:
            if group not in file or "fragments" not in file:
                raise ValueError(f"{path} has no groups {group!r} and 'fragments'; it has {sorted(file)}")
            self.scenes = [name.decode() for name in file["scenes"][:]]
            self.scale = float(file.attrs["scale"])
            keep = np.ones(len(file[group]["ij"]), dtype=bool)
            self.ij = file[group]["ij"][:].astype(int)
            if not consecutive:
                keep = np.abs(self.ij[:, 0] - self.ij[:, 1]) > 1
            self.ij = self.ij[keep]
            self.scene = file[group]["scene"][:][keep].astype(int)
            self.motion = file[group]["T_j_to_i"][:][keep]
            self.overlap = file[group]["overlap"][:][keep]

    def __len__(self) -> int:
        return len(self.ij)

    def pair(self, index: int) -> Pair:
        """Pair ``index``; its overlap is the benchmark's own figure."""
        scene = self.scenes[self.scene[index]]
        i, j = self.ij[index]
        with _h5(self.path) as file:
            clouds = [file[f"fragments/{scene}/{n}"][:].astype(np.float32) * self.scale for n in (j, i)]
        motion = self.motion[index]
        return Pair(
            clouds[0],
            clouds[1],
            motion[:3, :3].astype(np.float32),
            motion[:3, 3].astype(np.float32),
            float(self.overlap[index]),
            name=f"{scene}: {j} to {i}",
        )


class ScanPairs:
    """All ordered pairs of scans of one thing with known poses, as of the Stanford bunny, in one HDF5 file.

    Its layout: ``order``, the scans' names; ``<scan>/points`` [N, 3] in the scanner's frame, ``<scan>/pose``
    [4, 4] scan to common frame; ``overlap`` [n, n], the part of scan j that is near scan i. Source is scan j,
    target scan i.

    Args:
        path: the file.
        least_overlap: leave out pairs that overlap less; 0 keeps all n·(n - 1).
    """

    def __init__(self, path: str | Path, least_overlap: float = 0.0) -> None:
        self.path = Path(path)
        with _h5(self.path) as file:
            if "order" not in file or "overlap" not in file:
                raise ValueError(f"{path} has no 'order' and 'overlap'; it has {sorted(file)}")
            self.scans = [name.decode() for name in file["order"][:]]
            overlap = file["overlap"][:]
            self.clouds = [file[scan]["points"][:].astype(np.float32) for scan in self.scans]
            self.poses = [file[scan]["pose"][:] for scan in self.scans]
        every = [(i, j) for i in range(len(self.scans)) for j in range(len(self.scans)) if i != j]
        self.ij = [(i, j) for i, j in every if overlap[i, j] >= least_overlap]
        self.overlap = [float(overlap[i, j]) for i, j in self.ij]

    def __len__(self) -> int:
        return len(self.ij)

    def pair(self, index: int) -> Pair:
        """Pair ``index``, at full resolution."""
        i, j = self.ij[index]
        motion = np.linalg.inv(self.poses[i]) @ self.poses[j]
        return Pair(
            self.clouds[j],
            self.clouds[i],
            motion[:3, :3].astype(np.float32),
            motion[:3, 3].astype(np.float32),
            self.overlap[index],
            name=f"{self.scans[j]} to {self.scans[i]}",
        )


def _h5(path: Path) -> h5py.File:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; expected an HDF5 file of pairs")
    return h5py.File(path)
