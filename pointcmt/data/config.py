"""Which data a run uses: one dataclass that the command line and run folders share, and its loading."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from pointcmt.data.checks import frame_of, guess_up
from pointcmt.data.dataset import PointDataset, Split, class_rows, holdout, in_unit_sphere, subset
from pointcmt.data.multiview import MultiViewImages
from pointcmt.data.registry import ARGUMENTS, DatasetEntry, find_dataset, recognise
from pointcmt.data.unlabelled import without_labels


@dataclass
class DataOptions:
    """Which shapes."""

    data: str = "synthetic"
    """Folder of the data set, or ``synthetic`` for the shapes that come with the package."""
    dataset: str = "auto"
    """What is in the folder; auto recognises it. modelnet40hard makes scans of ModelNet40 on the fly."""
    variant: Literal["obj_only", "obj_bg", "pb_t50_rs"] = "pb_t50_rs"
    """Variant of ScanObjectNN."""
    num_points: int = 1024
    """Points per shape that the student sees, and the generator makes."""
    view_points: int | None = None
    """Points per shape that views are projected from; default: those that the student sees."""
    per_class: int | None = None
    """Training shapes per class; default: all."""
    labels_per_class: int | None = None
    """So many training shapes of each class are labelled, held-out ones included, as if --per-class said it;
    the others of the training set (or of --per-class) are clouds without labels, which train may use."""
    test_per_class: int | None = None
    """Test shapes per class; default: all."""
    data_cache: Path | None = None
    """Folder that keeps parsed text files and sampled meshes, so that only the first use is slow."""
    data_seed: int = 0
    """Which shapes are drawn for --per-class and --holdout."""
    holdout: float = 0.1
    """Part of the training shapes that is kept out of training, to choose the best epoch and to compare
    teacher and student honestly; 0 trains on all, as papers do, and then the best epoch is chosen on the
    test set."""
    normalize: bool | None = None
    """Centre each cloud and scale it into the unit sphere; default: as is usual for the data set, and said
    where the clouds then lie elsewhere."""
    normals: bool = False
    """Points with their unit normals, [N, 6], of a data set that has them; for networks that take them."""
    data_up: Literal["auto", "x", "y", "z"] = "auto"
    """Which axis of the clouds points up; auto takes what the data set records, else guesses and says so."""
    voxel: float | None = None
    """Rooms are thinned to a point for each cube of this edge, in the data's unit; 0: not; default: as is
    usual for the data set."""
    skip_broken: bool = False
    """Leave out files of one's own that cannot be read, and say how many; else the first is an error."""

    def named(self) -> str:
        """The registered name of the data set."""
        return self.entry().name

    def entry(self) -> DatasetEntry:
        """The registered data set that is meant.

        Raises:
            ValueError: an unknown name, or a data set that needs a folder without one.
            FileNotFoundError: no such folder, or one that holds no known data set.
        """
        if self.dataset != "auto":
            entry = find_dataset(self.dataset)
        else:
            entry = find_dataset("synthetic") if self.data == "synthetic" else recognise(Path(self.data))
        if entry.takes("root") and self.data == "synthetic":
            raise ValueError(f"data set {entry.name!r} needs a root, the folder that holds it: --data FOLDER")
        return entry

    def build(self, split: Split, per_class: int | None = None) -> PointDataset:
        """One split of the data set, checked, with its up axis; see :meth:`load` for the parts of a run.

        Raises:
            ValueError: options that the data set does not have, or values out of range.
            FileNotFoundError, OSError: what its reader raises.
        """
        if self.num_points < 1 or (self.view_points is not None and self.view_points < 1):
            raise ValueError(
                f"--num-points {self.num_points} and --view-points {self.view_points}: expected at least 1"
            )
        entry = self.entry()
        arguments: dict[str, Any] = {
            "root": Path(self.data),
            "split": split,
            "num_points": self.num_points,
            "dense_points": self.view_points,
            "per_class": per_class,
            "seed": self.data_seed,
            "normals": self.normals or None,
            "normalize": self.normalize,
            "cache_dir": self.data_cache,
            "up": None if self.data_up == "auto" else self.data_up,
            "variant": self.variant,
            "voxel": self.voxel,
            "skip_broken": self.skip_broken,
        }
        assert arguments.keys() == ARGUMENTS.keys()
        if self.view_points is not None and not entry.takes("dense_points"):
            raise ValueError(f"data set {entry.name!r} has no --view-points: its views are of its own points")
        if self.normals and not entry.takes("normals"):
            raise ValueError(
                f"data set {entry.name!r} has no --normals: use one that has them (meshes, or files with "
                "normals), or leave the option out"
            )
        # a parameter that is left at None keeps the default of `build`
        given = {name: value for name, value in arguments.items() if entry.takes(name) and value is not None}
        made = entry.build(**given)
        if per_class is not None and not entry.takes("per_class"):
            made = subset(made, class_rows(made.labels, per_class, self.data_seed))
        if made.num_points > self.num_points and not entry.takes("num_points"):
            raise ValueError(
                f"data set {entry.name!r} gives {made.num_points} points per shape, and --num-points is "
                f"{self.num_points}: its builder has no parameter num_points"
            )
        if self.normalize is True and not entry.takes("normalize"):
            made.points, made._view_points = in_unit_sphere(made.points, made._view_points)
        if self.data_up != "auto":
            made.up = self.data_up
        elif made.up is None:
            made.up = entry.up
        return made

    def load(self) -> Splits[PointDataset]:
        """Training, held-out and test shapes.

        The held-out shapes are drawn from the whole training set, and --per-class after that: so a
        teacher that learns from all labels and a student that learns from few have the same shapes held out.

        Warns:
            UserWarning: clouds outside the unit sphere, or an up axis that is guessed or contradicted.
        """
        return _kept(("all", repr(self)), self._load)

    def part(self, name: str) -> PointDataset | None:
        """One part of :meth:`load`; None where there is none of that name. Test shapes alone are quick."""
        if name == "test":
            return _kept(("test", repr(self)), self._test)
        return self.load().parts().get(name)

    def _test(self) -> PointDataset:
        test = self.build("test", self.test_per_class)
        for problem in self.settle(test):
            warnings.warn(problem, stacklevel=4)
        return test

    def settle(self, made: PointDataset) -> list[str]:
        """Give ``made`` an up axis where it has none; returns what a user should know of units and axis."""
        problems = []
        # rooms are in their own unit, and no views are made of them
        frame = frame_of(made.view_points).problem() if len(made) and made.rooms is None else None
        if frame is not None:
            problems.append(f"{self.data}: {frame}")
        guess = guess_up(made.points, made.labels)
        if made.up is None:
            made.up = guess.axis if guess.clear else "z"
            problems.append(
                f"{self.data} does not record which axis points up; taken: "
                + (str(guess) if guess.clear else f"z, because the shapes do not tell ({guess})")
                + ". --data-up x, y or z says it"
            )
        elif guess.contradicts(made.up):
            problems.append(
                f"{self.data}: {made.up} is recorded as the axis that points up, but the shapes look as if "
                f"it were {guess}. --data-up {guess.axis} mends it, if so"
            )
        return problems

    def _load(self) -> Splits[PointDataset]:
        if not 0 <= self.holdout < 1:
            raise ValueError(f"--holdout is {self.holdout}; expected a part of the training shapes in [0, 1)")
        if self.labels_per_class is not None:
            labelled = replace(self, per_class=self.labels_per_class, labels_per_class=None).load()
            every = self.build("train", self.per_class)
            known = {name for part in (labelled.train, labelled.heldout) if part for name in part.shape_ids}
            rest = np.array([name not in known for name in every.shape_ids])
            if not rest.any():
                raise ValueError(
                    f"--labels-per-class {self.labels_per_class} leaves no training shape without a label: "
                    "give fewer, or leave it out"
                )
            every.up = labelled.train.up
            return replace(labelled, unlabelled=without_labels(subset(every, rest)))
        test = self.part("test")
        assert test is not None
        if not self.holdout:
            return self._splits(self.build("train", self.per_class), None, test)
        if self.named() == "synthetic":
            # made one by one, not drawn: the first of a class are the same however many there are
            drawn = None
            whole = self.build("train", self.per_class)
            each = len(whole) // len(whole.class_names)
            first = np.arange(len(whole)) % each < min(max(1, round(self.holdout * each)), each - 1)
            kept, held = subset(whole, ~first), subset(whole, first)
        else:
            drawn = self.per_class
            whole = self.build("train")
            kept, held = holdout(whole, self.holdout, self.data_seed)
        if drawn is not None:
            if drawn < 2:
                raise ValueError(
                    f"--per-class {drawn} with --holdout {self.holdout}: one shape of each class is held "
                    "out, so at least 2 are needed; use --holdout 0 or more shapes"
                )
            few = max(1, round(self.holdout * drawn))
            kept = subset(kept, class_rows(kept.labels, drawn - few, self.data_seed))
            held = subset(held, class_rows(held.labels, few, self.data_seed))
        if len(held) == 0 or len(kept) == 0:
            raise ValueError(
                f"--holdout {self.holdout} of {len(whole)} shapes leaves {len(kept)} to train on and "
                f"{len(held)} held out: use more shapes, or --holdout 0"
            )
        return self._splits(kept, held, test)

    def _splits(
        self, train: PointDataset, heldout: PointDataset | None, test: PointDataset
    ) -> Splits[PointDataset]:
        if train.class_names != test.class_names:
            raise ValueError(
                f"{self.data} has training shapes of {train.class_names} and test shapes of "
                f"{test.class_names}; expected the same classes in the same order"
            )
        for part in (train, heldout):
            if part is not None and part.up is None:
                part.up = test.up  # one axis for a data set
        return Splits(train, heldout, test)


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
    unlabelled: Shapes | None = None
    """Clouds without labels: no part that is trained on or tested by them."""

    def parts(self) -> dict[str, Shapes]:
        """The parts that there are, by name."""
        parts = {"train": self.train, "heldout": self.heldout, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def every(self) -> dict[str, Shapes]:
        """The parts by name, and the clouds without labels."""
        return self.parts() if self.unlabelled is None else {**self.parts(), "unlabelled": self.unlabelled}

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
