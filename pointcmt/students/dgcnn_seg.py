"""DGCNN for parts and scenes (Wang et al., ACM Transactions on Graphics 2019).

Architecture, parameter names and shapes of antao97/dgcnn.pytorch (``DGCNN_partseg``, ``DGCNN_semseg_s3dis``).
As there, each BatchNorm is registered twice (``bn1`` and ``conv1.1`` are one module).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcmt.ops import knn
from pointcmt.students import _blocks as blocks
from pointcmt.students.dgcnn import _SLOPE
from pointcmt.types import PointFeatures


def _layer(in_channels: int, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> blocks.Layer:
    kind = nn.Conv2d if isinstance(norm, nn.BatchNorm2d) else nn.Conv1d
    return blocks.Layer(kind(in_channels, norm.num_features, 1, bias=False), norm, nn.LeakyReLU(_SLOPE))


def _edges(features: Tensor, k: int, search: Tensor | None = None) -> blocks.Edges:
    """From each point to its k nearest, [x_j - x_i, x_i]; nearest in ``search`` [B, N, C], or in the features
    themselves."""
    near = (features if search is None else search).detach().contiguous()
    return blocks.Edges([(features, -features), (None, features)], knn(near, near, k)[1])


class TransformNet(nn.Module):
    """A 3 × 3 matrix for each cloud, from its edges."""

    def __init__(self, width: float) -> None:
        super().__init__()

        def c(channels: int) -> int:
            return blocks.scaled(channels, width)

        self.bn1 = nn.BatchNorm2d(c(64))
        self.bn2 = nn.BatchNorm2d(c(128))
        self.conv1 = _layer(6, self.bn1)
        self.conv2 = _layer(c(64), self.bn2)
        self.conv3 = _layer(c(128), nn.BatchNorm1d(c(1024)))
        self.linear1 = nn.Linear(c(1024), c(512), bias=False)
        self.bn3 = nn.BatchNorm1d(c(512))
        self.linear2 = nn.Linear(c(512), c(256), bias=False)
        self.bn4 = nn.BatchNorm1d(c(256))
        self.transform = nn.Linear(c(256), 9)
        nn.init.zeros_(self.transform.weight)
        with torch.no_grad():
            self.transform.bias.copy_(torch.eye(3).flatten())

    def forward(self, edges: blocks.Edges) -> Tensor:
        """Edges of [B, N, k] -> [B, 3, 3]."""
        x = blocks.highest(self.conv2(self.conv1(edges)))
        x = self.conv3(x.transpose(1, 2)).amax(-1)
        x = F.leaky_relu(self.bn3(self.linear1(x)), _SLOPE)
        x = F.leaky_relu(self.bn4(self.linear2(x)), _SLOPE)
        return self.transform(x).unflatten(1, (3, 3))


class DGCNNSeg(blocks.Segmenter):
    """The five edge layers that both have in common."""

    def __init__(
        self,
        name: str,
        num_classes: int,
        width: float,
        dropout: float,
        k: int,
        embedding: int,
        in_channels: int,
        categories: int,
    ) -> None:
        blocks.check_options(name, num_classes, embedding, width, dropout, in_channels)
        if k < 1:
            raise ValueError(f"{name}: k must be at least 1, got {k}")
        super().__init__(name, in_channels, categories)
        self.k = k
        wide, embedding = blocks.scaled(64, width), blocks.scaled(embedding, width)
        self.wide, self.embedding = wide, embedding
        self.bn1 = nn.BatchNorm2d(wide)
        self.bn2 = nn.BatchNorm2d(wide)
        self.bn3 = nn.BatchNorm2d(wide)
        self.bn4 = nn.BatchNorm2d(wide)
        self.bn5 = nn.BatchNorm2d(wide)
        self.bn6 = nn.BatchNorm1d(embedding)

    def _layers(self) -> None:
        self.conv1 = _layer(2 * self.in_channels, self.bn1)
        self.conv2 = _layer(self.wide, self.bn2)
        self.conv3 = _layer(2 * self.wide, self.bn3)
        self.conv4 = _layer(self.wide, self.bn4)
        self.conv5 = _layer(2 * self.wide, self.bn5)
        self.conv6 = _layer(3 * self.wide, self.bn6)

    def _encoded(self, points: Tensor, search: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, N, C] -> the three stages beside each other [B, 3 · 64, N], and the global feature [B, D]."""
        first = blocks.highest(self.conv2(self.conv1(_edges(points, self.k, search))))
        second = blocks.highest(self.conv4(self.conv3(_edges(first, self.k))))
        third = blocks.highest(self.conv5(_edges(second, self.k)))
        stages = torch.cat([first, second, third], -1).transpose(1, 2)
        return stages, self.pool(self.conv6(stages).amax(-1))

    def _check(self, points: Tensor) -> None:
        why = f" (k={self.k} neighbours each; pass a smaller k)"
        blocks.check_points(self.name, points, self.in_channels, self.k, why)


