"""One preset per file: which objectives, which heads, which views. The mechanism is ``pointcmt.training``."""

from pointcmt.methods.crosspoint import CrossPoint
from pointcmt.methods.dense_distillation import DenseDistillation
from pointcmt.methods.mm_point import MMPoint
from pointcmt.methods.pic_at_point import PicAtPoint
from pointcmt.methods.pointcmt import PointCMT
from pointcmt.methods.unused import freeze_unused, unused_parameters

__all__ = [
    "CrossPoint",
    "DenseDistillation",
    "MMPoint",
    "PicAtPoint",
    "PointCMT",
    "freeze_unused",
    "unused_parameters",
]
