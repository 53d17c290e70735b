"""Reference students: published classifiers rebuilt on :mod:`pointcmt.ops`.

Each takes points [B, N, 3] and returns logits [B, K]. ``encode(points)`` is the
:class:`~pointcmt.types.PointFeatures` of its encoder and ``head(global feature)`` its classifier. Stages are
modules that take and give centres [B, M, 3] and features [B, M, C]; their layers are called, so that hooks,
pruning and replacements work. Parameter names and shapes are those of the public
repository that each file names, so that released checkpoints load with :func:`load_released_checkpoint`.
"""

from pointcmt.students.dgcnn import DGCNN, dgcnn
from pointcmt.students.pointmlp import PointMLP, pointmlp
from pointcmt.students.pointnet2 import PointNet2, pointnet2
from pointcmt.students.pointnext import PointNeXt, pointnext
from pointcmt.students.registry import register_student
from pointcmt.students.released import load_released_checkpoint
from pointcmt.students.rscnn import RSCNN, rscnn

__all__ = [
    "DGCNN",
    "RSCNN",
    "PointMLP",
    "PointNeXt",
    "PointNet2",
    "dgcnn",
    "load_released_checkpoint",
    "pointmlp",
    "pointnet2",
    "pointnext",
    "register_student",
    "rscnn",
]
