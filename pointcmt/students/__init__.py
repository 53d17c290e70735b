"""Reference students: published classifiers rebuilt on :mod:`pointcmt.ops`.

Each takes points [B, N, 3] and returns logits [B, K]; parameter names and shapes are those of the public
repository that each file names, so that released checkpoints load with :func:`load_released_checkpoint`.
"""

from pointcmt.students.dgcnn import DGCNN, dgcnn
from pointcmt.students.pointmlp import PointMLP, pointmlp
from pointcmt.students.pointnet2 import PointNet2, pointnet2
from pointcmt.students.released import load_released_checkpoint
from pointcmt.students.rscnn import RSCNN, rscnn

__all__ = [
    "DGCNN",
    "RSCNN",
    "PointMLP",
    "PointNet2",
    "dgcnn",
    "load_released_checkpoint",
    "pointmlp",
    "pointnet2",
    "rscnn",
]
