"""What the reference students share: checks of the input, sampling, and layers over points and edges.

Features are rows, [B, N, C], between stages. Inside a stage they are images [B, C, M, S] as the public code's
convolutions take them, in channels-last memory, so that turning one into the other copies nothing and a 1x1
convolution is one matrix product.

Layers are *called*, so that hooks, pruning, parametrisations and replacements (LoRA, SyncBatchNorm, a
quantisation stub) do what they are there for. A layer's weights are read without calling it only where
:func:`is_plain` says that nobody would notice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from pointcmt import ops
from pointcmt.types import PointFeatures


class Student(nn.Module, ABC):
    """A classifier of points: an encoder, and a head on what it says of the whole cloud."""

    @abstractmethod
    def encode(self, points: Tensor) -> PointFeatures:
        """points [B, N, in_channels] -> global feature [B, D], local [B, M, C], centres [B, M, 3]."""

    @abstractmethod
    def head(self, feature: Tensor) -> Tensor:
        """Global feature [B, D] -> logits [B, num_classes]."""

    def forward(self, points: Tensor) -> Tensor:
        """points [B, N, in_channels] -> logits [B, num_classes]."""
        return self.head(self.encode(points).global_)


class Segmenter(nn.Module, ABC):
    """Class scores for every point: an encoder and decoder, and a head on what they say of each point.

    Args:
        name: for messages.
        in_channels: C of the points, their coordinates first.
        categories: how many categories of shapes there are, where the scores depend on the shape's; 0: they
            do not.

    Attributes:
        pool: called with the cloud's global feature [B, D], changes nothing: for hooks.
    """

    def __init__(self, name: str, in_channels: int, categories: int = 0) -> None:
        super().__init__()
        self.name, self.in_channels, self.categories = name, in_channels, categories
        self.pool = nn.Identity()

    @abstractmethod
    def encode(self, points: Tensor, category: Tensor | None = None) -> PointFeatures:
        """points [B, N, in_channels], category int64 [B] -> global feature [B, D], a feature for each point
        [B, N, C], and the points [B, N, 3]."""

    @abstractmethod
    def score(self, local: Tensor) -> Tensor:
        """A feature for each point [B, N, C] -> logits [B, N, num_classes]."""

    def forward(self, points: Tensor, category: Tensor | None = None) -> Tensor:
        """points [B, N, in_channels] -> logits [B, N, num_classes].

        Args:
            points: the coordinates first.
            category: int64 [B], of each shape, for networks of parts. None: not known, as in pre-training;
                zeros stand in for it.
        """
        local = self.encode(points, category).local
        assert local is not None
        return self.score(local)

    def one_hot(self, points: Tensor, category: Tensor | None) -> Tensor:
        """The shapes' categories [B, categories], zeros where they are not known.

        Raises:
            ValueError: not one int64 category for each shape, or one that is out of range (checked on a CPU).
        """
        if category is None:
            return points.new_zeros(len(points), self.categories)
        if category.shape != points.shape[:1] or category.dtype != torch.int64:
            raise ValueError(
                f"{self.name}: category is {category.dtype} {list(category.shape)}; expected int64 "
                f"[{len(points)}], a number from 0 to {self.categories - 1} for each shape"
            )
        if category.device.type == "cpu" and len(category):
            low, high = int(category.min()), int(category.max())
            if not 0 <= low <= high < self.categories:
                raise ValueError(
                    f"{self.name}: categories from {low} to {high}; expected 0 to {self.categories - 1}. "
                    "Build the network with categories=<their number>"
                )
        return F.one_hot(category, self.categories).to(points.dtype)


def interpolate(near: Tensor, far: Tensor, features: Tensor, squared: bool) -> Tensor:
    """Features [B, M, C] of points ``far`` [B, M, 3] at points ``near`` [B, N, 3]: the mean of the three
    nearest, weighted by the inverse distance, or by its square.

    Source: Qi et al., PointNet++ (NeurIPS 2017), section 3.4, where it is the square. yanx27's code has that,
    OpenPoints' the plain distance.
    """
    if far.shape[1] == 1:
        return features.expand(-1, near.shape[1], -1)
    distance, idx = ops.three_nn(near, far)
    weight = 1 / ((distance.square() if squared else distance) + 1e-8)
    weight = (weight / weight.sum(-1, keepdim=True)).to(features.dtype)
    return ops.three_interpolate(features.transpose(1, 2).contiguous(), idx, weight).transpose(1, 2)


def check_points(student: str, points: Tensor, in_channels: int, at_least: int, why: str = "") -> None:
    """ValueError unless points are floating [B, N, in_channels] with B ≥ 1 and N ≥ at_least."""
    if points.dim() != 3 or not points.is_floating_point() or points.shape[2] != in_channels:
        hint = ""
        if points.dim() == 3 and points.shape[1] == in_channels:
            hint = "; transpose [B, C, N] to [B, N, C] first"
        raise ValueError(
            f"{student} expects floating-point points [B, N, {in_channels}], got {points.dtype} of shape "
            f"{list(points.shape)}{hint}"
        )
    if points.shape[0] == 0:
        raise ValueError(f"{student} expects at least one cloud, got points of shape {list(points.shape)}")
    if points.shape[1] < at_least:
        raise ValueError(
            f"{student} needs at least {at_least} points per cloud{why}, got points of shape "
            f"{list(points.shape)}"
        )


def check_options(
    student: str, num_classes: int, feature_dim: int, width: float, dropout: float, in_channels: int = 3
) -> None:
    """ValueError that names the option which is out of range."""
    for name, value in (("num_classes", num_classes), ("feature_dim", feature_dim)):
        if value < 1:
            raise ValueError(f"{student}: {name} must be at least 1, got {value}")
    if not width > 0:
        raise ValueError(f"{student}: width must be positive, got {width}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{student}: dropout must be in [0, 1), got {dropout}")
    if in_channels < 3:
        raise ValueError(f"{student}: in_channels counts x, y, z and must be at least 3, got {in_channels}")


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, a multiple of 8 (exactly ``channels`` at width 1), at least 8."""
    return channels if width == 1 else max(8, 8 * round(channels * width / 8))


