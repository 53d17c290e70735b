"""Options that several commands share, and how they become data sets, views and trained models."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pointcmt.checkpoint import read_config
from pointcmt.data import MultiViewImages, PointDataset
from pointcmt.data.config import DataOptions, Splits, shared_shapes
from pointcmt.data.dataset import Split, class_rows
from pointcmt.generator import PointGenerator
from pointcmt.recipes.run import find_checkpoint, results_beside, run_config_beside
from pointcmt.teacher import ImageTeacher
from pointcmt.views import ViewSpec

__all__ = [
    "DataOptions",
    "Splits",
    "ViewOptions",
    "image_splits",
    "load_generator",
    "load_teacher",
    "matching_images",
    "parse_assignments",
    "shared_shapes",
    "views_of_teacher",
]


def image_splits(root: Path, data: DataOptions, views: ViewOptions, channels: int) -> Splits[MultiViewImages]:
    """Training, held-out and test images below ``root``, split as ``DataOptions`` says."""

    names: list[str] | None = None

    def part(split: Split, ids: Sequence[str] | None = None) -> MultiViewImages:
        return MultiViewImages(
            root, split, size=views.size, white=views.white or None, in_chans=channels, shape_ids=ids,
            class_names=names,
        )  # fmt: skip

    train, test = part("train"), part("test")  # each with the classes of both
    names = train.class_names
    rows = {"train": np.arange(len(train)), "test": np.arange(len(test))}
    if data.test_per_class is not None:
        rows["test"] = class_rows(test.labels, data.test_per_class, data.data_seed)
    few = data.per_class if data.labels_per_class is None else data.labels_per_class
    if few is not None:
        rows["train"] = class_rows(train.labels, few, data.data_seed)
    if data.holdout:
        drawn = train.labels[rows["train"]]
        counts = np.bincount(drawn)
        least = min(counts[counts > 0])
        if least < 2:
            raise ValueError(f"--holdout {data.holdout}: a class of {root} has one shape; use --holdout 0")
        held = np.concatenate(
            [
                np.random.default_rng([data.data_seed, label]).permutation(np.flatnonzero(drawn == label))[
                    : max(1, round(data.holdout * count))
                ]
                for label, count in enumerate(counts)
                if count
            ]
        )
        rows["heldout"] = rows["train"][np.sort(held)]
        rows["train"] = np.delete(rows["train"], held)

    def named(split: Split, name: str) -> MultiViewImages:
        source = train if split == "train" else test
        return part(split, [source.shape_ids[row] for row in rows[name]])

    heldout = named("train", "heldout") if "heldout" in rows else None
    return Splits(named("train", "train"), heldout, named("test", "test"))


def matching_images(
    root: Path,
    part: PointDataset,
    split: Split,
    size: int | None,
    channels: int,
    class_names: Sequence[str] | None = None,
    white: int | None = None,
) -> MultiViewImages:
    """The images below ``root`` of the shapes in ``part``, in its order; ``class_names`` if it has none."""
    names = list(class_names or part.class_names)
    return MultiViewImages(
        root, split, size=size, white=white or None, in_chans=channels, shape_ids=part.shape_ids,
        class_names=names,
    )  # fmt: skip


@dataclass
class ViewOptions:
    """How clouds become the teacher's images."""

    rig: str = "simpleview"
    """Cameras: simpleview (6), ring12 or dodecahedron20."""
    size: int = 128
    """Height and width of a view in pixels."""
    channels: tuple[str, ...] = ("depth",)
    """What a view shows: depth, near (depth turned round, for pretrained encoders), density, normal, shaded;
    several are stacked."""
    splat: float = 0.0
    """Radius of a point in pixels."""
    up: Literal["auto", "x", "y", "z"] = "auto"
    """Which axis of the clouds points up; auto takes what the data set records."""
    white: int = 0
    """Of a folder of images: the value of 16 bits that counts as 1, 4000 for depths in millimetres up to 4 m;
    0: 65535."""
    normalize_views: bool = False
    """Centre and scale each cloud to the unit sphere before it is projected."""

    def spec(self, up: str | None = None) -> ViewSpec:
        """How views are made of clouds whose recorded axis is ``up`` (``dataset.up``).

        Raises:
            ValueError: no axis, neither here nor there.
        """
        if not 0 <= self.white <= 65535:
            raise ValueError(f"--white is {self.white}; expected 0, or 1 to 65535, the values of 16 bits")
        axis = up if self.up == "auto" else self.up
        if axis is None:
            raise ValueError("which axis of the clouds points up is not known: give --up x, y or z")
        return ViewSpec(
            rig=self.rig,
            size=self.size,
            channels=self.channels,
            splat=self.splat,
            up=axis,
            normalize=self.normalize_views,
        )


def views_of_teacher(checkpoint: Path) -> ViewSpec:
    """How the teacher in ``checkpoint`` had its views made: its file says it (an old one's run folder).

    Raises:
        FileNotFoundError: neither the file says it, nor is there a run folder around it.
        ValueError: it was trained from a folder of images.
    """
    recorded = read_config(checkpoint, "teacher").get("view_spec")
    if recorded is not None:
        return ViewSpec(**recorded)
    config = run_config_beside(checkpoint)
    if config is None:
        raise FileNotFoundError(
            f"{checkpoint} does not say how its views were made, and lies in no run folder: keep config.json "
            "of `pointcmt train-teacher` beside it, or give the images it was trained on with --images"
        )
    if config["config"].get("images"):
        raise ValueError(
            f"the teacher at {checkpoint} was trained from images in {config['config']['images']}; "
            "give the same kind of folder with --images"
        )
    views = config["config"]["views"]
    return ViewOptions(**{**views, "channels": tuple(views["channels"])}).spec()


def load_teacher(path: Path, class_names: Sequence[str]) -> tuple[ImageTeacher, Path]:
    """The teacher that a user means by ``path`` (a file or a run folder), and its file; frozen, in eval mode.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was trained on other classes.
    """
    file = find_checkpoint(path, "teacher")
    teacher = ImageTeacher.load(file).eval().requires_grad_(False)
    known = results_beside(file).get("classes")
    if teacher.num_classes != len(class_names) or (known is not None and known != list(class_names)):
        raise ValueError(
            f"the teacher at {file} knows {teacher.num_classes} classes"
            + (f" ({', '.join(known[:4])} …)" if known else "")
            + f", the data has {len(class_names)} ({', '.join(class_names[:4])} …): give the data it was "
            "trained on (--data), or train a teacher on this data"
        )
    return teacher, file


def load_generator(path: Path, feature_dim: int | None = None) -> tuple[PointGenerator, Path]:
    """The generator that a user means by ``path``, and its file; frozen, in eval mode."""
    file = find_checkpoint(path, "generator")
    generator = PointGenerator.load(file).eval().requires_grad_(False)
    if feature_dim is not None and generator.feature_dim != feature_dim:
        raise ValueError(
            f"the generator at {file} takes features of {generator.feature_dim}, the teacher's have "
            f"{feature_dim}: "
            "train a generator for this teacher: pointcmt train-generator --teacher …"
        )
    return generator, file


def parse_assignments(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """``("radius=0.2", "variant=msg")`` as a dictionary; values are Python literals, else strings.

    Raises:
        ValueError: a piece without ``=``, or a name twice.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} {pair!r}: expected NAME=VALUE")
        if name in result:
            raise ValueError(f"{option} names {name} twice; give each option once")
        try:
            result[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[name] = value
    return result