class DGCNNPart(DGCNNSeg):
    """DGCNN for parts; see :func:`dgcnn_part`."""

    def __init__(
        self,
        num_classes: int,
        width: float = 1.0,
        dropout: float = 0.5,
        k: int = 40,
        embedding: int = 1024,
        categories: int = 16,
    ) -> None:
        super().__init__("dgcnn_part", num_classes, width, dropout, k, embedding, 3, categories)

        def c(channels: int) -> int:
            return blocks.scaled(channels, width)

        self.transform_net = TransformNet(width)
        self.bn7 = nn.BatchNorm1d(c(64))
        self.bn8 = nn.BatchNorm1d(c(256))
        self.bn9 = nn.BatchNorm1d(c(256))
        self.bn10 = nn.BatchNorm1d(c(128))
        self._layers()
        self.conv7 = _layer(categories, self.bn7)
        self.conv8 = _layer(self.embedding + c(64) + 3 * self.wide, self.bn8)
        self.dp1 = nn.Dropout(dropout)
        self.conv9 = _layer(c(256), self.bn9)
        self.dp2 = nn.Dropout(dropout)
        self.conv10 = _layer(c(256), self.bn10)
        self.conv11 = nn.Conv1d(c(128), num_classes, 1, bias=False)

    def encode(self, points: Tensor, category: Tensor | None = None) -> PointFeatures:
        """points [B, N, 3] -> the maximum of ``conv6``, the output of ``conv10``, the points."""
        self._check(points)
        turned = points @ self.transform_net(_edges(points, self.k))
        stages, pooled = self._encoded(turned)
        kind = self.conv7(self.one_hot(points, category)[..., None])
        whole = torch.cat([pooled[..., None], kind], 1).expand(-1, -1, points.shape[1])
        x = self.dp1(self.conv8(torch.cat([whole, stages], 1)))
        x = self.conv10(self.dp2(self.conv9(x)))
        return PointFeatures(pooled, x.transpose(1, 2), points)

    def score(self, local: Tensor) -> Tensor:
        """[B, N, C] -> logits [B, N, num_classes]."""
        return self.conv11(local.transpose(1, 2)).transpose(1, 2)


class DGCNNScene(DGCNNSeg):
    """DGCNN for scenes; see :func:`dgcnn_scene`."""

    def __init__(
        self,
        num_classes: int,
        width: float = 1.0,
        dropout: float = 0.5,
        k: int = 20,
        embedding: int = 1024,
        in_channels: int = 9,
    ) -> None:
        super().__init__("dgcnn_scene", num_classes, width, dropout, k, embedding, in_channels, 0)

        def c(channels: int) -> int:
            return blocks.scaled(channels, width)

        self.bn7 = nn.BatchNorm1d(c(512))
        self.bn8 = nn.BatchNorm1d(c(256))
        self._layers()
        self.conv7 = _layer(self.embedding + 3 * self.wide, self.bn7)
        self.conv8 = _layer(c(512), self.bn8)
        self.dp1 = nn.Dropout(dropout)
        self.conv9 = nn.Conv1d(c(256), num_classes, 1, bias=False)

    def encode(self, points: Tensor, category: Tensor | None = None) -> PointFeatures:
        """points [B, N, in_channels] -> the maximum of ``conv6``, the output of ``conv8``, the points."""
        self._check(points)
        # the public code looks for neighbours by where points are in the room, the last 3 of 9 channels
        stages, pooled = self._encoded(points, points[..., 6:] if self.in_channels == 9 else points[..., :3])
        whole = pooled[..., None].expand(-1, -1, points.shape[1])
        x = self.conv8(self.conv7(torch.cat([whole, stages], 1)))
        return PointFeatures(pooled, x.transpose(1, 2), points[..., :3])

    def score(self, local: Tensor) -> Tensor:
        """[B, N, C] -> logits [B, N, num_classes]."""
        return self.conv9(self.dp1(local.transpose(1, 2))).transpose(1, 2)


def dgcnn_part(num_classes: int, width: float = 1.0, dropout: float = 0.5, **options: Any) -> DGCNNPart:
    """DGCNN for parts: points [B, N, 3] and category int64 [B] -> logits [B, N, num_classes].

    Args:
        num_classes: parts of all categories together.
        width: scales every layer; 1 is the published network.
        dropout: of both dropout layers.
        options: ``k`` (40 neighbours), ``embedding`` (1024 channels before pooling), ``categories`` (16).

    Raises:
        ValueError: options out of range; in forward, points or categories other than these, or N < k.

    Source: Wang et al. 2019, section 4.3; antao97/dgcnn.pytorch.
    """
    return DGCNNPart(num_classes, width, dropout, **options)


def dgcnn_scene(num_classes: int, width: float = 1.0, dropout: float = 0.5, **options: Any) -> DGCNNScene:
    """DGCNN for scenes: points [B, N, 9] -> logits [B, N, num_classes].

    Args:
        num_classes: K.
        width: scales every layer; 1 is the published network.
        dropout: before the last layer.
        options: ``k`` (20 neighbours), ``embedding`` (1024 channels before pooling), ``in_channels`` (9:
            coordinates, colours, and where in the room, by which neighbours are found; another number: they
            are found by the coordinates).

    Raises:
        ValueError: options out of range; in forward, points that are not [B, N, in_channels], or N < k.

    Source: Wang et al. 2019, section 4.4; antao97/dgcnn.pytorch.
    """
    return DGCNNScene(num_classes, width, dropout, **options)