def split(points: Tensor) -> tuple[Tensor, Tensor | None]:
    """points [B, N, C] -> coordinates [B, N, 3] and what follows them, None where nothing does."""
    return points[..., :3].contiguous(), points[..., 3:] if points.shape[-1] > 3 else None


def sample(xyz: Tensor, npoint: int, random_start: bool = False) -> Tensor:
    """Furthest point sampling of min(npoint, N) points, from point 0 or from a random one of each cloud.

    Args:
        xyz: [B, N, 3].

    Returns:
        int64 [B, min(npoint, N)].
    """
    batch, n, _ = xyz.shape
    npoint = min(npoint, n)
    if not random_start:
        return ops.furthest_point_sample(xyz, npoint)
    # the operator starts at point 0: put another point there, and translate back
    start = torch.randint(n, (batch,), device=xyz.device)
    order = torch.arange(n, device=xyz.device).expand(batch, n).clone()
    order[:, 0] = start
    order.scatter_(1, start[:, None], 0)
    shuffled = xyz.gather(1, order[..., None].expand_as(xyz))
    return order.gather(1, ops.furthest_point_sample(shuffled, npoint))


def rows(features: Tensor, idx: Tensor) -> Tensor:
    """Rows of ``features`` [B, N, C] named by ``idx`` [B, ...]: [B, ..., C]."""
    batch, n, channels = features.shape
    offset = torch.arange(batch, device=idx.device).view(-1, *[1] * (idx.dim() - 1)) * n
    flat = features.reshape(batch * n, channels).index_select(0, (idx + offset).flatten())
    return flat.view(*idx.shape, channels)


# --------------------------------------------------------------------------------------------------------
# Layers

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.LeakyReLU)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def is_plain(*modules: nn.Module) -> bool:
    """Whether nobody would notice if these layers' arithmetic were done without calling them.

    True of torch's own classes without hooks (global ones too), parametrisations, pruning, a ``forward`` of
    their own or a compiled one.
    """
    return not any(getattr(_module, name) for name in _GLOBAL_HOOKS) and all(
        type(module) in _PLAIN
        and not any(getattr(module, name) for name in _HOOKS)
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        for module in modules
    )


def image(x: Tensor) -> Tensor:
    """Rows [B, M, S, C] as an image [B, C, M, S], or [B, N, C] as [B, C, N]; nothing is copied."""
    return x.movedim(-1, 1)


def highest(x: Tensor) -> Tensor:
    """The maximum over the samples of an image [B, C, M, S]: rows [B, M, C]."""
    return x.permute(0, 2, 3, 1).amax(2)


def norm_relu(x: Tensor, norm: nn.Module) -> Tensor:
    """``relu(norm(x))``; what a plain layer returns nobody else holds, so it is overwritten."""
    return F.relu(norm(x), inplace=is_plain(norm))


# --------------------------------------------------------------------------------------------------------
# Layers over edges

Part = tuple[Tensor | None, Tensor | None]
"""What some channels of an edge owe to its point j and to its centre i, their sum: features of the points
[B, N, C] and of the centres [B, M, C], None for nothing. (x, -x of the centres) is x_j - x_i."""


