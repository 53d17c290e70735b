"""``_ext.pointnet2`` of Yochengliu/Relation-Shape-CNN: OpenPoints' functions, but for the ball query."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt.compat import pointnet2_batch_cuda as _same

furthest_point_sampling_wrapper = _same.furthest_point_sampling_wrapper
gather_points_wrapper = _same.gather_points_wrapper
gather_points_grad_wrapper = _same.gather_points_grad_wrapper
group_points_wrapper = _same.group_points_wrapper
group_points_grad_wrapper = _same.group_points_grad_wrapper
three_nn_wrapper = _same.three_nn_wrapper
three_interpolate_wrapper = _same.three_interpolate_wrapper
three_interpolate_grad_wrapper = _same.three_interpolate_grad_wrapper

_DISTANCES_AT_ONCE = 1 << 24  # bounds the memory: 64 MiB of float32


def ball_query_wrapper(
    b: int,
    n: int,
    m: int,
    radius: float,
    nsample: int,
    new_xyz: Tensor,
    xyz: Tensor,
    fps_idx: Tensor,
    idx: Tensor,
) -> int:
    """new_xyz [b, m, 3], xyz [b, n, 3], fps_idx [b, m] → idx [b, m, nsample].

    Unlike PointNet++'s, this query leaves out points that coincide with the centre (RS-CNN puts the
    centre in front itself) and fills a row that has too few hits with the centre's own index.
    """
    clouds = max(1, _DISTANCES_AT_ONCE // max(1, n * m))
    for start in range(0, b, clouds):
        part = slice(start, start + clouds)
        idx[part] = _hits(radius, nsample, xyz[part], new_xyz[part], fps_idx[part]).to(idx.dtype)
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
