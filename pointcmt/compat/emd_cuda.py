"""``emd_cuda``, the compiled part of the earth mover's distance in Point-MAE's family and OpenPoints.

There a soft matching is found by an annealed auction (Fan et al., CVPR 2017); here the matching is one to
one and near the optimum (:func:`pointcmt.ops.emd`), so that its cost is a little lower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt import ops


def approxmatch_forward(xyz1: Tensor, xyz2: Tensor) -> Tensor:
    """[B, N, 3], [B, N, 3] → match [B, N, N]: ``match[b, j, i]`` is 1 where ``xyz1[b, i]`` goes to
    ``xyz2[b, j]``, else 0.

    Raises:
        ValueError: the clouds are not of the same size.
    """
    if xyz1.dim() != 3 or xyz1.shape != xyz2.shape:
        raise ValueError(
            "emd_cuda: both clouds must be [B, N, 3] with the same B and N, got "
            f"{list(xyz1.shape)} and {list(xyz2.shape)}"
        )
    with torch.no_grad():
        goal = ops.emd(xyz1.float(), xyz2.float())[1].long()
        match = xyz1.new_zeros(len(xyz1), xyz2.shape[1], xyz1.shape[1])
        return match.scatter_(1, goal[:, None], 1.0)


def matchcost_forward(xyz1: Tensor, xyz2: Tensor, match: Tensor) -> Tensor:
    """Σ match · squared distance of each pair: [B]."""
    squared = (xyz2[:, :, None] - xyz1[:, None]).square().sum(-1)
    return (match * squared).sum((1, 2))


def matchcost_backward(grad_cost: Tensor, xyz1: Tensor, xyz2: Tensor, match: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`matchcost_forward` to both clouds, the matching fixed: [B, N, 3], [B, M, 3]."""
    factor = 2 * grad_cost[:, None, None]
    grad1 = factor * (xyz1 * match.sum(1)[..., None] - match.transpose(1, 2) @ xyz2)
    grad2 = factor * (xyz2 * match.sum(2)[..., None] - match @ xyz1)
    return grad1, grad2
