"""``pointnet2_ops.pointnet2_utils`` over :mod:`pointcmt.ops`.

Functions carry gradients where the original does: ``gather_operation``, ``grouping_operation`` and
``three_interpolate`` to their features (``three_interpolate`` gives its weights zeros, as there);
indices and ``three_nn``'s distances carry none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pointcmt import ops
from pointcmt.compat._furthest import furthest_repeating
from pointcmt.compat._scatter import ZeroGradient

__all__ = [
    "BallQuery",
    "FurthestPointSampling",
    "GatherOperation",
    "GroupAll",
    "GroupingOperation",
    "QueryAndGroup",
    "ThreeInterpolate",
    "ThreeNN",
    "ball_query",
    "furthest_point_sample",
    "gather_operation",
    "grouping_operation",
    "three_interpolate",
    "three_nn",
]


def furthest_point_sample(xyz: Tensor, npoint: int) -> Tensor:
    """[B, N, 3] → int32 [B, npoint]; starts at point 0, and repeats one where npoint > N. See
    :func:`pointcmt.ops.furthest_point_sample`."""
    return furthest_repeating(xyz, npoint).int()


def gather_operation(features: Tensor, idx: Tensor) -> Tensor:
    """features [B, C, N], idx [B, M] → [B, C, M]."""
    return ops.gather_points(features, idx)


def three_nn(unknown: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """unknown [B, n, 3], known [B, m, 3] → Euclidean distances [B, n, 3] and int32 indices [B, n, 3]."""
    distance, idx = ops.three_nn(unknown, known)
    return distance, idx.int()


def three_interpolate(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """features [B, C, m], idx and weight [B, n, 3] → [B, C, n]."""
    if weight.requires_grad:
        weight = ZeroGradient.apply(weight)
    return ops.three_interpolate(features, idx, weight)


def grouping_operation(features: Tensor, idx: Tensor) -> Tensor:
    """features [B, C, N], idx [B, M, S] → [B, C, M, S]."""
    return ops.group_points(features, idx)


def ball_query(radius: float, nsample: int, xyz: Tensor, new_xyz: Tensor) -> Tensor:
    """xyz [B, N, 3], new_xyz [B, M, 3] → int32 [B, M, nsample]; the first hits in index order, padded."""
    return ops.ball_query(radius, nsample, xyz, new_xyz).int()


# The original's autograd Functions, for code that calls their .apply.
class FurthestPointSampling:
    """``FurthestPointSampling.apply`` is :func:`furthest_point_sample`."""

    apply = staticmethod(furthest_point_sample)


class GatherOperation:
    """``GatherOperation.apply`` is :func:`gather_operation`."""

    apply = staticmethod(gather_operation)


class ThreeNN:
    """``ThreeNN.apply`` is :func:`three_nn`."""

    apply = staticmethod(three_nn)


class ThreeInterpolate:
    """``ThreeInterpolate.apply`` is :func:`three_interpolate`."""

    apply = staticmethod(three_interpolate)


class GroupingOperation:
    """``GroupingOperation.apply`` is :func:`grouping_operation`."""

    apply = staticmethod(grouping_operation)


class BallQuery:
    """``BallQuery.apply`` is :func:`ball_query`."""

    apply = staticmethod(ball_query)


NOTHING_TO_GROUP = "grouping without features needs use_xyz=True: there is nothing else to return"


class QueryAndGroup(nn.Module):
    """Groups the points in a ball around each centre, relative to it, with their features.

    Args:
        radius: of the ball.
        nsample: points per ball.
        use_xyz: put the relative coordinates before the features.
    """

    def __init__(self, radius: float, nsample: int, use_xyz: bool = True) -> None:
        super().__init__()
        self.radius, self.nsample, self.use_xyz = radius, nsample, use_xyz

    def forward(self, xyz: Tensor, new_xyz: Tensor, features: Tensor | None = None) -> Tensor:
        """xyz [B, N, 3], new_xyz [B, M, 3], features [B, C, N] → [B, 3 + C, M, nsample]."""
        idx = ball_query(self.radius, self.nsample, xyz, new_xyz)
        if self.use_xyz:
            return ops.group_relative(xyz, new_xyz, idx, features)
        if features is None:
            raise ValueError(NOTHING_TO_GROUP)
        return grouping_operation(features, idx)


class GroupAll(nn.Module):
    """Makes one group of all points, in their own coordinates.

    Args:
        use_xyz: put the coordinates before the features.
    """

    def __init__(self, use_xyz: bool = True) -> None:
        super().__init__()
        self.use_xyz = use_xyz

    def forward(self, xyz: Tensor, new_xyz: Tensor | None, features: Tensor | None = None) -> Tensor:
        """xyz [B, N, 3], features [B, C, N] → [B, 3 + C, 1, N]; new_xyz is ignored."""
        coordinates = xyz.transpose(1, 2).unsqueeze(2)
        if features is None:  # the original returns the coordinates here even when it was told not to
            return coordinates
        grouped = features.unsqueeze(2)
        return torch.cat([coordinates, grouped], dim=1) if self.use_xyz else grouped
