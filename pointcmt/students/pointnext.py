"""PointNeXt-S (Qian et al., NeurIPS 2022), for classification.

Architecture, parameter names and shapes of guochengqian/openpoints (``BaseCls`` of ``PointNextEncoder`` and
``ClsHead`` with the options in ``pointnext-s.yaml`` of guochengqian/PointNeXt); trained ones are public.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pointcmt.ops import ball_query
from pointcmt.students import _blocks as blocks
from pointcmt.types import PointFeatures

# of the four stages that sample: neighbours, the first one's radius, and how much larger the next one's is
_NSAMPLE, _RADIUS, _GROWTH = 32, 0.15, 1.5


class Stem(nn.Module):
    """First stage: one layer per point, without normalisation."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(blocks.Layer(nn.Conv1d(in_channels, channels, 1)))

    def forward(self, xyz: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, 3] and [B, N, in_channels] -> the same points, and features [B, N, channels]."""
        return xyz, self.convs(features.transpose(1, 2)).transpose(1, 2)


class ResidualAbstraction(nn.Module):
    """Set abstraction with a skip connection: a part of the points, balls around them, shared MLP, maximum.

    Args:
        in_channels, channels: of the features before and after; half of ``channels`` lie between.
        radius: of the ball; the neighbours' relative coordinates are divided by it.
        nsample: neighbours in a ball, short ones filled with the first.
        random_start: in training mode furthest point sampling starts at a random point.
        stride: one of so many points is a centre.
        layers: of the shared MLP.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        radius: float,
        nsample: int,
        random_start: bool,
        stride: int = 2,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.radius, self.nsample, self.random_start, self.stride = radius, nsample, random_start, stride
        self.skipconv = blocks.Layer(nn.Conv1d(in_channels, channels, 1))
        self.convs = _shared_mlp(in_channels + 3, *[channels // 2] * (layers - 1), channels)
        self.act = nn.ReLU()

    def forward(self, xyz: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, 3] and [B, N, in_channels] -> centres [B, N // stride, 3] and features [.., channels]."""
        chosen = blocks.sample(xyz, xyz.shape[1] // self.stride, self.random_start and self.training)
        centres = blocks.rows(xyz, chosen)
        idx = ball_query(self.radius, self.nsample, xyz, centres)
        edges = blocks.Edges([(xyz / self.radius, -centres / self.radius), (features, None)], idx)
        skip = self.skipconv(blocks.rows(features, chosen).transpose(1, 2)).transpose(1, 2)
        return centres, self.act(blocks.highest(self.convs(edges)) + skip)


class Aggregation(nn.Module):
    """Last stage: shared MLP over all points with their coordinates, maximum."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.convs = _shared_mlp(in_channels + 3, channels, channels, last=True)

    def forward(self, xyz: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, 3] and [B, N, in_channels] -> the origin [B, 1, 3] and the feature [B, 1, channels]."""
        x = torch.cat([xyz, features], -1)[:, None]
        return xyz.new_zeros(len(xyz), 1, 3), blocks.highest(self.convs(blocks.image(x)))


def _shared_mlp(*channels: int, last: bool = False) -> nn.Sequential:
    """Layers from ``channels[0]`` to ``channels[-1]``; the last one has its activation where ``last``."""
    layers = [
        blocks.Layer(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
        for before, after in pairwise(channels)
    ]
    if not last:
        del layers[-1][2]
    return nn.Sequential(*layers)


def sampling_stages(
    in_channels: int,
    channels: Sequence[int],
    radius: float,
    growth: float,
    random_start: bool,
    **options: int,
) -> list[nn.Module]:
    """A stem, and a stage that samples to each further entry of ``channels``, of ever larger radii."""
    stages: list[nn.Module] = [Stem(in_channels, channels[0])]
    for before, after in pairwise(channels):
        stages.append(ResidualAbstraction(before, after, radius, _NSAMPLE, random_start, **options))
        radius *= growth
    return stages


class Encoder(nn.Module):
    """Six stages, each in a list of its own, as in the public code."""

    def __init__(self, in_channels: int, channels: list[int], random_start: bool) -> None:
        super().__init__()
        stages = sampling_stages(in_channels, channels[:5], _RADIUS, _GROWTH, random_start)
        stages.append(Aggregation(channels[4], channels[5]))
        self.encoder = nn.ModuleList(nn.ModuleList([stage]) for stage in stages)

    def forward(self, points: Tensor) -> PointFeatures:
        """points [B, N, in_channels] -> output of the last stage; centres and features of the one before."""
        stages = [next(stage.children()) for stage in self.encoder]
        xyz, local = points[..., :3].contiguous(), points
        for stage in stages[:-1]:
            xyz, local = stage(xyz, local)
        return PointFeatures(stages[-1](xyz, local)[1].flatten(1), local, xyz)


class Prediction(nn.Module):
    """Class head: two hidden layers with BatchNorm and dropout."""

    def __init__(
        self, channels: int, feature_dim: int, hidden: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.head = nn.Sequential(
            _hidden(channels, feature_dim),
            nn.Dropout(dropout),
            _hidden(feature_dim, hidden),
            nn.Dropout(dropout),
            nn.Sequential(nn.Linear(hidden, num_classes)),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """[B, channels] -> logits [B, num_classes]."""
        return self.head(feature)


def _hidden(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_channels, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU())


class PointNeXt(blocks.Student):
    """PointNeXt-S; see :func:`pointnext`. The shape feature of its classifier is the output of
    ``prediction.head[0]``."""

    def __init__(
        self,
        num_classes: int,
        width: float = 1.0,
        feature_dim: int = 512,
        dropout: float = 0.5,
        in_channels: int = 3,
        random_start: bool = False,
    ) -> None:
        super().__init__()
        blocks.check_options("pointnext", num_classes, feature_dim, width, dropout, in_channels)
        self.in_channels = in_channels
        channels = [blocks.scaled(count, width) for count in (32, 64, 128, 256, 512, 512)]
        self.encoder = Encoder(in_channels, channels, random_start)
        self.prediction = Prediction(
            channels[-1], feature_dim, blocks.scaled(256, width), num_classes, dropout
        )

    def encode(self, points: Tensor) -> PointFeatures:
        """points [B, N, in_channels] -> output of the last stage; centres and features of the one before."""
        blocks.check_points(
            "pointnext", points, self.in_channels, at_least=16, why=" (four of its stages halve the cloud)"
        )
        return self.encoder(points)

    def head(self, feature: Tensor) -> Tensor:
        """[B, 512] -> logits [B, num_classes]."""
        return self.prediction(feature)


def pointnext(
    num_classes: int, width: float = 1.0, feature_dim: int = 512, dropout: float = 0.5, **options: Any
) -> PointNeXt:
    """PointNeXt-S classifier: points [B, N, 3] -> logits [B, num_classes].

    Args:
        num_classes: K.
        width: scales every layer except the shape feature; 1 is the published network.
        feature_dim: size of the shape feature before the classifier.
        dropout: of both dropout layers.
        options: ``in_channels`` (3; 4 where the height follows the coordinates, as for ScanObjectNN in the
            public code); ``random_start``: in training mode furthest point sampling starts at a random
            point. Radii are in the points' unit: clouds are expected in the unit sphere.

    Raises:
        ValueError: options out of range; in forward, points that are not [B, N, in_channels] or N < 16.

    Source: Qian et al. 2022, section 3; guochengqian/openpoints, guochengqian/PointNeXt.
    """
    return PointNeXt(num_classes, width, feature_dim, dropout, **options)
