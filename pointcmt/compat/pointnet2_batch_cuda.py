"""``pointnet2_batch_cuda``, the extension of OpenPoints (guochengqian/openpoints,
``cpp/pointnet2_batch``).
"""

from __future__ import annotations

from torch import Tensor

from pointcmt import ops
from pointcmt.compat._wrappers import (
    furthest_point_sampling_wrapper,
    gather_points_grad_wrapper,
    gather_points_wrapper,
    group_points_grad_wrapper,
    group_points_wrapper,
    three_interpolate_grad_wrapper,
    three_interpolate_wrapper,
    three_nn_wrapper,
)

__all__ = [
    "ball_query_wrapper",
    "furthest_point_sampling_wrapper",
    "gather_points_grad_wrapper",
    "gather_points_wrapper",
    "group_points_grad_wrapper",
    "group_points_wrapper",
    "three_interpolate_grad_wrapper",
    "three_interpolate_wrapper",
    "three_nn_wrapper",
]


def ball_query_wrapper(
    b: int, n: int, m: int, radius: float, nsample: int, new_xyz: Tensor, xyz: Tensor, idx: Tensor
) -> int:
    """new_xyz [b, m, 3], xyz [b, n, 3] → idx [b, m, nsample]; see :func:`pointcmt.ops.ball_query`."""
    idx.copy_(ops.ball_query(radius, nsample, xyz, new_xyz))
    return 1
