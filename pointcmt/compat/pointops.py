"""``pointops`` of Pointcept: neighbours, sampling and attention over clouds in one list.

All clouds of a batch are one list ``xyz`` [n, 3]; ``offset`` [b] holds their ends. ``new_xyz`` [m, 3] with
``new_offset`` are queries; where they are None, the points themselves. Indices are int32, and −1 where there
was no further point. Gradients go to features, weights and positions, never to coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt.compat import pointops_cuda
from pointcmt.compat._scatter import ZeroGradient
from pointcmt.compat.pointops_cuda import NO_NEIGHBOUR, clouds, nearest

__all__ = [
    "aggregation",
    "attention_fusion_step",
    "attention_relation_step",
    "ball_query",
    "ball_query_and_group",
    "batch2offset",
    "farthest_point_sampling",
    "grouping",
    "grouping2",
    "interpolation",
    "interpolation2",
    "knn_query",
    "knn_query_and_group",
    "offset2batch",
    "query_and_group",
    "random_ball_query",
    "subtraction",
]

_SAME_POINT = 1e-5  # squared: within it a point is in every ball, whatever its inner radius


@torch.no_grad()
def farthest_point_sampling(xyz: Tensor, offset: Tensor, new_offset: Tensor) -> Tensor:
    """→ int32 [new_offset[-1]], indices into xyz; each cloud begins with its first point."""
    idx = torch.zeros(int(new_offset[-1]), dtype=torch.int32, device=xyz.device)
    pointops_cuda.furthestsampling_cuda(len(offset), 0, xyz, offset, new_offset, None, idx)
    return idx


def _queries(
    xyz: Tensor, offset: Tensor, new_xyz: Tensor | None, new_offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    return (xyz, offset) if new_xyz is None or new_offset is None else (new_xyz, new_offset)


def _nothing(xyz: Tensor, rows: int, nsample: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances [rows, nsample] of no neighbour."""
    shape = (rows, nsample)
    return torch.full(shape, -1, dtype=torch.int64, device=xyz.device), xyz.new_full(shape, NO_NEIGHBOUR)


