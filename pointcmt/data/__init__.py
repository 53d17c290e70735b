"""Data sets of labelled point clouds, their augmentation and corruption, and teacher features on disk."""

from pointcmt.data.augmentation import Augmentation, augment, vote_scale
from pointcmt.data.config import DataConfig
from pointcmt.data.corruption import SEVERITIES, Corruption, corrupt
from pointcmt.data.dataset import PointDataset, holdout, subset, unit_sphere
from pointcmt.data.feature_cache import FeatureCache
from pointcmt.data.loading import Batch, EpochLoader, batches, loader
from pointcmt.data.modelnet40 import ModelNet40
from pointcmt.data.modelnet40_hard import ModelNet40Hard
from pointcmt.data.multiview import MultiViewImages
from pointcmt.data.scanobjectnn import ScanObjectNN
from pointcmt.data.synthetic import SyntheticShapes

__all__ = [
    "SEVERITIES",
    "Augmentation",
    "Batch",
    "Corruption",
    "DataConfig",
    "EpochLoader",
    "FeatureCache",
    "ModelNet40",
    "ModelNet40Hard",
    "MultiViewImages",
    "PointDataset",
    "ScanObjectNN",
    "SyntheticShapes",
    "augment",
    "batches",
    "corrupt",
    "holdout",
    "loader",
    "subset",
    "unit_sphere",
    "vote_scale",
]
