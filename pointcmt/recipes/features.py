"""Teacher features on disk: built when absent, opened when there, refused when stale."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pointcmt.data import Augmentation, FeatureCache, MultiViewImages, PointDataset, shuffle
from pointcmt.data.dataset import Split
from pointcmt.recipes.engine import Batches, MachineOptions, make_accelerator
from pointcmt.recipes.options import DataOptions, Splits, load_teacher, matching_images, views_of_teacher
from pointcmt.recipes.progress import console, say
from pointcmt.recipes.run import run_config_beside
from pointcmt.teacher import ImageTeacher
from pointcmt.types import TeacherOutput


@dataclass
class CacheFeatures:
    """Compute the teacher's features of all shapes once, for train-generator and train."""

    teacher: Path
    """The teacher: its run folder or its .safetensors file."""
    out: Path | None = None
    """Folder of the features; default: features/ beside the teacher."""
    data: DataOptions = field(default_factory=DataOptions)
    images: Path | None = None
    """Folder of images, for a teacher that was trained on images."""
    draws: int = 0
    """Also of so many augmented copies of each training shape, for train --draws."""
    augment_scale: float = 1.5
    """The copies' stretch, as of train."""
    augment_shift: float = 0.2
    """The copies' shift, as of train."""
    batch_size: int = 32
    """Shapes at once."""
    machine: MachineOptions = field(default_factory=MachineOptions)


def cache_features(options: CacheFeatures) -> dict[str, Any]:
    """Build the caches of the training, held-out and test shapes; returns their paths."""
    if options.draws < 0:
        raise ValueError(f"--draws is {options.draws}; expected 0 or more")
    change = Augmentation.of(options.augment_scale, options.augment_shift)
    accelerator = make_accelerator(options.machine)
    splits = options.data.load()
    teacher, file = load_teacher(options.teacher, splits.train.class_names)
    caches = features_of(
        splits,
        teacher,
        file,
        accelerator,
        options.out,
        options.images,
        options.batch_size,
        options.machine.workers,
    )
    if options.draws:
        draws_of(
            options.draws, change, splits.train, teacher, file, accelerator, options.out,
            batch_size=options.batch_size,
        )  # fmt: skip
    return {name: str(path) for name, (path, _) in caches.items()}


def features_of(
    splits: Splits[PointDataset],
    teacher: ImageTeacher,
    file: Path,
    accelerator: Accelerator,
    folder: Path | None = None,
    images: Path | None = None,
    batch_size: int = 32,
    workers: int = 0,
    without: Collection[str] = (),
) -> dict[str, tuple[Path, FeatureCache]]:
    """The teacher's features of every part of ``splits``, and of its clouds without labels: opened, or built
    first where they are absent.

    Each cache lies in a file that is named after the data and the teacher, so that several of each share
    the folder. A damaged one is made anew.

    Args:
        splits: the shapes.
        teacher: frozen, in eval mode.
        file: its checkpoint; its run folder says how views are made.
        folder: of the caches; None: ``features`` beside the checkpoint.
        images: folder of images, for a teacher of images; matched to the shapes by their ids. Not needed
            where the features are there.
        batch_size, workers: for building.
        without: names of parts that are not wanted: ``test``, ``unlabelled``.

    Raises:
        ValueError: features that are there were made from other images.
    """
    folder = folder or file.parent / "features"
    teacher_fingerprint = teacher.fingerprint()
    result = {}
    for name, part in splits.every().items():
        if name in without:
            continue
        path = folder / f"{name}-{part.fingerprint()[:16]}-{teacher_fingerprint[:16]}.safetensors"
        device = accelerator.device
        build = functools.partial(
            _build, path, name, part, teacher, file, device, images, batch_size, workers,
            splits.train.class_names,
        )  # fmt: skip
        cache = _once(accelerator, path, teacher_fingerprint, part.fingerprint(), build)
        if images is not None and cache.views.get("images") != str(images.resolve()):
            raise ValueError(
                f"the features in {path} were made from {cache.views.get('images', 'projected points')}, and "
                f"this run has --images {images.resolve()}; delete them, or keep these in another folder"
            )
        result[name] = (path, cache)
    return result


