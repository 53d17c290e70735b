"""Options that several commands share, and how they become data sets, views and trained models."""

from __future__ import annotations

import ast
import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from pointcmt.data import DataConfig, MultiViewImages, PointDataset, holdout, subset
from pointcmt.data.dataset import Split, class_rows
from pointcmt.generator import PointGenerator
from pointcmt.recipes.run import find_checkpoint, results_beside, run_config_beside
from pointcmt.teacher import ImageTeacher
from pointcmt.views import ViewSpec

Known = Literal["synthetic", "modelnet40", "modelnet40hard", "scanobjectnn"]
DatasetName = Literal["auto", "synthetic", "modelnet40", "modelnet40hard", "scanobjectnn"]


@dataclass
class DataOptions:
    """Which shapes."""

    data: str = "synthetic"
    """Folder of the data set, or ``synthetic`` for the shapes that come with the package."""
    dataset: DatasetName = "auto"
    """What is in the folder; auto recognises it. modelnet40hard makes scans of ModelNet40 on the fly."""
    variant: Literal["obj_only", "obj_bg", "pb_t50_rs"] = "pb_t50_rs"
    """Variant of ScanObjectNN."""
    num_points: int = 1024
    """Points per shape that the student sees, and the generator makes."""
    view_points: int | None = None
    """Points per shape that views are projected from; default: those that the student sees."""
    per_class: int | None = None
    """Training shapes per class; default: all."""
    test_per_class: int | None = None
    """Test shapes per class; default: all."""
    data_cache: Path | None = None
    """Folder that keeps parsed text files and sampled meshes, so that only the first use is slow."""
    data_seed: int = 0
    """Which shapes are drawn for --per-class and --holdout."""
    holdout: float = 0.1
    """Part of the training shapes that is kept out of training, to choose the best epoch and to compare
    teacher
    and student honestly; 0 trains on all, as papers do, and then the best epoch is chosen on the test set."""

    def named(self) -> Known:
        """The data set's name for DataConfig."""
        if self.dataset != "auto":
            return self.dataset
        return "synthetic" if self.data == "synthetic" else recognise(Path(self.data))

    def config(self, split: str, per_class: int | None) -> DataConfig:
        name = self.named()
        return DataConfig(
            name=name,
            root=None if self.data == "synthetic" else Path(self.data),
            num_points=self.num_points,
            dense_points=self.view_points,
            per_class=per_class if split == "train" else None,
            test_per_class=per_class if split == "test" else None,
            seed=self.data_seed,
            variant=self.variant,
            cache=self.data_cache,
        )

    def load(self) -> Splits[PointDataset]:
        """Training, held-out and test shapes.

        The held-out shapes are drawn from the whole training set, and --per-class after that: so a
        teacher that
        learns from all labels and a student that learns from few have the same shapes held out.
        """
        return _kept(("all", repr(self)), self._load)

    def part(self, name: str) -> PointDataset | None:
        """One part of :meth:`load`; None where there is none of that name. Test shapes alone are quick."""
        if name == "test":
            return _kept(("test", repr(self)), self._test)
        return self.load().parts().get(name)

    def _test(self) -> PointDataset:
        return self.config("test", self.test_per_class).build("test")

    def _load(self) -> Splits[PointDataset]:
        if not 0 <= self.holdout < 1:
            raise ValueError(f"--holdout is {self.holdout}; expected a part of the training shapes in [0, 1)")
        test = self.part("test")
        assert test is not None
        if not self.holdout:
            return Splits(self.config("train", self.per_class).build("train"), None, test)
        if self.named() == "synthetic":
            # made one by one, not drawn: the first of a class are the same however many there are
            drawn = None
            whole = self.config("train", self.per_class).build("train")
            each = len(whole) // len(whole.class_names)
            first = np.arange(len(whole)) % each < min(max(1, round(self.holdout * each)), each - 1)
            kept, held = subset(whole, ~first), subset(whole, first)
        else:
            drawn = self.per_class
            whole = self.config("train", None).build("train")
            kept, held = holdout(whole, self.holdout, self.data_seed)
        if drawn is not None:
            if drawn < 2:
                raise ValueError(
                    f"--per-class {drawn} with --holdout {self.holdout}: one shape of each class is held "
                    f"out, so at "
                    "least 2 are needed; use --holdout 0 or more shapes"
                )
            few = max(1, round(self.holdout * drawn))
            kept = subset(kept, class_rows(kept.labels, drawn - few, self.data_seed))
            held = subset(held, class_rows(held.labels, few, self.data_seed))
        if len(held) == 0 or len(kept) == 0:
            raise ValueError(
                f"--holdout {self.holdout} of {len(whole)} shapes leaves {len(kept)} to train on and "
                f"{len(held)} held "
                "out: use more shapes, or --holdout 0"
            )
        return Splits(kept, held, test)


_loaded: dict[tuple[str, str], Any] | None = None