@torch.no_grad()
def knn_query(
    nsample: int, xyz: Tensor, offset: Tensor, new_xyz: Tensor | None = None, new_offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """→ indices [m, nsample], nearest first, and Euclidean distances."""
    queries, ends = _queries(xyz, offset, new_xyz, new_offset)
    idx, squared = nearest(nsample, xyz, queries, offset, ends, -1)
    return idx.int(), squared.sqrt()


def _within(max_radius: float, min_radius: float, xyz: Tensor, new_xyz: Tensor) -> tuple[Tensor, Tensor]:
    squared = (new_xyz[:, None] - xyz).square().sum(-1)
    return squared, (squared <= _SAME_POINT) | ((squared >= min_radius**2) & (squared < max_radius**2))


@torch.no_grad()
def ball_query(
    nsample: int, max_radius: float, min_radius: float, xyz: Tensor, offset: Tensor,
    new_xyz: Tensor | None = None, new_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """→ indices [m, nsample] of points between the radii, by distance, and distances.

    Of a ball that holds more points, every (count / nsample)-th is taken.
    """
    queries, ends = _queries(xyz, offset, new_xyz, new_offset)
    idx, found = _nothing(xyz, len(queries), nsample)
    for of, to in clouds(offset, ends):
        squared, inside = _within(max_radius, min_radius, xyz[of], queries[to])
        ordered, order = squared.masked_fill(~inside, torch.inf).sort(dim=-1, stable=True)
        count = inside.sum(-1, keepdim=True)
        place = torch.arange(nsample, device=xyz.device)
        spread = (count.float() / nsample * place).long()
        place = torch.where(count > nsample, spread, place.expand_as(spread))
        has = place < count
        place = place.clamp(max=max(0, squared.shape[1] - 1))
        idx[to] = torch.where(has, order.gather(1, place) + of.start, -1)
        found[to] = torch.where(has, ordered.gather(1, place), found[to])
    return idx.int(), found.sqrt()


@torch.no_grad()
def random_ball_query(
    nsample: int, max_radius: float, min_radius: float, xyz: Tensor, offset: Tensor,
    new_xyz: Tensor | None = None, new_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """→ indices [m, nsample] of points between the radii, the first in one random order, and distances."""
    queries, ends = _queries(xyz, offset, new_xyz, new_offset)
    idx, found = _nothing(xyz, len(queries), nsample)
    for of, to in clouds(offset, ends):
        order = torch.randperm(of.stop - of.start, device=xyz.device)
        squared, inside = _within(max_radius, min_radius, xyz[of][order], queries[to])
        first = torch.where(inside, torch.arange(len(order), device=xyz.device), len(order))
        first = first.sort(dim=-1).values[:, :nsample]
        has = first < len(order)
        first = first.clamp(max=max(0, len(order) - 1))
        idx[to, : first.shape[1]] = torch.where(has, order[first] + of.start, -1)
        found[to, : first.shape[1]] = torch.where(has, squared.gather(1, first), NO_NEIGHBOUR)
    return idx.int(), found.sqrt()


def grouping(
    idx: Tensor, feat: Tensor, xyz: Tensor, new_xyz: Tensor | None = None, with_xyz: bool = False
) -> Tensor:
    """feat [n, c], idx [m, s] → [m, s, c], or [m, s, 3 + c] with relative coordinates; zeros for idx −1."""
    queries = xyz if new_xyz is None else new_xyz
    index, missing = idx.long().clamp(min=0), (idx < 0)[..., None]
    grouped = feat[index].masked_fill(missing, 0)
    if not with_xyz:
        return grouped
    return torch.cat([(xyz[index] - queries[:, None]).masked_fill(missing, 0), grouped], -1)


def grouping2(feat: Tensor, idx: Tensor) -> Tensor:
    """feat [n, c], idx [m, s] → [m, s, c]."""
    return feat[idx.long()]


def interpolation(
    xyz: Tensor, new_xyz: Tensor, feat: Tensor, offset: Tensor, new_offset: Tensor, k: int = 3
) -> Tensor:
    """feat [n, c] at xyz → [m, c] at new_xyz, by inverse distance to the nearest k."""
    idx, distance = knn_query(k, xyz, offset, new_xyz, new_offset)
    closeness = 1.0 / (distance + 1e-8)  # theirs
    weight = closeness / closeness.sum(dim=1, keepdim=True)
    return (feat[idx.long()] * weight[..., None]).sum(1)


interpolation2 = interpolation


def subtraction(input1: Tensor, input2: Tensor, idx: Tensor) -> Tensor:
    """[n, c], [n, c], idx [n, s] → [n, s, c]: each point's own minus those of its neighbours."""
    return pointops_cuda.subtracted(input1, input2, idx)


def aggregation(points: Tensor, position: Tensor, weight: Tensor, idx: Tensor) -> Tensor:
    """[n, c], position [n, s, c], weight [n, s, w], idx [n, s] → [n, c]; channel i has weight i mod w."""
    return pointops_cuda.aggregated(points, position, weight, idx)


def attention_relation_step(
    query: Tensor, key: Tensor, weight: Tensor, index_target: Tensor, index_refer: Tensor
) -> Tensor:
    """query and key [n, g, c], weight [c] → [M, g]: Σ query · key · weight of each pair; the weight gets no
    gradient, as there.
    """
    weight = ZeroGradient.apply(weight) if weight.requires_grad else weight
    return (query[index_target.long()] * key[index_refer.long()] * weight).sum(-1)


def attention_fusion_step(weight: Tensor, value: Tensor, index_target: Tensor, index_refer: Tensor) -> Tensor:
    """weight [M, g], value [n, g, c] → [n, g, c]: the weighted sum of each target's values."""
    weighted = weight[..., None] * value[index_refer.long()]
    return torch.zeros_like(value).index_add(0, index_target.long(), weighted)


def knn_query_and_group(
    feat: Tensor, xyz: Tensor, offset: Tensor | None = None, new_xyz: Tensor | None = None,
    new_offset: Tensor | None = None, idx: Tensor | None = None, nsample: int | None = None,
    with_xyz: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`grouping` of the nearest ``nsample``, or of ``idx``; and the indices."""
    if idx is None:
        if nsample is None or offset is None:
            raise ValueError("knn_query_and_group needs idx, or nsample and offset")
        idx, _ = knn_query(nsample, xyz, offset, new_xyz, new_offset)
    return grouping(idx, feat, xyz, new_xyz, with_xyz), idx


def ball_query_and_group(
    feat: Tensor, xyz: Tensor, offset: Tensor | None = None, new_xyz: Tensor | None = None,
    new_offset: Tensor | None = None, idx: Tensor | None = None, max_radio: float | None = None,
    min_radio: float = 0, nsample: int | None = None, with_xyz: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`grouping` of the points between the radii (their spelling), or of ``idx``; and the indices."""
    if idx is None:
        if nsample is None or offset is None or max_radio is None:
            raise ValueError("ball_query_and_group needs idx, or nsample, offset and max_radio")
        idx, _ = ball_query(nsample, max_radio, min_radio, xyz, offset, new_xyz, new_offset)
    return grouping(idx, feat, xyz, new_xyz, with_xyz), idx


def query_and_group(
    nsample: int, xyz: Tensor, new_xyz: Tensor | None, feat: Tensor, idx: Tensor | None, offset: Tensor,
    new_offset: Tensor, dilation: int = 0, with_feat: bool = True, with_xyz: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The nearest ``nsample``, every (dilation + 1)-th of them → [m, s, 3 + c] (or [m, s, c]), and indices.

    Where a cloud has too few points for the dilation, it is made as small as fits.
    """
    queries = xyz if new_xyz is None else new_xyz
    if idx is None:
        reach = 1 + (nsample - 1) * (dilation + 1)
        near, _ = knn_query(reach, xyz, offset, queries, new_offset)
        idx = torch.empty(len(queries), nsample, dtype=torch.int32, device=xyz.device)
        for of, to in clouds(offset, new_offset):
            size = of.stop - of.start
            step = 1 + dilation if size >= reach else (size - 1) / (nsample - 1)
            idx[to] = near[to][:, [int(step * i) for i in range(nsample)]]
    if not with_feat:
        return idx
    grouped = feat[idx.long()]
    if with_xyz:
        grouped = torch.cat([xyz[idx.long()] - queries[:, None], grouped], -1)
    return grouped, idx


def offset2batch(offset: Tensor) -> Tensor:
    """Ends of the clouds [b] → int64 [n], the cloud of each point."""
    sizes = torch.diff(offset.long(), prepend=offset.new_zeros(1).long())
    return torch.repeat_interleave(torch.arange(len(offset), device=offset.device), sizes)


def batch2offset(batch: Tensor) -> Tensor:
    """The cloud of each point [n] → int32 ends of the clouds [b]."""
    return batch.bincount().cumsum(0).int()
