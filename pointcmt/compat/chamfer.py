"""``chamfer``, the compiled part of the Chamfer distance that Point-MAE, Point-BERT and their like build.

Also ``chamfer_distance``, the package of chrdiller/pyTorchChamferDistance: :class:`ChamferDistance`.
Distances are squared; indices are int32; of equally near points the one of lowest index is the nearest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pointcmt import ops

__all__ = ["ChamferDistance", "ChamferDistanceFunction", "backward", "forward"]


def forward(xyz1: Tensor, xyz2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, N, 3], [B, M, 3] → squared distance of each point to the other cloud [B, N], [B, M], and to which
    of its points, int32 [B, N], [B, M].

    Raises:
        ValueError: the shapes are not those.
    """
    dist1, idx1 = ops.knn(xyz1, xyz2, 1)
    dist2, idx2 = ops.knn(xyz2, xyz1, 1)
    return dist1[..., 0], dist2[..., 0], idx1[..., 0].int(), idx2[..., 0].int()


def backward(
    xyz1: Tensor, xyz2: Tensor, idx1: Tensor, idx2: Tensor, grad_dist1: Tensor, grad_dist2: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of both distances to both clouds, [B, N, 3] and [B, M, 3]; the choice of points is fixed."""
    grad1, grad2 = torch.zeros_like(xyz1), torch.zeros_like(xyz2)
    for near, far, idx, grad, to_near, to_far in (
        (xyz1, xyz2, idx1, grad_dist1, grad1, grad2),
        (xyz2, xyz1, idx2, grad_dist2, grad2, grad1),
    ):
        index = idx.long()[..., None].expand(-1, -1, 3)
        step = 2 * grad[..., None] * (near - far.gather(1, index))
        to_near += step
        to_far.scatter_add_(1, index, -step)
    return grad1, grad2


class ChamferDistanceFunction(torch.autograd.Function):
    """``ChamferDistanceFunction.apply(xyz1, xyz2)``; see :class:`ChamferDistance`."""

    @staticmethod
    def forward(ctx: Any, xyz1: Tensor, xyz2: Tensor) -> tuple[Tensor, Tensor]:
        dist1, dist2, idx1, idx2 = forward(xyz1, xyz2)
        ctx.save_for_backward(xyz1, xyz2, idx1, idx2)
        return dist1, dist2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return backward(*ctx.saved_tensors, *grads)


class ChamferDistance(nn.Module):
    """``ChamferDistance()(xyz1, xyz2) -> (dist1 [B, N], dist2 [B, M])``, squared."""

    def forward(self, xyz1: Tensor, xyz2: Tensor) -> tuple[Tensor, Tensor]:
        return ChamferDistanceFunction.apply(xyz1, xyz2)
