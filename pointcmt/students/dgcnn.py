"""DGCNN (Wang et al., ACM Transactions on Graphics 2019).

Architecture, parameter names and shapes of antao97/dgcnn.pytorch (``DGCNN_cls``), which are those of the
authors' WangYueFt/dgcnn (``DGCNN``); both publish trained classifiers. As there, each BatchNorm is
registered twice (``bn1`` and ``conv1.1`` are one module), so both names are in the state_dict.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcmt.ops import knn
from pointcmt.students import _blocks as blocks
from pointcmt.types import PointFeatures

_SLOPE = 0.2  # of every leaky ReLU in the public code


class EdgeConv(blocks.Layer):
    """EdgeConv over the k nearest neighbours in feature space (section 3.1 of the paper)."""

    def __init__(self, in_channels: int, norm: nn.BatchNorm2d, k: int) -> None:
        conv = nn.Conv2d(2 * in_channels, norm.num_features, 1, bias=False)
        super().__init__(conv, norm, nn.LeakyReLU(_SLOPE))
        self.k = k

    def forward(self, points: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[B, N, 3] and [B, N, C] -> the same points, and features [B, N, C'].

        The convolution sees [x_j - x_i, x_i]; BatchNorm normalises over the edges.
        """
        idx = knn(features.detach(), features.detach(), self.k)[1]
        edges = blocks.Edges([(features, -features), (None, features)], idx)
        parts: list[Any] = list(self)  # mypy knows no more of them than Module
        conv, norm, act = parts
        if blocks.is_plain(conv, act):
            projected = edges.projected(conv.weight, conv.bias)
            return points, blocks.norm_act_highest(projected, norm, act.negative_slope)
        return points, blocks.highest(super().forward(edges))


class DGCNN(blocks.Student):
    """DGCNN; see :func:`dgcnn`. The shape feature of its classifier is the input of ``dp1``."""

    def __init__(
        self,
        num_classes: int,
        width: float = 1.0,
        feature_dim: int = 512,
        dropout: float = 0.5,
        k: int = 20,
        embedding: int = 1024,
    ) -> None:
        super().__init__()
        blocks.check_options("dgcnn", num_classes, feature_dim, width, dropout)
        if k < 1:
            raise ValueError(f"dgcnn: k must be at least 1, got {k}")
        self.k = k
        sizes = [blocks.scaled(channels, width) for channels in (64, 64, 128, 256)]
        embedding, hidden = blocks.scaled(embedding, width), blocks.scaled(256, width)
        self.bn1 = nn.BatchNorm2d(sizes[0])
        self.bn2 = nn.BatchNorm2d(sizes[1])
        self.bn3 = nn.BatchNorm2d(sizes[2])
        self.bn4 = nn.BatchNorm2d(sizes[3])
        self.bn5 = nn.BatchNorm1d(embedding)
        self.conv1 = EdgeConv(3, self.bn1, k)
        self.conv2 = EdgeConv(sizes[0], self.bn2, k)
        self.conv3 = EdgeConv(sizes[1], self.bn3, k)
        self.conv4 = EdgeConv(sizes[2], self.bn4, k)
        self.conv5 = blocks.Layer(
            nn.Conv1d(sum(sizes), embedding, 1, bias=False), self.bn5, nn.LeakyReLU(_SLOPE)
        )
        self.linear1 = nn.Linear(2 * embedding, feature_dim, bias=False)
        self.bn6 = nn.BatchNorm1d(feature_dim)
        self.dp1 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(feature_dim, hidden)
        self.bn7 = nn.BatchNorm1d(hidden)
        self.dp2 = nn.Dropout(dropout)
        self.linear3 = nn.Linear(hidden, num_classes)

    def encode(self, points: Tensor) -> PointFeatures:
        """points [B, N, 3] -> maximum and mean of ``conv5`` over the points, and its output at each."""
        blocks.check_points(
            "dgcnn", points, 3, at_least=self.k, why=f" (k={self.k} neighbours each; pass a smaller k)"
        )
        x, found = points, []
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(points, x)[1]
            found.append(x)
        local = self.conv5(torch.cat(found, -1).transpose(1, 2)).transpose(1, 2)
        return PointFeatures(torch.cat([local.amax(1), local.mean(1)], -1), local, points)

    def head(self, feature: Tensor) -> Tensor:
        """[B, 2 * embedding] -> logits [B, num_classes]."""
        x = self.dp1(F.leaky_relu(self.bn6(self.linear1(feature)), _SLOPE))
        x = self.dp2(F.leaky_relu(self.bn7(self.linear2(x)), _SLOPE))
        return self.linear3(x)


def dgcnn(
    num_classes: int, width: float = 1.0, feature_dim: int = 512, dropout: float = 0.5, **options: Any
) -> DGCNN:
    """DGCNN classifier: points [B, N, 3] -> logits [B, num_classes].

    Args:
        num_classes: K.
        width: scales every layer except the shape feature; 1 is the published network.
        feature_dim: size of the shape feature before the classifier.
        dropout: of both dropout layers.
        options: ``k`` (20 neighbours; the authors use 40 with 2048 points), ``embedding`` (1024 channels
            before pooling).

    Raises:
        ValueError: options out of range; in forward, points that are not [B, N, 3] or N < k.

    Source: Wang et al. 2019, sections 3 and 4.1; antao97/dgcnn.pytorch, WangYueFt/dgcnn.
    """
    return DGCNN(num_classes, width, feature_dim, dropout, **options)
