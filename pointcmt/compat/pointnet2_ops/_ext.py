"""The nine functions of the compiled ``pointnet2_ops._ext`` (and of ``pointnet2._ext`` before it).

Argument order and results are the extension's own, which differ from its Python faces: ``ball_query``
takes the queries first, ``three_nn`` returns squared distances. Index tensors are int32.
"""

from __future__ import annotations

from torch import Tensor

from pointcmt import ops
from pointcmt.compat._furthest import furthest_repeating
from pointcmt.compat._scatter import scatter_columns, scatter_interpolated


def furthest_point_sampling(points: Tensor, nsamples: int) -> Tensor:
    """[B, N, 3] → int32 [B, nsamples]; see :func:`pointcmt.ops.furthest_point_sample`."""
    return furthest_repeating(points, nsamples).int()


def gather_points(points: Tensor, idx: Tensor) -> Tensor:
    """[B, C, N], [B, M] → [B, C, M]; see :func:`pointcmt.ops.gather_points`."""
    return ops.gather_points(points, idx)


def gather_points_grad(grad_out: Tensor, idx: Tensor, n: int) -> Tensor:
    """Gradient of :func:`gather_points` to its points: [B, C, M], [B, M] → [B, C, n]."""
    return scatter_columns(grad_out, idx, n)


def ball_query(new_xyz: Tensor, xyz: Tensor, radius: float, nsample: int) -> Tensor:
    """[B, M, 3], [B, N, 3] → int32 [B, M, nsample]; see :func:`pointcmt.ops.ball_query`."""
    return ops.ball_query(radius, nsample, xyz, new_xyz).int()


def group_points(points: Tensor, idx: Tensor) -> Tensor:
    """[B, C, N], [B, M, S] → [B, C, M, S]; see :func:`pointcmt.ops.group_points`."""
    return ops.group_points(points, idx)


def group_points_grad(grad_out: Tensor, idx: Tensor, n: int) -> Tensor:
    """Gradient of :func:`group_points` to its points: [B, C, M, S], [B, M, S] → [B, C, n]."""
    return scatter_columns(grad_out.flatten(2), idx.flatten(1), n)


def three_nn(unknowns: Tensor, knows: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, 3], [B, m, 3] → squared distances and int32 indices, both [B, n, 3]."""
    distance, idx = ops.three_nn(unknowns, knows)
    return distance.square(), idx.int()


def three_interpolate(points: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """[B, C, m], [B, n, 3], [B, n, 3] → [B, C, n]; see :func:`pointcmt.ops.three_interpolate`."""
    return ops.three_interpolate(points, idx, weight)


def three_interpolate_grad(grad_out: Tensor, idx: Tensor, weight: Tensor, m: int) -> Tensor:
    """Gradient of :func:`three_interpolate` to its points: [B, C, n] → [B, C, m]."""
    return scatter_interpolated(grad_out, idx, weight, m)
