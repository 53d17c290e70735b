"""``pointnet2_batch_cuda`` of OpenPoints, and ``pointnet2_cuda`` of PointRCNN and those that took it over.

A C interface: sizes first, the result written in place. Sizes repeat what the tensors say and are ignored.
Every function returns 1, as the C functions do.
"""

from __future__ import annotations

from torch import Tensor

from pointcmt import ops
from pointcmt.compat._furthest import furthest
from pointcmt.compat._scatter import scatter_columns, scatter_interpolated


def ball_query_wrapper(
    b: int, n: int, m: int, radius: float, nsample: int, new_xyz: Tensor, xyz: Tensor, idx: Tensor
) -> int:
    """new_xyz [b, m, 3], xyz [b, n, 3] → idx [b, m, nsample]; see :func:`pointcmt.ops.ball_query`."""
    idx.copy_(ops.ball_query(radius, nsample, xyz, new_xyz))
    return 1


def furthest_point_sampling_wrapper(b: int, n: int, m: int, points: Tensor, temp: Tensor, idx: Tensor) -> int:
    """points [b, n, 3] → idx [b, m]; temp, the extension's scratch space, is left as it is."""
    idx.copy_(furthest(points, m))
    return 1


def gather_points_wrapper(
    b: int, c: int, n: int, npoints: int, points: Tensor, idx: Tensor, out: Tensor
) -> int:
    """points [b, c, n], idx [b, npoints] → out [b, c, npoints]."""
    out.copy_(ops.gather_points(points, idx))
    return 1


def gather_points_grad_wrapper(
    b: int, c: int, n: int, npoints: int, grad_out: Tensor, idx: Tensor, grad_points: Tensor
) -> int:
    """Adds the gradient of gathering, grad_out [b, c, npoints], to grad_points [b, c, n]."""
    grad_points.add_(scatter_columns(grad_out, idx, n))
    return 1


def group_points_wrapper(
    b: int, c: int, n: int, npoints: int, nsample: int, points: Tensor, idx: Tensor, out: Tensor
) -> int:
    """points [b, c, n], idx [b, npoints, nsample] → out [b, c, npoints, nsample]."""
    out.copy_(ops.group_points(points, idx))
    return 1


def group_points_grad_wrapper(
    b: int, c: int, n: int, npoints: int, nsample: int, grad_out: Tensor, idx: Tensor, grad_points: Tensor
) -> int:
    """Adds the gradient of grouping, grad_out [b, c, npoints, nsample], to grad_points [b, c, n]."""
    grad_points.add_(scatter_columns(grad_out.flatten(2), idx.flatten(1), n))
    return 1


def three_nn_wrapper(
    b: int, n: int, m: int, unknown: Tensor, known: Tensor, dist2: Tensor, idx: Tensor
) -> int:
    """unknown [b, n, 3], known [b, m, 3] → dist2 (squared) and idx, both [b, n, 3]."""
    distance, nearest = ops.three_nn(unknown, known)
    dist2.copy_(distance.square())
    idx.copy_(nearest)
    return 1


def three_interpolate_wrapper(
    b: int, c: int, m: int, n: int, points: Tensor, idx: Tensor, weight: Tensor, out: Tensor
) -> int:
    """points [b, c, m], idx and weight [b, n, 3] → out [b, c, n]."""
    out.copy_(ops.three_interpolate(points, idx, weight))
    return 1


def three_interpolate_grad_wrapper(
    b: int, c: int, n: int, m: int, grad_out: Tensor, idx: Tensor, weight: Tensor, grad_points: Tensor
) -> int:
    """Adds the gradient of interpolating, grad_out [b, c, n], to grad_points [b, c, m]."""
    grad_points.add_(scatter_interpolated(grad_out, idx, weight, m))
    return 1
