"""Furthest point sampling as the extensions do it that have no rule for points near the origin."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt import ops
from pointcmt.ops.sampling import MIN_SQUARED_NORM


def furthest_repeating(points: Tensor, npoint: int) -> Tensor:
    """[B, N, 3] → int64 [B, npoint], as :func:`pointcmt.ops.furthest_point_sample`, for any ``npoint``.

    Where more are asked for than there are, pointnet2_ops' kernel goes on with all distances zero: the first
    point in its order of ties that is not near the origin is repeated.
    """
    batch, n, _ = points.shape
    if npoint <= n:
        return ops.furthest_point_sample(points, npoint)
    padded = torch.nn.functional.pad(points.detach(), (0, 0, 0, npoint - n))
    return ops.furthest_point_sample(padded, npoint, torch.full((batch,), n, device=points.device))


def furthest(points: Tensor, npoint: int) -> Tensor:
    """[B, N, 3] → int64 [B, npoint], as :func:`pointcmt.ops.furthest_point_sample` without its origin rule.

    pointnet2_ops takes a point within √0.001 of the origin for padding and never chooses it; the extensions
    that descend from PointRCNN and from Point Transformer have that rule commented out. Where it would act,
    the clouds are moved away from the origin, by a power of two and in double precision, so that the
    differences between coordinates stay what they were. Where more are asked for than there are, the rest
    are the first point, as the originals' kernels give where every distance is zero.
    """
    norms = points.detach().float().square().sum(-1)
    if bool((norms <= 2 * MIN_SQUARED_NORM).any()):
        largest = float(points.detach().abs().max())
        points = points.detach().double() + 2.0 ** max(1, int(largest).bit_length() + 1)
    chosen = ops.furthest_point_sample(points, min(npoint, points.shape[1]))
    return torch.nn.functional.pad(chosen, (0, npoint - chosen.shape[1]))
