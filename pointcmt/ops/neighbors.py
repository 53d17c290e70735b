"""Neighbour search: ball query, k nearest neighbours, three nearest neighbours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pointcmt.ops._checks import (
    check_coordinates,
    check_count,
    check_lengths,
    check_number,
    check_xyz,
    common_float,
)
from pointcmt.ops._extension import compiled_ops, use_compiled


def ball_query(
    radius: float, nsample: int, xyz: Tensor, new_xyz: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """The first ``nsample`` points inside a ball around each query, in index order.

    As in ``pointnet2_ops``: a point is inside when its squared distance is strictly smaller than
    radius² (both in the coordinates' precision); hits are listed by index, not by distance; a row
    with fewer hits is filled with its first hit, a row without any with 0.

    Args:
        radius: of the balls, in the coordinates' unit, > 0.
        nsample: hits to list, ≥ 1.
        xyz: [B, N, 3] points to search, N ≥ 1; half precision is compared in float32.
        new_xyz: [B, M, 3] centres of the balls.
        lengths: int64 [B], where the clouds of a batch differ in size: only the first lengths[b] points of
            ``xyz[b]`` are searched, 1 ≤ lengths[b] ≤ N.

    Returns:
        int64 [B, M, nsample], indices into N. Not differentiable.

    Raises:
        ValueError: wrong shapes or dtypes, no points, radius or nsample out of range.

    Source: Qi et al., PointNet++ (NeurIPS 2017), section 3.2; erikwijmans/Pointnet2_PyTorch.
    """
    check_xyz("ball_query", xyz=xyz, new_xyz=new_xyz)
    check_number("ball_query", "radius", radius)
    if not radius > 0:
        raise ValueError(f"ball_query: radius must be positive, got {radius}")
    check_count("ball_query", "nsample", nsample)
    if not 1 <= nsample < 2**30:
        raise ValueError(f"ball_query: nsample must be at least 1 and below 2^30, got {nsample}")
    if xyz.shape[1] == 0:
        raise ValueError(f"ball_query: xyz must hold at least one point, got shape {list(xyz.shape)}")
    check_lengths("ball_query", xyz, lengths)
    xyz, new_xyz = common_float(xyz.detach(), new_xyz.detach())
    if use_compiled(xyz, op="ball_query"):
        return torch.ops.pointcmt.ball_query(radius, nsample, xyz, new_xyz, lengths)
    return reference_ball_query(radius, nsample, xyz, new_xyz, lengths)


def knn(queries: Tensor, points: Tensor, k: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest points of each query, nearest first, ties to the lower index.

    Distances are sums of squared differences, so they do not suffer the cancellation of
    ``|q|² + |p|² − 2 q·p`` and a point is at distance 0 of itself. The order of the sum is fixed
    (see :func:`squared_distances`): every kernel gives the same bits, hence the same neighbours.
    The compiled kernels never hold the M × N matrix of distances; in three dimensions those for the CPU
    search large clouds through a tree, so that time grows with M log N.

    Args:
        queries: [B, M, D] in any number of dimensions; half precision is compared in float32.
        points: [B, N, D].
        k: 1 ≤ k ≤ N.
        lengths: int64 [B], where the clouds of a batch differ in size: only the first lengths[b] points of
            ``points[b]`` are searched, 1 ≤ lengths[b] ≤ N. Where they are fewer than k, the places
            behind them have distance infinity, index 0 and no gradient.

    Returns:
        squared distances [B, M, k], float32 (float64 if an input is), differentiable in queries
        and points; and int64 [B, M, k], indices into N. A NaN distance counts as infinite.

    Raises:
        ValueError: wrong shapes or dtypes, or k out of range.
    """
    check_coordinates("knn", points=points, queries=queries)
    check_count("knn", "k", k)
    if not 1 <= k <= points.shape[1]:
        raise ValueError(
            f"knn: k must be between 1 and the number of points, got k={k} for points of shape "
            f"{list(points.shape)}"
        )
    check_lengths("knn", points, lengths)
    queries, points = common_float(queries, points)
    if use_compiled(points, op="knn"):
        return torch.ops.pointcmt.knn(queries, points, k, lengths)
    return reference_knn(queries, points, k, lengths)


def three_nn(unknown: Tensor, known: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The three nearest ``known`` points of each ``unknown`` one, nearest first, ties to the lower index.

    As in ``pointnet2_ops``: distances are Euclidean (the square root is taken); with fewer than three
    known points the missing ones have distance infinity and index 0, so that inverse-distance
    weights ignore them.

    Args:
        unknown: [B, n, 3]; half precision is compared in float32.
        known: [B, m, 3], m ≥ 1.
        lengths: int64 [B], where the clouds of a batch differ in size: only the first lengths[b] points of
            ``known[b]`` are searched, 1 ≤ lengths[b] ≤ m.

    Returns:
        distances [B, n, 3] and int64 indices [B, n, 3] into m. Neither is differentiable.

    Raises:
        ValueError: wrong shapes or dtypes, or no known point.

    Source: Qi et al., PointNet++ (NeurIPS 2017), section 3.4; erikwijmans/Pointnet2_PyTorch.
    """
    check_xyz("three_nn", known=known, unknown=unknown)
    if known.shape[1] == 0:
        raise ValueError(f"three_nn: known must hold at least one point, got shape {list(known.shape)}")
    check_lengths("three_nn", known, lengths)
    unknown, known = common_float(unknown.detach(), known.detach())
    if use_compiled(known, op="three_nn"):
        return torch.ops.pointcmt.three_nn(unknown, known, lengths)
    return reference_three_nn(unknown, known, lengths)


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """All squared distances [B, M, N], in the order of operations that every kernel keeps.

    Eight partial sums, of dimensions 0, 8, 16, …, of 1, 9, 17, … and so on, then a tree: the order
    that vector registers give. In three dimensions it is (x² + y²) + z². Without fused
    multiply-add, so that every device rounds alike.
    """
    dims = queries.shape[2]

    def partial(lane: int) -> Tensor:
        total = queries.new_zeros(queries.shape[0], queries.shape[1], points.shape[1])
        for d in range(lane, dims, 8):
            difference = queries[:, :, None, d] - points[:, None, :, d]
            total = total + difference * difference
        return total

    def pair(lane: int) -> Tensor:
        return partial(lane) + partial(lane + 4) if lane + 4 < dims else partial(lane)

    low, high = pair(0), None
    if dims > 1:
        low = low + pair(1)
    if dims > 2:
        high = pair(2) + pair(3) if dims > 3 else pair(2)
    return low if high is None else low + high


def _within(lengths: Tensor | None, n: int) -> Tensor | None:
    """[B, 1, n]: which of n places in a row are below the cloud's length; None where all are."""
    return None if lengths is None else (torch.arange(n, device=lengths.device) < lengths[:, None])[:, None]


def _finite_distances(queries: Tensor, points: Tensor, lengths: Tensor | None) -> Tensor:
    """:func:`squared_distances`, infinite where they are not a number and beyond the lengths."""
    exact = torch.nan_to_num(squared_distances(queries, points), nan=math.inf, posinf=math.inf)
    within = _within(lengths, points.shape[1])
    return exact if within is None else torch.where(within, exact, math.inf)


def reference_ball_query(
    radius: float, nsample: int, xyz: Tensor, new_xyz: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """The readable twin of :func:`ball_query`, in PyTorch."""
    n = xyz.shape[1]
    limit = torch.tensor(radius, dtype=xyz.dtype, device=xyz.device) ** 2  # squared in their precision
    inside = squared_distances(new_xyz, xyz) < limit
    within = _within(lengths, n)
    if within is not None:
        inside = inside & within
    index = torch.where(inside, torch.arange(n, device=xyz.device), n)
    hits = index.sort(-1).values[..., :nsample]
    hits = torch.nn.functional.pad(hits, (0, nsample - hits.shape[-1]), value=n)
    first = hits[..., :1]
    return torch.where(hits < n, hits, torch.where(first < n, first, 0))


def reference_knn(
    queries: Tensor, points: Tensor, k: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The readable twin of :func:`knn`, in PyTorch."""
    with torch.no_grad():
        exact = _finite_distances(queries, points, lengths)
        distance, idx = (t[..., :k].contiguous() for t in exact.sort(dim=-1, stable=True))
    within = _within(lengths, k)
    if within is not None:
        idx = torch.where(within, idx, 0)
    if not torch.is_grad_enabled() or not (queries.requires_grad or points.requires_grad):
        return distance, idx
    flat = idx.flatten(1)[..., None].expand(-1, -1, points.shape[2])
    neighbours = points.gather(1, flat).unflatten(1, (idx.shape[1], k))
    distance = (queries[:, :, None] - neighbours).square().sum(-1)
    return distance if within is None else torch.where(within, distance, math.inf), idx


def reference_three_nn(
    unknown: Tensor, known: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The readable twin of :func:`three_nn`, in PyTorch."""
    m = known.shape[1]
    exact = _finite_distances(unknown, known, lengths)
    distance, idx = (t[..., :3] for t in exact.sort(dim=-1, stable=True))
    idx = torch.where(distance < math.inf, idx, 0)
    if m < 3:
        distance = torch.nn.functional.pad(distance, (0, 3 - m), value=math.inf)
        idx = torch.nn.functional.pad(idx, (0, 3 - m), value=0)
    return distance.sqrt(), idx.contiguous()


def _fake_ball_query(
    radius: float, nsample: int, xyz: Tensor, new_xyz: Tensor, lengths: Tensor | None = None
) -> Tensor:
    return xyz.new_empty((xyz.shape[0], new_xyz.shape[1], nsample), dtype=torch.int64)


def _fake_three_nn(unknown: Tensor, known: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = (unknown.shape[0], unknown.shape[1], 3)
    return unknown.new_empty(shape), unknown.new_empty(shape, dtype=torch.int64)


def _fake_knn(
    queries: Tensor, points: Tensor, k: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], queries.shape[1], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _knn_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    queries, points, _, lengths = inputs
    ctx.save_for_backward(queries, points, output[1], lengths)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _knn_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    queries, points, idx, lengths = ctx.saved_tensors
    within = _within(lengths, idx.shape[2])
    if within is not None:
        grad = torch.where(within, grad, 0)
    # d|q − p|² = 2 (q − p) dq − 2 (q − p) dp, in the layout of group_points: [B, D, M, k]
    neighbours = torch.ops.pointcmt.group_points(points.transpose(1, 2), idx)
    slope = 2 * grad[:, None] * (queries.transpose(1, 2)[..., None] - neighbours)
    grad_queries = slope.sum(-1).transpose(1, 2) if ctx.needs_input_grad[0] else None
    grad_points = None
    if ctx.needs_input_grad[1]:
        scattered = torch.ops.pointcmt.group_points_backward(slope, idx, points.shape[1])
        grad_points = -scattered.transpose(1, 2)
    return grad_queries, grad_points, None, None


if "knn" in compiled_ops("cpu"):
    torch.library.register_fake("pointcmt::ball_query", _fake_ball_query)
    torch.library.register_fake("pointcmt::three_nn", _fake_three_nn)
    torch.library.register_fake("pointcmt::knn", _fake_knn)
    torch.library.register_autograd("pointcmt::knn", _knn_backward, setup_context=_knn_context)
