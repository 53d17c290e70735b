"""PointMLP and PointMLP-Elite (Ma et al., ICLR 2022).

Architecture, parameter names and shapes of ma-xu/pointMLP-pytorch (``pointMLP`` and ``pointMLPElite``, the
same in its ModelNet40 and ScanObjectNN folders), whose trained classifiers are public.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pointcmt.ops import knn
from pointcmt.students import _blocks as blocks
from pointcmt.types import PointFeatures


class _Stages(NamedTuple):
    """What differs between the variants: embedding channels, bottleneck ratio, and per stage the
    channels' growth and the number of residual blocks before and after pooling."""

    embedding: int
    bottleneck: float
    growth: tuple[int, ...]
    blocks: tuple[int, ...]


VARIANTS = {
    "full": _Stages(64, 1.0, (2, 2, 2, 2), (2, 2, 2, 2)),
    "elite": _Stages(32, 0.25, (2, 2, 2, 1), (1, 1, 2, 1)),
}
_EPSILON = 1e-5  # the public code's guard of the geometric affine's standard deviation
_SMALLEST = 1e-20  # variance below which a cloud counts as one point: no gradient passes


def _sum(x: Tensor) -> Tensor:
    """[B, N, C] -> float64 [B]."""
    return x.sum((1, 2), dtype=torch.float64)


