"""Which data a run uses, as one dataclass that the command line and run folders share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pointcmt.data.dataset import PointDataset, Split
from pointcmt.data.modelnet40 import ModelNet40
from pointcmt.data.modelnet40_hard import ModelNet40Hard
from pointcmt.data.scanobjectnn import ScanObjectNN, Variant
from pointcmt.data.synthetic import SyntheticShapes


@dataclass(frozen=True)
class DataConfig:
    """A data set and how much of it to use."""

    name: Literal["synthetic", "modelnet40", "modelnet40hard", "scanobjectnn"] = "synthetic"
    """Which data set. `synthetic` needs no files."""
    root: Path | None = None
    """Folder of the data; not for `synthetic`."""
    variant: Variant = "pb_t50_rs"
    """Variant of `scanobjectnn`."""
    num_points: int = 1024
    """Points per cloud."""
    per_class: int | None = None
    """Training shapes per class, drawn by `seed`; all where not given (`synthetic`: 50)."""
    test_per_class: int | None = None
    """Test shapes per class; all where not given (`synthetic`: 50)."""
    num_classes: int | None = None
    """How many classes of `synthetic`; all 16 where not given."""
    dense_points: int | None = None
    """Project views from this many points per shape, rather than from the clouds the student sees."""
    seed: int = 0
    """Draws the shapes of `per_class`, and everything that is made by chance."""
    cache: Path | None = None
    """Folder that keeps parsed text files and sampled meshes, so that only the first use is slow."""

    def build(self, split: Split) -> PointDataset:
        """The set this configuration describes.

        Raises:
            ValueError: a value out of range, or ``root`` missing.
            FileNotFoundError: ``root`` does not hold the data set.
        """
        per_class = self.per_class if split == "train" else self.test_per_class
        if self.name == "synthetic":
            return SyntheticShapes(
                split,
                self.num_points,
                num_classes=self.num_classes,
                per_class=50 if per_class is None else per_class,
                seed=self.seed,
                dense_points=self.dense_points,
            )
        if self.root is None:
            raise ValueError(
                f"data {self.name!r} needs a root: the folder that holds it (--data.root FOLDER)"
            )
        if self.name == "scanobjectnn":
            return ScanObjectNN(
                self.root,
                self.variant,
                split,
                self.num_points,
                per_class=per_class,
                seed=self.seed,
                dense_points=self.dense_points,
            )
        if self.name == "modelnet40hard":
            if self.dense_points is not None:
                raise ValueError(
                    "data 'modelnet40hard' has no dense_points: views are those of the cut scene"
                )
            return ModelNet40Hard(
                self.root,
                split,
                self.num_points,
                per_class=per_class,
                seed=self.seed,
                cache_dir=self.cache,
            )
        return ModelNet40(
            self.root,
            split,
            self.num_points,
            per_class=per_class,
            seed=self.seed,
            dense_points=self.dense_points,
            cache_dir=self.cache,
        )
