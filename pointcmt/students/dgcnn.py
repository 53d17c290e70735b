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

_SLOPE = 0.2  # of every leaky ReLU in the public code


class DGCNN(nn.Module):
    """DGCNN classifier; see :func:`dgcnn`. The shape feature is the input of ``dp1``."""

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
        self.conv1 = _edge_layer(3, sizes[0], self.bn1)
        self.conv2 = _edge_layer(sizes[0], sizes[1], self.bn2)
        self.conv3 = _edge_layer(sizes[1], sizes[2], self.bn3)
        self.conv4 = _edge_layer(sizes[2], sizes[3], self.bn4)
        self.conv5 = nn.Sequential(
            nn.Conv1d(sum(sizes), embedding, 1, bias=False), self.bn5, nn.LeakyReLU(_SLOPE)
        )
        self.linear1 = nn.Linear(2 * embedding, feature_dim, bias=False)
        self.bn6 = nn.BatchNorm1d(feature_dim)
        self.dp1 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(feature_dim, hidden)
        self.bn7 = nn.BatchNorm1d(hidden)
        self.dp2 = nn.Dropout(dropout)
        self.linear3 = nn.Linear(hidden, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        """points [B, N, 3] -> logits [B, num_classes]."""
        blocks.check_points(
            "dgcnn", points, 3, at_least=self.k, why=f" (k={self.k} neighbours each; pass a smaller k)"
        )
        x, found = points, []
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = edge_conv(x, layer[0], layer[1], self.k)
            found.append(x)
        highest, mean = blocks.linear_norm_act_pool(
            torch.cat(found, -1), self.conv5[0], self.conv5[1], _SLOPE
        )
        x = torch.cat([highest, mean], -1)
        feature = F.leaky_relu(self.bn6(self.linear1(x)), _SLOPE)
        x = self.dp1(feature)
        x = self.dp2(F.leaky_relu(self.bn7(self.linear2(x)), _SLOPE))
        return self.linear3(x)


def _edge_layer(in_channels: int, out_channels: int, bn: nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2 * in_channels, out_channels, 1, bias=False), bn, nn.LeakyReLU(_SLOPE))


def edge_conv(x: Tensor, conv: blocks.Conv, bn: nn.Module, k: int) -> Tensor:
    """EdgeConv over the k nearest neighbours in feature space: [B, N, C] -> [B, N, C'].

    The convolution sees [x_j - x_i, x_i] and is linear: W1 (x_j - x_i) + W2 x_i = W1 x_j + (W2 - W1) x_i is
    computed per point and gathered, k times less work than per edge. BatchNorm normalises over the edges.
    """
    idx = knn(x.detach(), x.detach(), k)[1]
    difference, own = blocks.weight_of(conv).chunk(2, 1)
    of_points, of_centres = blocks.project(x, difference), blocks.project(x, own - difference)
    return blocks.gather_norm_act_max(of_points, of_centres, idx, bn, _SLOPE)


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
