"""``pointops_cuda``: one name, two extensions, told apart by their arguments.

The first (PAConv, RepSurf's classifier) takes batches, sizes first: ``xyz`` [b, n, 3], features [b, c, n].
The second (Point Transformer, RepSurf's segmentation, OpenPoints) takes all clouds in one list, ``xyz``
[n, 3] and features [n, c], with the ends of the clouds in ``offset`` [b]. Results are written in place. Of
PAConv's scene segmentation, the functions on label statistics and feature distribution are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pointcmt import ops
from pointcmt.compat import pointnet2_batch_cuda as _batch
from pointcmt.compat._furthest import furthest

NO_NEIGHBOUR = 1e10  # squared distance in places for which there was no point


def clouds(offset: Tensor, new_offset: Tensor) -> Iterator[tuple[slice, slice]]:
    """Where each cloud is in the list of all points, and in the list of queries."""
    start = new_start = 0
    for end, new_end in zip(offset.tolist(), new_offset.tolist(), strict=True):
        yield slice(start, end), slice(new_start, new_end)
        start, new_start = end, new_end


def nearest(
    nsample: int, xyz: Tensor, new_xyz: Tensor, offset: Tensor, new_offset: Tensor, empty: int | None
) -> tuple[Tensor, Tensor]:
    """int64 indices into xyz [m, nsample], by distance, and squared distances.

    Where a cloud has fewer points the index is ``empty``, or its first point where that is None.
    """
    idx = torch.zeros(len(new_xyz), nsample, dtype=torch.int64, device=xyz.device)
    squared = xyz.new_full((len(new_xyz), nsample), NO_NEIGHBOUR)
    for of, to in clouds(offset, new_offset):
        points, queries = xyz[of], new_xyz[to]
        k = min(nsample, len(points))
        idx[to] = of.start if empty is None else empty
        if k and len(queries):
            distance, near = ops.knn(queries[None], points[None], k)
            idx[to, :k], squared[to, :k] = near[0] + of.start, distance[0].to(squared.dtype)
    return idx, squared


def furthestsampling_cuda(*args: Any) -> None:
    """(b, n, m, xyz, temp, idx) or (b, n_max, xyz, offset, new_offset, temp, idx)."""
    if not isinstance(args[2], Tensor):
        _, _, m, xyz, _, idx = args
        idx.copy_(furthest(xyz, m))
        return
    _, _, xyz, offset, new_offset, _, idx = args
    for of, to in clouds(offset, new_offset):
        if to.stop > to.start:
            idx[to] = (furthest(xyz[of][None], to.stop - to.start)[0] + of.start).to(idx.dtype)


def knnquery_cuda(*args: Any) -> None:
    """(b, n, m, nsample, xyz, new_xyz, idx, dist2) or (m, nsample, xyz, new_xyz, offset, new_offset, idx,
    dist2).
    """
    if not isinstance(args[2], Tensor):
        _, _, _, nsample, xyz, new_xyz, idx, dist2 = args
        squared, near = ops.knn(new_xyz, xyz, min(nsample, xyz.shape[1]))
        short = nsample - near.shape[-1]
        idx.copy_(torch.nn.functional.pad(near, (0, short)))
        dist2.copy_(torch.nn.functional.pad(squared, (0, short), value=NO_NEIGHBOUR))
        return
    _, nsample, xyz, new_xyz, offset, new_offset, idx, dist2 = args
    near, squared = nearest(nsample, xyz, new_xyz, offset, new_offset, None)
    idx.copy_(near)
    dist2.copy_(squared)


knnquery_heap_cuda = knnquery_cuda  # the same result by another algorithm; of batches only


def ballquery_cuda(*args: Any) -> None:
    """(b, n, m, radius, nsample, new_xyz, xyz, idx) or (m, radius, nsample, xyz, new_xyz, offset, new_offset,
    idx): the first points of each ball in the order of their index.
    """
    if not isinstance(args[3], Tensor):
        _, _, _, radius, nsample, new_xyz, xyz, idx = args
        idx.copy_(ops.ball_query(radius, nsample, xyz, new_xyz))
        return
    _, radius, nsample, xyz, new_xyz, offset, new_offset, idx = args
    for of, to in clouds(offset, new_offset):
        if to.stop > to.start:
            hit = ops.ball_query(radius, nsample, xyz[of][None], new_xyz[to][None])[0]
            # a ball without any point keeps the zeros that it was given
            some = (ops.knn(new_xyz[to][None], xyz[of][None], 1)[0][0] < radius**2).expand_as(hit)
            idx[to] = torch.where(some, hit + of.start, idx[to].long()).to(idx.dtype)


def gathering_forward_cuda(
    b: int, c: int, n: int, m: int, features: Tensor, idx: Tensor, out: Tensor
) -> None:
    """features [b, c, n], idx [b, m] → out [b, c, m]."""
    _batch.gather_points_wrapper(b, c, n, m, features, idx, out)


def gathering_backward_cuda(b: int, c: int, n: int, m: int, grad: Tensor, idx: Tensor, to: Tensor) -> None:
    """Adds the gradient of gathering, grad [b, c, m], to ``to`` [b, c, n]."""
    _batch.gather_points_grad_wrapper(b, c, n, m, grad, idx, to)


def nearestneighbor_cuda(
    b: int, n: int, m: int, unknown: Tensor, known: Tensor, dist2: Tensor, idx: Tensor
) -> None:
    """unknown [b, n, 3], known [b, m, 3] → squared distances and indices of the nearest three."""
    _batch.three_nn_wrapper(b, n, m, unknown, known, dist2, idx)


def grouping_int_forward_cuda(
    b: int, c: int, n: int, m: int, nsample: int, points: Tensor, idx: Tensor, out: Tensor
) -> None:
    """As :func:`grouping_forward_cuda` of a batch, of integers."""
    index = idx.long().flatten(1)[:, None].expand(-1, points.shape[1], -1)
    out.copy_(points.gather(2, index).view(out.shape))


def grouping_forward_cuda(*args: Any) -> None:
    """(b, c, n, m, nsample, features, idx, out), or (m, nsample, c, input, idx, out) of a list: out [m,
    nsample, c].
    """
    if len(args) == 8:
        _batch.group_points_wrapper(*args)
        return
    _, _, _, points, idx, out = args
    out.copy_(points[idx.long()])


def grouping_backward_cuda(*args: Any) -> None:
    """As the forward, with the gradient in the place of the features, and added to the last argument."""
    if len(args) == 8:
        _batch.group_points_grad_wrapper(*args)
        return
    _, _, _, grad, idx, to = args
    to.index_add_(0, idx.long().flatten(), grad.flatten(0, 1))


def interpolation_forward_cuda(*args: Any) -> None:
    """(b, c, m, n, features, idx, weight, out), or (n, c, k, input, idx, weight, out) of a list."""
    if len(args) == 8:
        _batch.three_interpolate_wrapper(*args)
        return
    _, _, _, points, idx, weight, out = args
    out.add_((points[idx.long()] * weight[..., None]).sum(1))


def interpolation_backward_cuda(*args: Any) -> None:
    """(b, c, n, m, grad, idx, weight, to), or (n, c, k, grad, idx, weight, to) of a list."""
    if len(args) == 8:
        _batch.three_interpolate_grad_wrapper(*args)
        return
    _, _, _, grad, idx, weight, to = args
    to.index_add_(0, idx.long().flatten(), (grad[:, None] * weight[..., None]).flatten(0, 1))


# --- of lists only: attention over the neighbours of each point ------------------------------------------


def subtracted(input1: Tensor, input2: Tensor, idx: Tensor) -> Tensor:
    """[n, c], [n, c], idx [n, s] → [n, s, c]: each point's own minus those of its neighbours."""
    return input1[:, None] - input2[idx.long()]


