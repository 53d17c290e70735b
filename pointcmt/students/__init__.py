"""Reference students: published networks rebuilt on :mod:`pointcmt.ops`.

A classifier takes points [B, N, 3] and returns logits [B, K]. ``encode(points)`` is the
:class:`~pointcmt.types.PointFeatures` of its encoder and ``head(global feature)`` its classifier. Stages are
modules that take and give centres [B, M, 3] and features [B, M, C]; their layers are called, so that hooks,
pruning and replacements work. Parameter names and shapes are those of the public
repository that each file names, so that released checkpoints load with :func:`load_released_checkpoint`.

Networks for parts (``…_part``) and scenes (``…_scene``) take points [B, N, C], and those for parts the
shape's category int64 [B], and return logits [B, N, K]. ``encode`` has a feature for each point, ``score``
makes logits of it.
"""

from pointcmt.students.dgcnn import DGCNN, dgcnn
from pointcmt.students.dgcnn_seg import DGCNNPart, DGCNNScene, dgcnn_part, dgcnn_scene
from pointcmt.students.pointmlp import PointMLP, pointmlp
from pointcmt.students.pointnet2 import PointNet2, pointnet2
from pointcmt.students.pointnet2_seg import PointNet2Part, PointNet2Scene, pointnet2_part, pointnet2_scene
from pointcmt.students.pointnext import PointNeXt, pointnext
from pointcmt.students.pointnext_seg import PointNeXtSeg, pointnext_part, pointnext_scene
from pointcmt.students.registry import register_student
from pointcmt.students.released import load_released_checkpoint
from pointcmt.students.rscnn import RSCNN, rscnn

__all__ = [
    "DGCNN",
    "RSCNN",
    "DGCNNPart",
    "DGCNNScene",
    "PointMLP",
    "PointNeXt",
    "PointNeXtSeg",
    "PointNet2",
    "PointNet2Part",
    "PointNet2Scene",
    "dgcnn",
    "dgcnn_part",
    "dgcnn_scene",
    "load_released_checkpoint",
    "pointmlp",
    "pointnet2",
    "pointnet2_part",
    "pointnet2_scene",
    "pointnext",
    "pointnext_part",
    "pointnext_scene",
    "register_student",
    "rscnn",
]
