"""Data sets of labelled point clouds, their augmentation, and teacher features kept on disk."""

from pointcmt.data.augmentation import Augmentation, augment, vote_scale
from pointcmt.data.config import DataConfig
from pointcmt.data.dataset import PointDataset, holdout, subset, unit_sphere
from pointcmt.data.modelnet40 import ModelNet40
from pointcmt.data.synthetic import SyntheticShapes

__all__ = [
    "Augmentation",
    "DataConfig",
    "ModelNet40",
    "PointDataset",
    "SyntheticShapes",
    "augment",
    "holdout",
    "subset",
    "unit_sphere",
    "vote_scale",
]