@dataclass
class Draws:
    """K augmented copies of n training shapes, and what the teacher makes of each."""

    change: Augmentation
    factors: Tensor
    """[K, n, 1, 3] stretch of each copy."""
    shifts: Tensor
    """[K, n, 1, 3] its shift."""
    features: Tensor
    """[K, n, D]"""

    def take(self, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """A copy, by chance, of each shape: points [B, N, C], shuffled, and the teacher's feature [B, D].

        Args:
            points: [B, N, C] the shapes as they are.
            index: int64 [B] their rows.
        """
        copy = torch.randint(len(self.factors), index.shape, device=index.device)
        points = self.change.apply(points, self.factors[copy, index], self.shifts[copy, index])
        return shuffle(points), self.features[copy, index]


def draws_of(
    count: int,
    change: Augmentation,
    part: PointDataset,
    teacher: ImageTeacher,
    file: Path,
    accelerator: Accelerator,
    folder: Path | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Draws:
    """``count`` augmented copies of every training shape with the teacher's features of views of each; the
    features are read from disk, or computed first.

    The copies depend on ``seed``, ``change`` and the shapes alone, so that runs of several seeds share them.
    """
    spec = views_of_teacher(file)
    device = accelerator.device
    generators = [torch.Generator().manual_seed(1_000_003 * seed + copy) for copy in range(count)]
    points = torch.from_numpy(part.view_points)
    drawn = [change.draw(points, generator) for generator in generators]
    factors, shifts = (torch.stack(side) for side in zip(*drawn, strict=True))
    described = {**spec.describe(), "copies": count, "change": repr(change), "seed": seed}
    name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]
    path = (folder or file.parent / "features") / (
        f"train-{part.fingerprint()[:16]}-{teacher.fingerprint()[:16]}-draws-{name}.safetensors"
    )
    n = len(part)

    @torch.no_grad()
    def fill(rows: Tensor) -> Iterator[tuple[Tensor, TeacherOutput]]:
        teacher.to(device).eval()
        with console.status(f"teacher features of {count} augmented copies of {n} train shapes"):
            for some in rows.split(batch_size):
                copy, row = some // n, some % n
                changed = change.apply(points[row], factors[copy, row], shifts[copy, row])
                yield some, teacher(spec.project(changed.to(device)))

    prints = (teacher.fingerprint(), part.fingerprint())
    build = functools.partial(FeatureCache.build, path, *prints, described, count * n, fill)
    cache = _once(accelerator, path, *prints, build)
    features = cache[torch.arange(count * n)].view(count, n, -1)
    return Draws(change, factors.to(device), shifts.to(device), features.to(device))


def _once(
    accelerator: Accelerator, path: Path, teacher: str, data: str, build: Callable[[], FeatureCache]
) -> FeatureCache:
    """What ``build`` opens or makes, in the first process; the others wait, and open the file."""
    cache = build() if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    return (
        FeatureCache.open(path, teacher_fingerprint=teacher, data_fingerprint=data)
        if cache is None
        else cache
    )


def _build(
    path: Path,
    name: str,
    part: PointDataset,
    teacher: ImageTeacher,
    file: Path,
    device: torch.device,
    images: Path | None,
    batch_size: int,
    workers: int,
    class_names: list[str],
) -> FeatureCache:
    config = None if images is None else run_config_beside(file)
    made = config["config"]["views"] if config is not None else {}
    size, white = made.get("size"), made.get("white")

    def views() -> dict[str, Any]:
        if images is None:
            return views_of_teacher(file).describe()
        return {"images": str(images.resolve()), "size": size} | ({"white": white} if white else {})

    @torch.no_grad()
    def fill(rows: Tensor) -> Iterator[tuple[Tensor, TeacherOutput]]:
        spec = None if images is not None else views_of_teacher(file)
        shapes: PointDataset | MultiViewImages = part
        if images is not None:
            split: Split = "test" if name == "test" else "train"
            shapes = matching_images(images, part, split, size, teacher.in_chans, class_names, white)
        elif spec is not None and part.up is not None and spec.up != part.up:
            say(
                f"the teacher's views take {spec.up} for the axis that points up, and in these {name} shapes "
                f"it is {part.up}: its features are of turned shapes"
            )
        teacher.to(device).eval()
        batches = Batches(shapes, batch_size, device, workers=workers, what="view_points")
        with console.status(f"teacher features of {len(part)} {name} shapes"):
            for batch in batches.rows(rows):
                yield batch.index, teacher(batch.inputs if spec is None else spec.project(batch.inputs))
        say(f"teacher features of {len(part)} {name} shapes: {path}")

    return FeatureCache.build(path, teacher.fingerprint(), part.fingerprint(), views, len(part), fill)
