"""Furthest point sampling, with the meaning that ``pointnet2_ops`` gave it, and one point for each voxel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pointcmt.ops._checks import (
    check_count,
    check_lengths,
    check_number,
    check_required,
    check_xyz,
    common_float,
)
from pointcmt.ops._extension import compiled_ops, use_compiled

# pointnet2_ops' constants: points nearer to the origin than sqrt(1e-3) count as padding and are
# never chosen; no distance is taken to be larger than 1e10 (squared).
MIN_SQUARED_NORM = 1e-3
MAX_SQUARED_DISTANCE = 1e10
_MAX_THREADS = 512

# Cells are numbered in int64.
MAX_VOXEL = 2.0**62
_VOXEL_RANGE = (
    "voxel_subsample: every coordinate must be finite and within 2^62 voxels of size {size} from the origin; "
    "filter the points or take larger voxels"
)


def furthest_point_sample(xyz: Tensor, npoint: int, lengths: Tensor | None = None) -> Tensor:
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
        lengths: int64 [B], where the clouds of a batch differ in size: row b is what
            ``xyz[b, :lengths[b]]`` gives, 1 ≤ lengths[b] ≤ N. Where npoint is larger than that, the row
            goes on by the same rule: all distances are 0, and the first usable point in tie order is
            repeated.

    Returns:
        int64 [B, npoint], indices into N. Not differentiable.

    Raises:
        ValueError: wrong shape or dtype, or npoint out of range.

    Source: Qi et al., PointNet++ (NeurIPS 2017), section 3.2; erikwijmans/Pointnet2_PyTorch.
    """
    check_xyz("furthest_point_sample", xyz=xyz)
    check_count("furthest_point_sample", "npoint", npoint)
    if not 1 <= npoint <= xyz.shape[1]:
        raise ValueError(
            f"furthest_point_sample: npoint must be between 1 and the number of points, "
            f"got npoint={npoint} for xyz of shape {list(xyz.shape)}"
        )
    check_lengths("furthest_point_sample", xyz, lengths)
    (xyz,) = common_float(xyz.detach())
    if use_compiled(xyz, op="furthest_point_sample"):
        return torch.ops.pointcmt.furthest_point_sample(xyz, npoint, lengths)
    return reference_furthest_point_sample(xyz, npoint, lengths)


def voxel_subsample(points: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """One point for each occupied cell of a grid of cubes, and every point's place among those.

    The cell of a point is ``floor(point / size)``, the quotient rounded in the coordinates' precision, so
    that it depends on no other point. Of each cell the point of lowest index is kept.

    Args:
        points: [N, 3] coordinates of one cloud, floating and finite; half precision is compared in float32.
        size: edge of a cube, in the coordinates' unit, > 0.

    Returns:
        kept, int64 [K] ascending indices into N, and inverse, int64 [N] indices into K: ``points[kept]``
        are the chosen ones, and ``values[inverse]`` takes values [K, ...] of theirs back to all points.
        Neither is differentiable.

    Raises:
        ValueError: wrong shape or dtype, size not positive, a coordinate that is not finite, or so many
            cells between a point and the origin that their number leaves int64.
    """
    check_required("voxel_subsample", points=points)
    if points.dim() != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise ValueError(
            f"voxel_subsample: points must be a floating-point tensor [N, 3] of one cloud, "
            f"got {points.dtype} of shape {list(points.shape)}"
        )
    check_number("voxel_subsample", "size", size)
    if not 0 < size < math.inf:
        raise ValueError(f"voxel_subsample: size must be positive and finite, got {size}")
    (points,) = common_float(points.detach())
    if use_compiled(points, op="voxel_subsample"):
        return torch.ops.pointcmt.voxel_subsample(points, size)
    return reference_voxel_subsample(points, size)


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


def reference_furthest_point_sample(xyz: Tensor, npoint: int, lengths: Tensor | None = None) -> Tensor:
    """The readable twin of :func:`furthest_point_sample`, in PyTorch."""
    if lengths is not None and len(lengths):
        clouds = zip(xyz, lengths.tolist(), strict=True)
        return torch.cat([reference_furthest_point_sample(c[None, :length], npoint) for c, length in clouds])
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


def reference_voxel_subsample(points: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """The readable twin of :func:`voxel_subsample`, in PyTorch."""
    # a tensor: dividing by a number, CUDA would multiply by its rounded inverse
    cells = torch.floor(points / torch.full((), size, dtype=points.dtype, device=points.device))
    if not bool((cells.abs() < MAX_VOXEL).all()):  # a NaN fails too
        raise ValueError(_VOXEL_RANGE.format(size=size))
    count, device = len(points), points.device
    _, inverse = torch.unique(cells.long(), dim=0, return_inverse=True)
    first = torch.full((count,), count, dtype=torch.int64, device=device)
    first = first.scatter_reduce(0, inverse, torch.arange(count, device=device), "amin")  # of each cell
    kept, order = first.sort()  # cells without a point stand last
    place = torch.empty_like(order).scatter_(0, order, torch.arange(count, device=device))
    return kept[kept < count], place[inverse]


def _fake_furthest_point_sample(xyz: Tensor, npoint: int, lengths: Tensor | None = None) -> Tensor:
    return xyz.new_empty((xyz.shape[0], npoint), dtype=torch.int64)


def _fake_voxel_subsample(points: Tensor, size: float) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return points.new_empty(kept, dtype=torch.int64), points.new_empty(points.shape[0], dtype=torch.int64)


if "furthest_point_sample" in compiled_ops("cpu"):
    torch.library.register_fake("pointcmt::furthest_point_sample", _fake_furthest_point_sample)
if "voxel_subsample" in compiled_ops("cpu"):
    torch.library.register_fake("pointcmt::voxel_subsample", _fake_voxel_subsample)