class ConvNorm(nn.Module):
    """1x1 convolution, BatchNorm, ReLU; ``net`` as in the public code."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.net = _layer(in_channels, out_channels, nn.ReLU())

    def forward(self, x: Tensor | blocks.Edges) -> Tensor:
        """[B, in_channels, N] -> [B, out_channels, N], edges -> [B, out_channels, M, k]."""
        return self.net(x)


class Residual(nn.Module):
    """Bottleneck of two 1x1 convolutions with a skip connection, on [B, C, N] or [B, C, M, k]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.net1 = _layer(channels, hidden, nn.ReLU())
        self.net2 = _layer(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return torch.relu_(self.net2(self.net1(x)) + x)


def _layer(in_channels: int, out_channels: int, *act: nn.Module) -> blocks.Layer:
    return blocks.Layer(
        nn.Conv1d(in_channels, out_channels, 1, bias=False), nn.BatchNorm1d(out_channels), *act
    )


class Groups(NamedTuple):
    """k points around each of M anchors, as :class:`LocalGrouper` finds them.

    Attributes:
        features: [B, N, C], of all points.
        anchors: [B, M, C], the anchors' own.
        idx: int64 [B, M, k], the points of each group.
        scale: [B, 1, C] and shift [C], of the geometric affine: its channels are
            ``scale * (f_j - f_i) + shift``.
    """

    features: Tensor
    anchors: Tensor
    idx: Tensor
    scale: Tensor
    shift: Tensor


class LocalGrouper(nn.Module):
    """Samples half of the points, finds groups around them, and the geometric affine (section 3.2).

    Args:
        channels: of the features.
        points: of a cloud with more, half of so many are sampled.
        k: points of a group.
        random_start: in training mode furthest point sampling starts at a random point.
    """

    def __init__(self, channels: int, points: int, k: int, random_start: bool = False) -> None:
        super().__init__()
        self.points, self.k, self.random_start = points, k, random_start
        self.affine_alpha = nn.Parameter(torch.ones(1, 1, 1, channels))
        self.affine_beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, xyz: Tensor, features: Tensor) -> tuple[Tensor, Groups]:
        """[B, N, 3] and [B, N, C] -> anchors [B, M, 3] and the groups around them."""
        n = xyz.shape[1]
        chosen = blocks.sample(xyz, min(self.points, n) // 2, self.random_start and self.training)
        centres, anchors = blocks.rows(xyz, chosen), blocks.rows(features, chosen)
        idx = knn(centres.detach(), xyz.detach(), min(self.k, n))[1]
        scale = self.affine_alpha[0] / (self.spread(features, anchors, idx) + _EPSILON)
        # a copy: a view of a parameter asks for gradients even where there are none, which confuses hooks
        return centres, Groups(features, anchors, idx, scale, self.affine_beta.flatten().clone())

    def spread(self, features: Tensor, anchors: Tensor, idx: Tensor) -> Tensor:
        """Standard deviation of f_j - f_i over a cloud's groups and channels: [B, 1, 1].

        From sums over points and anchors, so that the differences, the largest tensor of a stage, are not
        written out: with n_ij the number of times that point j is in group i, the sum of |f_j - f_i|^2 is
        sum_j n_j |f_j|^2 + k sum_i |f_i|^2 - 2 sum_i f_i . (sum_j n_ij f_j).

        Args:
            features: [B, N, C]; anchors: [B, M, C]; idx: [B, M, k].
        """
        batch, groups, k = idx.shape
        n, channels = features.shape[1:]
        with torch.autocast(features.device.type, enabled=False):
            # a difference of the same shift from both is the same difference, of smaller numbers
            shift = features.detach().mean(1, keepdim=True)
            dtype = torch.promote_types(features.dtype, torch.float32)
            points, centres = (features - shift).to(dtype), (anchors - shift).to(dtype)
            counts = points.new_zeros(batch, groups, n).scatter_add_(2, idx, points.new_ones(idx.shape))
            of_group = counts @ points
            members = counts.sum(1)[..., None]
            total = _sum(members * points) - k * _sum(centres)
            squares = _sum(members * points.square()) + k * _sum(centres.square())
            squares = squares - 2 * _sum(of_group * centres)
            size = groups * k * channels
            variance = (squares - total.square() / size) / max(1, size - 1)
            return variance.clamp_min(_SMALLEST).sqrt().to(points.dtype)[:, None, None]


class PreExtraction(nn.Module):
    """Residual MLP over each group, then the maximum over it."""

    def __init__(self, in_channels: int, channels: int, hidden: int, count: int) -> None:
        super().__init__()
        self.transfer = ConvNorm(2 * in_channels, channels)
        self.operation = nn.Sequential(*[Residual(channels, hidden) for _ in range(count)])

    def forward(self, groups: Groups) -> Tensor:
        """M groups -> [B, M, C']; ``transfer`` sees [scale (f_j - f_i) + shift, f_i]."""
        features, anchors, idx, scale, shift = groups
        edges = blocks.Edges([(features * scale, shift - anchors * scale), (None, anchors)], idx)
        return blocks.highest(self.operation(self.transfer(edges)))


class PosExtraction(nn.Module):
    """Residual MLP over the anchors."""

    def __init__(self, channels: int, hidden: int, count: int) -> None:
        super().__init__()
        self.operation = nn.Sequential(*[Residual(channels, hidden) for _ in range(count)])

    def forward(self, centres: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, 3] and [B, M, C] -> the same centres, and features [B, M, C]."""
        return centres, self.operation(features.transpose(1, 2)).transpose(1, 2)


class PointMLP(blocks.Student):
    """PointMLP; see :func:`pointmlp`. Its classifier's shape feature is the output of ``classifier[2]``."""

    def __init__(
        self,
        num_classes: int,
        variant: str = "full",
        width: float = 1.0,
        feature_dim: int = 512,
        dropout: float = 0.5,
        points: int = 1024,
        k: int = 24,
        random_start: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"pointmlp: variant must be 'full' or 'elite', got {variant!r}")
        blocks.check_options("pointmlp", num_classes, feature_dim, width, dropout)
        if k < 1:
            raise ValueError(f"pointmlp: k must be at least 1, got {k}")
        stages = VARIANTS[variant]
        self.smallest = 2 ** len(stages.growth)
        if points < self.smallest:
            raise ValueError(f"pointmlp: points must be at least {self.smallest}, got {points}")
        channels = blocks.scaled(stages.embedding, width)
        self.embedding = ConvNorm(3, channels)
        self.local_grouper_list = nn.ModuleList()
        self.pre_blocks_list = nn.ModuleList()
        self.pos_blocks_list = nn.ModuleList()
        for growth, count in zip(stages.growth, stages.blocks, strict=True):
            out_channels = channels * growth
            hidden = int(out_channels * stages.bottleneck)
            self.local_grouper_list.append(LocalGrouper(channels, points, k, random_start))
            self.pre_blocks_list.append(PreExtraction(channels, out_channels, hidden, count))
            self.pos_blocks_list.append(PosExtraction(out_channels, hidden, count))
            channels = out_channels
        last = blocks.scaled(256, width)
        self.classifier = nn.Sequential(
            nn.Linear(channels, feature_dim),
            nn.BatchNorm1d(feature_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(feature_dim, last),
            nn.BatchNorm1d(last),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(last, num_classes),
        )

    def encode(self, points: Tensor) -> PointFeatures:
        """points [B, N, 3] -> maximum over the last stage's anchors; their features and coordinates."""
        blocks.check_points(
            "pointmlp", points, 3, at_least=self.smallest, why=" (each of its stages halves the cloud)"
        )
        xyz, x = points, self.embedding(points.transpose(1, 2)).transpose(1, 2)
        for grouper, pre, pos in zip(
            self.local_grouper_list, self.pre_blocks_list, self.pos_blocks_list, strict=True
        ):
            xyz, groups = grouper(xyz, x)
            xyz, x = pos(xyz, pre(groups))
        return PointFeatures(x.amax(1), x, xyz)

    def head(self, feature: Tensor) -> Tensor:
        """[B, channels of the last stage] -> logits [B, num_classes]."""
        return self.classifier(feature)


def pointmlp(
    num_classes: int,
    variant: str = "full",
    width: float = 1.0,
    feature_dim: int = 512,
    dropout: float = 0.5,
    **options: Any,
) -> PointMLP:
    """PointMLP classifier: points [B, N, 3] -> logits [B, num_classes].

    Args:
        num_classes: K.
        variant: "full" (PointMLP) or "elite" (PointMLP-Elite).
        width: scales every layer except the shape feature; 1 is the published network.
        feature_dim: size of the shape feature before the classifier.
        dropout: of both dropout layers.
        options: ``points`` (1024): the four stages keep a half, a quarter, … of this many points, or of N
            where the cloud has fewer; ``k`` (24) neighbours per group, all there are where a stage has
            fewer; ``random_start``: in training mode furthest point sampling starts at a random point.

    Raises:
        ValueError: options out of range; in forward, points that are not [B, N, 3] or N < 16.

    Source: Ma et al. 2022, section 3; ma-xu/pointMLP-pytorch.
    """
    return PointMLP(num_classes, variant, width, feature_dim, dropout, **options)
