"""Registration: CMIGNet, the pairs it learns from, and what people use beside it."""

from pointcmt.registration.losses import LossWeights, registration_loss
from pointcmt.registration.model import CMIGNet, Registration
from pointcmt.registration.pairs import (
    Pair,
    PairBatch,
    PairBatches,
    PairOptions,
    ScanPairs,
    ShapePairs,
    ThreeDMatchPairs,
    category_halves,
    measured_overlap,
)

__all__ = [
    "CMIGNet",
    "LossWeights",
    "Pair",
    "PairBatch",
    "PairBatches",
    "PairOptions",
    "Registration",
    "ScanPairs",
    "ShapePairs",
    "ThreeDMatchPairs",
    "category_halves",
    "measured_overlap",
    "registration_loss",
]
