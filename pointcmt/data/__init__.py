"""Data sets of labelled point clouds, their augmentation and corruption, and teacher features on disk."""

from pointcmt.data.augmentation import Augmentation, augment, sample, shuffle, vote_scale
from pointcmt.data.checks import guess_up
from pointcmt.data.config import DataOptions, Splits
from pointcmt.data.corruption import SEVERITIES, Corruption, corrupt
from pointcmt.data.dataset import PointDataset, holdout, subset
from pointcmt.data.feature_cache import FeatureCache
from pointcmt.data.folder import PointFolder
from pointcmt.data.modelnet40 import ModelNet40
from pointcmt.data.modelnet40_hard import ModelNet40Hard
from pointcmt.data.multiview import MultiViewImages
from pointcmt.data.registry import datasets, register_dataset
from pointcmt.data.scanobjectnn import ScanObjectNN
from pointcmt.data.synthetic import SyntheticShapes
from pointcmt.types import Batch

__all__ = [
    "SEVERITIES",
    "Augmentation",
    "Batch",
    "Corruption",
    "DataOptions",
    "FeatureCache",
    "ModelNet40",
    "ModelNet40Hard",
    "MultiViewImages",
    "PointDataset",
    "PointFolder",
    "ScanObjectNN",
    "Splits",
    "SyntheticShapes",
    "augment",
    "corrupt",
    "datasets",
    "guess_up",
    "holdout",
    "register_dataset",
    "sample",
    "shuffle",
    "subset",
    "vote_scale",
]