def aggregated(points: Tensor, position: Tensor, weight: Tensor, idx: Tensor) -> Tensor:
    """[n, c], position [n, s, c], weight [n, s, w], idx [n, s] → [n, c]; channel i has weight i mod w."""
    n, s, c = position.shape
    weighted = (points[idx.long()] + position).view(n, s, c // weight.shape[-1], weight.shape[-1])
    return (weighted * weight[:, :, None]).sum(1).flatten(1)


def add_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    fixed: Sequence[Any],
    grad: Tensor,
    to: Sequence,
) -> None:
    """Adds to each of ``to`` the gradient of ``function(*inputs, *fixed)`` to that of ``inputs``."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        found = torch.autograd.grad(function(*leaves, *fixed), leaves, grad)
    for place, value in zip(to, found, strict=True):
        place.add_(value)


def subtraction_forward_cuda(
    n: int, nsample: int, c: int, input1: Tensor, input2: Tensor, idx: Tensor, out: Tensor
) -> None:
    """See :func:`subtracted`."""
    out.copy_(subtracted(input1, input2, idx))


def subtraction_backward_cuda(
    n: int, nsample: int, c: int, idx: Tensor, grad: Tensor, grad1: Tensor, grad2: Tensor
) -> None:
    """Adds the gradients of :func:`subtracted`, grad [n, nsample, c], to grad1 and grad2 [n, c]."""
    add_gradients(subtracted, (grad1, grad2), (idx,), grad, (grad1, grad2))


def aggregation_forward_cuda(
    n: int, nsample: int, c: int, w_c: int, points: Tensor, position: Tensor, weight: Tensor, idx: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """See :func:`aggregated`."""
    out.add_(aggregated(points, position, weight, idx))


def aggregation_backward_cuda(
    n: int, nsample: int, c: int, w_c: int, points: Tensor, position: Tensor, weight: Tensor, idx: Tensor,
    grad: Tensor, grad_points: Tensor, grad_position: Tensor, grad_weight: Tensor,
) -> None:  # fmt: skip
    """Adds the gradients of :func:`aggregated`, grad [n, c], to the last three."""
    add_gradients(
        aggregated, (points, position, weight), (idx,), grad, (grad_points, grad_position, grad_weight)
    )
