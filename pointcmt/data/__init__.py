"""Data sets of labelled point clouds, their augmentation and corruption, and teacher features on disk."""

from pointcmt.data.augmentation import Augmentation, augment, sample, shuffle, vote_scale
from pointcmt.data.checks import guess_up
from pointcmt.data.config import DataOptions, Splits
from pointcmt.data.corruption import SEVERITIES, Corruption, corrupt
from pointcmt.data.dataset import PointDataset, StoredViews, holdout, subset
from pointcmt.data.depth_tables import DepthTables
from pointcmt.data.feature_cache import FeatureCache
from pointcmt.data.folder import PointFolder
from pointcmt.data.labelled import LabelledCloud, read_labelled
from pointcmt.data.labelled_folder import labelled_folder
from pointcmt.data.modelnet40 import ModelNet40
from pointcmt.data.modelnet40_hard import ModelNet40Hard
from pointcmt.data.multiview import MultiViewImages
from pointcmt.data.parts import LabeledPSB
from pointcmt.data.registry import datasets, register_dataset
from pointcmt.data.s3dis import S3DIS, S3DISBlocks
from pointcmt.data.scanobjectnn import ScanObjectNN
from pointcmt.data.scenes import Room, SceneDataset
from pointcmt.data.shapenet_part import ShapeNetPart
from pointcmt.data.synthetic import SyntheticShapes
from pointcmt.types import Batch

__all__ = [
    "S3DIS",
    "SEVERITIES",
    "Augmentation",
    "Batch",
    "Corruption",
    "DataOptions",
    "DepthTables",
    "FeatureCache",
    "LabeledPSB",
    "LabelledCloud",
    "ModelNet40",
    "ModelNet40Hard",
    "MultiViewImages",
    "PointDataset",
    "PointFolder",
    "Room",
    "S3DISBlocks",
    "ScanObjectNN",
    "SceneDataset",
    "ShapeNetPart",
    "Splits",
    "StoredViews",
    "SyntheticShapes",
    "augment",
    "corrupt",
    "datasets",
    "guess_up",
    "holdout",
    "labelled_folder",
    "read_labelled",
    "register_dataset",
    "sample",
    "shuffle",
    "subset",
    "vote_scale",
]