@contextlib.contextmanager
def shared_shapes() -> Iterator[None]:
    """Inside, data sets that are loaded stay in memory and are loaded once: for many runs in one process."""
    global _loaded
    before = _loaded
    _loaded = {} if before is None else before
    try:
        yield
    finally:
        _loaded = before


Made = TypeVar("Made")


def _kept(key: tuple[str, str], make: Callable[[], Made]) -> Made:
    if _loaded is None:
        return make()
    if key not in _loaded:
        _loaded[key] = make()
    return _loaded[key]


Shapes = TypeVar("Shapes", PointDataset, MultiViewImages)


@dataclass
class Splits(Generic[Shapes]):
    """The shapes of a run."""

    train: Shapes
    heldout: Shapes | None
    test: Shapes

    def parts(self) -> dict[str, Shapes]:
        """The parts that there are, by name."""
        parts = {"train": self.train, "heldout": self.heldout, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def fingerprint(self) -> str:
        """sha256 of the contents; of images, of the shapes' names."""
        digest = hashlib.sha256()
        for part in self.parts().values():
            text = part.fingerprint() if isinstance(part, PointDataset) else "\0".join(part.shape_ids)
            digest.update(text.encode() + b"\0\0")
        return digest.hexdigest()

    def best_by(self) -> tuple[str, str]:
        """Prefix of the metric that chooses the best epoch, and what that means in words."""
        if self.heldout is not None:
            return "heldout", "accuracy on the held-out part of the training set"
        return "test", "accuracy on the test set: this selects on the test set and is optimistic"


def recognise(root: Path) -> Known:
    """Which data set a folder holds; a folder that is not ScanObjectNN's is left to ModelNet40, which
    knows its forms."""
    if not root.exists():
        raise FileNotFoundError(
            f"--data {root}: there is no such folder. Give the folder of ModelNet40 or ScanObjectNN, "
            "or `synthetic` for the shapes that come with the package"
        )
    scans = ("main_split", "main_split_nobg", "h5_files")
    if any((root / name).is_dir() for name in scans) or list(root.glob("*_objectdataset*.h5")):
        return "scanobjectnn"
    return "modelnet40"


def image_splits(root: Path, data: DataOptions, size: int, channels: int) -> Splits[MultiViewImages]:
    """Training, held-out and test images below ``root``, split as ``DataOptions`` says."""

    def part(split: Split, ids: Sequence[str] | None = None) -> MultiViewImages:
        return MultiViewImages(root, split, size=size, in_chans=channels, shape_ids=ids)

    train, test = part("train"), part("test")
    if train.class_names != test.class_names:
        raise ValueError(
            f"{root} has training images of {train.class_names} and test images of {test.class_names}; "
            "expected the same classes"
        )
    rows = {"train": np.arange(len(train)), "test": np.arange(len(test))}
    if data.test_per_class is not None:
        rows["test"] = class_rows(test.labels, data.test_per_class, data.data_seed)
    if data.per_class is not None:
        rows["train"] = class_rows(train.labels, data.per_class, data.data_seed)
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
    root: Path, part: PointDataset, split: Split, size: int | None, channels: int
) -> MultiViewImages:
    """The images below ``root`` of the shapes in ``part``, in its order."""
    return MultiViewImages(
        root, split, size=size, in_chans=channels, shape_ids=part.shape_ids, class_names=part.class_names
    )


@dataclass
class ViewOptions:
    """How clouds become the teacher's images."""

    rig: str = "simpleview"
    """Cameras: simpleview (6), ring12 or dodecahedron20."""
    size: int = 128
    """Height and width of a view in pixels."""
    channels: tuple[str, ...] = ("depth",)
    """What a view shows: depth, density, normal; several are stacked."""
    splat: float = 0.0
    """Radius of a point in pixels."""
    up: Literal["x", "y", "z"] = "z"
    """Which axis of the clouds points up."""
    normalize_views: bool = False
    """Centre and scale each cloud to the unit sphere before it is projected."""

    def spec(self) -> ViewSpec:
        return ViewSpec(
            rig=self.rig,
            size=self.size,
            channels=self.channels,
            splat=self.splat,
            up=self.up,
            normalize=self.normalize_views,
        )


def views_of_teacher(checkpoint: Path) -> ViewSpec:
    """How the teacher in ``checkpoint`` had its views made, from the run folder it lies in.

    Raises:
        FileNotFoundError: there is no run folder around the checkpoint.
        ValueError: it was trained from a folder of images.
    """
    config = run_config_beside(checkpoint)
    if config is None:
        raise FileNotFoundError(
            f"{checkpoint} lies in no run folder, so how its views were made is not known: keep "
            f"config.json of "
            "`pointcmt train-teacher` beside it"
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
        ValueError: a piece without ``=``.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} {pair!r}: expected NAME=VALUE")
        try:
            result[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[name] = value
    return result
