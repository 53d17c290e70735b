"""Teacher features on disk: built when absent, opened when there, refused when stale."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pointcmt.data import FeatureCache, MultiViewImages, PointDataset
from pointcmt.recipes.engine import Batches, MachineOptions, make_accelerator
from pointcmt.recipes.options import DataOptions, Splits, load_teacher, matching_images, views_of_teacher
from pointcmt.recipes.progress import console, say
from pointcmt.recipes.run import run_config_beside
from pointcmt.teacher import ImageTeacher


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
    batch_size: int = 32
    """Shapes at once."""
    machine: MachineOptions = field(default_factory=MachineOptions)


def cache_features(options: CacheFeatures) -> dict[str, Any]:
    """Build the caches of the training, held-out and test shapes; returns their paths."""
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
) -> dict[str, tuple[Path, FeatureCache]]:
    """The teacher's features of every part of ``splits``: opened, or built first where they are absent.

    Each cache lies in a file that is named after the data, so that several data sets share the folder.

    Args:
        splits: the shapes.
        teacher: frozen, in eval mode.
        file: its checkpoint; its run folder says how views are made.
        folder: of the caches; None: ``features`` beside the checkpoint.
        images: folder of images, for a teacher of images; matched to the shapes by their ids. Not needed
            where the features are there.
        batch_size, workers: for building.

    Raises:
        ValueError: features that are there were made from other images.
    """
    folder = folder or file.parent / "features"
    result = {}
    name_of_teacher = teacher.fingerprint()
    for name, part in splits.parts().items():
        path = folder / f"{name}-{part.fingerprint()[:16]}.safetensors"
        if not path.exists():
            if accelerator.is_main_process:
                _build(path, name, part, teacher, file, accelerator.device, images, batch_size, workers)
            accelerator.wait_for_everyone()
        cache = FeatureCache.open(
            path, teacher_fingerprint=name_of_teacher, data_fingerprint=part.fingerprint()
        )
        if images is not None and cache.views.get("images") != str(images.resolve()):
            raise ValueError(
                f"the features in {path} were made from {cache.views.get('images', 'projected points')}, and "
                f"this run has --images {images.resolve()}; delete them, or keep these in another folder"
            )
        result[name] = (path, cache)
    return result


@torch.no_grad()
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
) -> None:
    shapes: PointDataset | MultiViewImages = part
    spec = None
    if images is None:
        spec = views_of_teacher(file)
        described = spec.describe()
    else:
        config = run_config_beside(file)
        size = config["config"]["views"]["size"] if config is not None else None
        shapes = matching_images(images, part, "test" if name == "test" else "train", size, teacher.in_chans)
        described = {"images": str(images.resolve()), "size": size}
    teacher = teacher.to(device).eval()
    cache = FeatureCache.create(
        path,
        teacher_fingerprint=teacher.fingerprint(),
        data_fingerprint=part.fingerprint(),
        views=described,
        n=len(part),
        feature_dim=teacher.feature_dim,
        num_classes=teacher.num_classes,
    )
    batches = Batches(shapes, batch_size, device, workers=workers, what="view_points")
    with console.status(f"teacher features of {len(part)} {name} shapes"):
        # what a killed build has written stays
        for batch in batches.rows(cache.missing()):
            output = teacher(batch.inputs if spec is None else spec.project(batch.inputs))
            cache.write(batch.index.cpu(), output.feature, output.logits)
        cache.finish()
    say(f"teacher features of {len(part)} {name} shapes: {path}")
