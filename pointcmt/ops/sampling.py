"""Furthest point sampling, with the meaning that ``pointnet2_ops`` gave it."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt.ops._checks import check_xyz, common_float
from pointcmt.ops._extension import compiled_ops, use_compiled

# pointnet2_ops' constants: points nearer to the origin than sqrt(1e-3) count as padding and are
# never chosen; no distance is taken to be larger than 1e10 (squared).
MIN_SQUARED_NORM = 1e-3
MAX_SQUARED_DISTANCE = 1e10
_MAX_THREADS = 512


def furthest_point_sample(xyz: Tensor, npoint: int) -> Tensor:
    """Chooses ``npoint`` points, each the furthest from those chosen before it.

    Same result as ``pointnet2_ops.furthest_point_sample``, up to the rounding of a fused multiply-add:

    * the first choice is point 0;
    * points whose squared norm is at most 1e-3 are never chosen after that (the rule by which
      pointnet2_ops ignores zero padding); where no other point is there, index 0 is repeated;
    * squared distances are clipped at 1e10;
    * among equally far points pointnet2_ops' parallel reduction decides: with S the largest power of
      two that is at most N and at most 512, the point whose ``index mod S`` is smallest *read with
      its bits reversed* wins, then the smaller index. See :func:`tie_order`.

    Args:
        xyz: [B, N, 3] coordinates, floating; half precision is compared in float32. NaN is not
            searched for: a cloud with NaN gives indices in range, without a meaning.
        npoint: how many points to choose, 1 ≤ npoint ≤ N.

    Returns:
        int64 [B, npoint], indices into N. Not differentiable.

    Raises:
        ValueError: wrong shape or dtype, or npoint out of range.

    Source: Qi et al., PointNet++ (NeurIPS 2017), section 3.2; erikwijmans/Pointnet2_PyTorch.
    """
    check_xyz("furthest_point_sample", xyz=xyz)
    if not 1 <= npoint <= xyz.shape[1]:
        raise ValueError(
            f"furthest_point_sample: npoint must be between 1 and the number of points, "
            f"got npoint={npoint} for xyz of shape {list(xyz.shape)}"
        )
    (xyz,) = common_float(xyz.detach())
    if use_compiled(xyz, op="furthest_point_sample"):
        return torch.ops.pointcmt.furthest_point_sample(xyz, npoint)
    return reference_furthest_point_sample(xyz, npoint)


def tie_order(n: int) -> Tensor:
    """The order in which ``pointnet2_ops`` prefers equally far points: int64 [n], a permutation.

    Its block of S threads takes points ``k mod S`` and keeps the first maximum; then pairs of
    threads t and t + S/2, t + S/4, …, t + 1 are merged, the lower thread winning a tie. The last
    merge parts even from odd threads, the one before it multiples of four from the rest, and so on:
    ties go to the lowest bit-reversed thread number.
    """
    threads = min(1 << (n.bit_length() - 1), _MAX_THREADS) if n else 1
    bits = threads.bit_length() - 1
    index = torch.arange(n)
    reversed_thread = torch.zeros_like(index)
    for bit in range(bits):
        reversed_thread |= ((index >> bit) & 1) << (bits - 1 - bit)
    return torch.sort(reversed_thread, stable=True).indices  # stable: then the smaller index


def reference_furthest_point_sample(xyz: Tensor, npoint: int) -> Tensor:
    """The readable twin of :func:`furthest_point_sample`, in PyTorch."""
    batch, n, _ = xyz.shape
    order = tie_order(n).to(xyz.device)
    x, y, z = xyz[:, order].unbind(-1)  # in tie order, so that the first maximum is the right one
    usable = (x * x + y * y + z * z).double() > MIN_SQUARED_NORM
    nearest = torch.where(usable, MAX_SQUARED_DISTANCE, -1.0).to(xyz.dtype)
    position = torch.arange(n, device=xyz.device)
    chosen = torch.zeros(batch, npoint, dtype=torch.int64, device=xyz.device)
    origin = torch.zeros(batch, 1, dtype=torch.int64, device=xyz.device)  # position of point 0 is 0
    last = origin
    for i in range(1, npoint):
        dx, dy, dz = x - x.gather(1, last), y - y.gather(1, last), z - z.gather(1, last)
        distance = dx * dx + dy * dy + dz * dz
        nearest = torch.where(usable, torch.fmin(nearest, distance), nearest)
        best = nearest.amax(1, keepdim=True)
        first = torch.where(nearest == best, position, n).amin(1, keepdim=True)
        last = torch.where(best >= 0, first, origin)
        chosen[:, i] = order[last[:, 0]]
    return chosen


def _fake_furthest_point_sample(xyz: Tensor, npoint: int) -> Tensor:
    return xyz.new_empty((xyz.shape[0], npoint), dtype=torch.int64)


if "furthest_point_sample" in compiled_ops("cpu"):
    torch.library.register_fake("pointcmt::furthest_point_sample", _fake_furthest_point_sample)