class Edges(NamedTuple):
    """From each of M centres to S of N points.

    Attributes:
        parts: the edges' channels, in order.
        idx: int64 [B, M, S], the points.
    """

    parts: Sequence[Part]
    idx: Tensor

    def gathered(self) -> Tensor:
        """[B, C, M, S]: every edge with all its channels, as the public code writes them out."""
        found = []
        for of_points, of_centres in self.parts:
            if of_points is None:
                assert of_centres is not None
                found.append(of_centres[:, :, None].expand(-1, -1, self.idx.shape[2], -1))
            else:
                near = rows(of_points, self.idx)
                found.append(near if of_centres is None else near + of_centres[:, :, None])
        return image(torch.cat(found, -1) if len(found) > 1 else found[0])

    def projected(self, weight: Tensor, bias: Tensor | None) -> Edges:
        """The edges after a 1x1 convolution with ``weight`` [C', C, ...], in one part.

        It is linear: it is applied to the N points and the M centres instead of to the M · S edges. In the
        weight's precision, also under autocast: the sum of two such products is small beside them, and of it
        half precision would leave little.
        """
        sums: list[Tensor | None] = [None, bias]
        start = 0
        with torch.autocast(weight.device.type, enabled=False):
            for part in self.parts:
                width = next(x.shape[-1] for x in part if x is not None)
                matrix = weight[:, start : start + width].flatten(1).T
                start += width
                for side, x in enumerate(part):
                    if x is not None:
                        y, before = x.to(weight.dtype) @ matrix, sums[side]
                        sums[side] = y if before is None else before + y
        return Edges([(sums[0], sums[1])], self.idx)


def convolve(edges: Edges, conv: Any) -> Tensor:
    """A 1x1 convolution on edges: [B, C', M, S]."""
    if is_plain(conv):
        return edges.projected(conv.weight, conv.bias).gathered()
    return conv(edges.gathered())


class Layer(nn.Sequential):
    """1x1 convolution, and where given normalisation and activation, on [B, C, N], [B, C, M, S] or edges.

    Where the public code has ``Conv1d`` and ``BatchNorm1d``, M groups of S samples are given to them as
    [B · M, C, S]. So are they here to modules that are not plain; plain ones do the same in channels-last
    memory as it is.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.flat = isinstance(parts[0], nn.Conv1d)

    def forward(self, x: Tensor | Edges) -> Tensor:
        """[B, C, N] -> [B, C', N]; [B, C, M, S] or edges -> [B, C', M, S]."""
        parts: list[Any] = list(self)  # mypy knows no more of them than Module
        conv, *after = parts
        if isinstance(x, Edges):
            x = convolve(x, conv) if is_plain(conv) else self.call(conv, x.gathered())
        elif x.dim() == 3:
            return self.forward(x.unsqueeze(2)).squeeze(2)
        elif self.flat and is_plain(conv):
            x = F.conv2d(x, conv.weight[..., None], conv.bias)
        else:
            x = self.call(conv, x)
        return self.after(x, *after)

    def after(self, x: Tensor, norm: nn.Module | None = None, act: nn.Module | None = None) -> Tensor:
        """What follows the convolution."""
        plain = norm is not None and is_plain(norm)
        if norm is not None and plain and self.flat:
            last = x.permute(0, 2, 3, 1)
            x = norm(last.reshape(-1, x.shape[1])).view(last.shape).permute(0, 3, 1, 2)
        elif norm is not None:
            x = self.call(norm, x)
        if act is None:
            return x
        if not is_plain(act):
            return self.call(act, x)
        slope = act.negative_slope if isinstance(act, nn.LeakyReLU) else 0.0
        return F.leaky_relu(x, slope, inplace=plain)

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        """A module on [B, C, M, S], in the shape that it expects."""
        if not self.flat:
            return module(x)
        batch, _, groups, _ = x.shape
        return module(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, groups)).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------
# Normalisation, activation and the maximum over the samples in one


def norm_act_highest(x: Tensor | Edges, norm: nn.Module, slope: float = 0.0) -> Tensor:
    """The maximum over the samples of ``leaky_relu(norm(x), slope)``: rows [B, M, C].

    Args:
        x: [B, C, M, S], or edges of one part, which the fused operator gathers as it goes.
        norm: BatchNorm2d or what stands in its place.
        slope: 0 for ReLU; at most 1 and not negative, so that the activation keeps the order.
    """
    rows_of_x, around = (
        (x.parts[0][0], x.parts[0][1]) if isinstance(x, Edges) else (x.permute(0, 2, 3, 1), None)
    )
    if (
        rows_of_x is None
        or (isinstance(x, Edges) and around is None)
        or not (is_plain(norm) and isinstance(norm, nn.BatchNorm2d) and norm.affine)
        or norm.momentum is None
        or norm.num_batches_tracked is None
        or norm.weight.dtype not in (rows_of_x.dtype, torch.float32)
        or norm.num_features % 8  # the operator's vectors
    ):
        x = x.gathered() if isinstance(x, Edges) else x
        return highest(F.leaky_relu(norm(x), slope, inplace=is_plain(norm)))
    if norm.training:
        norm.num_batches_tracked.add_(1)
    statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
    rule = norm.training, norm.momentum, norm.eps, slope
    # half precision is widened: one pass more, and still less than normalising and pooling apart
    if isinstance(x, Edges):
        return ops.norm_act_max(rows_of_x, *statistics, *rule, around, x.idx)
    return ops.norm_act_max(rows_of_x.to(norm.weight.dtype), *statistics, *rule).to(rows_of_x.dtype)
