"""``_ext.pointnet2`` of Yochengliu's Relation-Shape-CNN and DensePoint.

OpenPoints' functions, but for furthest point sampling, which leaves out points near the origin as
pointnet2_ops does, and for the ball query of Relation-Shape-CNN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt.compat import pointnet2_batch_cuda as _same
from pointcmt.compat._furthest import furthest_repeating

gather_points_wrapper = _same.gather_points_wrapper
gather_points_grad_wrapper = _same.gather_points_grad_wrapper
group_points_wrapper = _same.group_points_wrapper
group_points_grad_wrapper = _same.group_points_grad_wrapper
three_nn_wrapper = _same.three_nn_wrapper
three_interpolate_wrapper = _same.three_interpolate_wrapper
three_interpolate_grad_wrapper = _same.three_interpolate_grad_wrapper

_DISTANCES_AT_ONCE = 1 << 24  # bounds the memory: 64 MiB of float32


def furthest_point_sampling_wrapper(b: int, n: int, m: int, points: Tensor, temp: Tensor, idx: Tensor) -> int:
    """points [b, n, 3] → idx [b, m]; temp, the extension's scratch space, is left as it is."""
    idx.copy_(furthest_repeating(points, m))
    return 1


def ball_query_wrapper(
    b: int, n: int, m: int, radius: float, nsample: int, new_xyz: Tensor, xyz: Tensor, *rest: Tensor
) -> int:
    """new_xyz [b, m, 3], xyz [b, n, 3] → idx [b, m, nsample], the last of ``rest``.

    DensePoint gives no more than that, and means PointNet++'s query. Relation-Shape-CNN gives the indices of
    the centres [b, m] before it. Then points that coincide with the centre are left out (it puts the centre
    in front itself), and a row that has too few hits is filled with the centre's own index.
    """
    *fps_idx, idx = rest
    if not fps_idx:
        return _same.ball_query_wrapper(b, n, m, radius, nsample, new_xyz, xyz, idx)
    clouds = max(1, _DISTANCES_AT_ONCE // max(1, n * m))
    for start in range(0, b, clouds):
        part = slice(start, start + clouds)
        idx[part] = _hits(radius, nsample, xyz[part], new_xyz[part], fps_idx[0][part]).to(idx.dtype)
    return 1


def _hits(radius: float, nsample: int, xyz: Tensor, new_xyz: Tensor, fill: Tensor) -> Tensor:
    n = xyz.shape[1]
    squared = xyz.new_zeros(xyz.shape[0], new_xyz.shape[1], n)
    for d in range(3):  # dimension by dimension, so that a point is at distance 0 of itself, exactly
        squared += (new_xyz[:, :, None, d] - xyz[:, None, :, d]).square()
    limit = torch.tensor(radius, dtype=xyz.dtype, device=xyz.device).square()
    inside = (squared < limit) & (squared > 0)
    listed = torch.where(inside, torch.arange(n, device=xyz.device), n)
    first = listed.topk(min(nsample, n), dim=-1, largest=False, sorted=True).values
    first = torch.nn.functional.pad(first, (0, nsample - first.shape[-1]), value=n)
    return torch.where(first < n, first, fill.long()[..., None])
