"""PointNeXt-S for parts and scenes (Qian et al., NeurIPS 2022).

Architecture, parameter names and shapes of guochengqian/openpoints (``BasePartSeg`` and ``BaseSeg`` with
``PointNextEncoder``, ``PointNextPartDecoder`` or ``PointNextDecoder``, and ``SegHead``), as the
configurations ``shapenetpart/pointnext-s`` and ``s3dis/pointnext-s`` of guochengqian/PointNeXt build them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pointcmt.students import _blocks as blocks
from pointcmt.students.pointnext import sampling_stages
from pointcmt.types import PointFeatures

_CHANNELS, _RADIUS = (32, 64, 128, 256, 512), 0.1


class Encoder(nn.Module):
    """A stem and four stages that sample, each in a list of its own, as in the public code."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        stride: int,
        layers: int,
        growth: float,
        scale: float,
        random_start: bool,
    ) -> None:
        super().__init__()
        stages = sampling_stages(
            in_channels, channels, scale * _RADIUS, growth, random_start, stride=stride, layers=layers
        )
        self.encoder = nn.ModuleList(nn.ModuleList([stage]) for stage in stages)

    def forward(self, xyz: Tensor, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[B, N, 3] and [B, N, C] -> centres and features of all five stages."""
        centres, found = [], []
        for blocks_of_stage in self.encoder:
            (stage,) = blocks_of_stage.children()
            xyz, features = stage(xyz, features)
            centres.append(xyz)
            found.append(features)
        return centres, found


class Propagation(nn.Module):
    """From few centres back to more points: interpolation, features from before beside it, two layers."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(
                blocks.Layer(nn.Conv1d(size, channels, 1, bias=False), nn.BatchNorm1d(channels), nn.ReLU())
                for size in (in_channels, channels)
            )
        )

    def forward(self, near: Tensor, far: Tensor, before: Tensor, features: Tensor) -> Tensor:
        """Points [B, N, 3], centres [B, M, 3], their features [B, N, C] and [B, M, C'] -> [B, N, C'']."""
        x = torch.cat([before, blocks.interpolate(near, far, features, squared=False)], -1)
        return self.convs(x.transpose(1, 2)).transpose(1, 2)


class Decoder(nn.Module):
    """Four propagations, the finest first in the list; with ``extra`` channels beside the finest features."""

    def __init__(self, channels: Sequence[int], extra: int = 0) -> None:
        super().__init__()
        self.decoder = nn.ModuleList(
            nn.ModuleList(
                [Propagation(channels[n] + channels[n + 1] + (extra if n == 0 else 0), channels[n])]
            )
            for n in range(4)
        )

    def forward(self, centres: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """Centres and features of five stages -> features of the first one's points [B, N, C]."""
        x = features[-1]
        for n in (3, 2, 1, 0):
            (layer,) = self.decoder[n].children()
            x = layer(centres[n], centres[n + 1], features[n], x)
        return x


class PartDecoder(Decoder):
    """A :class:`Decoder` that is told the category, and what the two coarsest stages say of the shape."""

    def __init__(self, channels: Sequence[int], categories: int, width: float) -> None:
        sizes = [blocks.scaled(64, width), blocks.scaled(128, width)]
        super().__init__(channels, sum(sizes) + categories)
        self.global_conv2 = nn.Sequential(nn.Sequential(nn.Conv1d(channels[4], sizes[1], 1), nn.ReLU()))
        self.global_conv1 = nn.Sequential(nn.Sequential(nn.Conv1d(channels[3], sizes[0], 1), nn.ReLU()))

    def forward(  # type: ignore[override]
        self, centres: Sequence[Tensor], features: Sequence[Tensor], kind: Tensor
    ) -> Tensor:
        """As :class:`Decoder`, and the categories [B, categories]."""
        coarse = self.global_conv1(features[-2].transpose(1, 2)).amax(-1)
        coarsest = self.global_conv2(features[-1].transpose(1, 2)).amax(-1)
        whole = torch.cat([coarse, coarsest, kind], 1)[:, None].expand(-1, features[0].shape[1], -1)
        return super().forward(centres, [torch.cat([whole, features[0]], -1), *features[1:]])


class SegHead(nn.Module):
    """Two layers on each point; with ``pooled`` the maximum and mean over the cloud beside it."""

    def __init__(self, channels: int, num_classes: int, dropout: float, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        channels *= 3 if pooled else 1
        self.head = nn.Sequential(
            blocks.Layer(nn.Conv1d(channels, channels, 1, bias=False), nn.BatchNorm1d(channels), nn.ReLU()),
            nn.Dropout(dropout),
            blocks.Layer(nn.Conv1d(channels, num_classes, 1)),
        )

    def forward(self, local: Tensor) -> Tensor:
        """[B, N, C] -> logits [B, N, num_classes]."""
        if self.pooled:
            whole = torch.cat([local.amax(1, keepdim=True), local.mean(1, keepdim=True)], -1)
            local = torch.cat([local, whole.expand(-1, local.shape[1], -1)], -1)
        return self.head(local.transpose(1, 2)).transpose(1, 2)


class PointNeXtSeg(blocks.Segmenter):
    """PointNeXt-S for parts or scenes; see :func:`pointnext_part` and :func:`pointnext_scene`."""

    encoder: Encoder
    decoder: Decoder

    def __init__(
        self,
        name: str,
        num_classes: int,
        width: float,
        dropout: float,
        in_channels: int,
        categories: int,
        coordinates: bool,
        scale: float,
        random_start: bool,
    ) -> None:
        blocks.check_options(name, num_classes, 1, width, dropout, in_channels)
        if not scale > 0:
            raise ValueError(f"{name}: scale must be positive, got {scale}")
        if not coordinates and in_channels < 4:
            raise ValueError(
                f"{name}: coordinates=False leaves nothing of in_channels={in_channels}; give more"
            )
        super().__init__(name, in_channels, categories)
        self.coordinates = coordinates
        channels = [blocks.scaled(count, width) for count in _CHANNELS]
        seen = in_channels if coordinates else in_channels - 3
        if categories:
            self.encoder = Encoder(seen, channels, 2, 3, 2.5, scale, random_start)
            self.decoder = PartDecoder(channels, categories, width)
        else:
            self.encoder = Encoder(seen, channels, 4, 2, 2.0, scale, random_start)
            self.decoder = Decoder(channels)
        self.head = SegHead(channels[0], num_classes, dropout, pooled=bool(categories))

    def encode(self, points: Tensor, category: Tensor | None = None) -> PointFeatures:
        """points [B, N, in_channels] -> the maximum over the last stage, the decoder's output, the points."""
        strides = (2 if self.categories else 4) ** 4
        blocks.check_points(self.name, points, self.in_channels, strides, " (four of its stages sample)")
        xyz = points[..., :3].contiguous()
        centres, features = self.encoder(xyz, points if self.coordinates else points[..., 3:])
        pooled = self.pool(features[-1].amax(1))
        extra = [self.one_hot(points, category)] if self.categories else []
        return PointFeatures(pooled, self.decoder(centres, features, *extra), xyz)

    def score(self, local: Tensor) -> Tensor:
        """[B, N, C] -> logits [B, N, num_classes]."""
        return self.head(local)


def pointnext_part(
    num_classes: int, width: float = 1.0, dropout: float = 0.5, **options: Any
) -> PointNeXtSeg:
    """PointNeXt-S for parts: points [B, N, 3] and category int64 [B] -> logits [B, N, num_classes].

    Args:
        num_classes: parts of all categories together.
        width: scales every layer; 1 is the published network.
        dropout: before the last layer.
        options: ``in_channels`` (3; 7 as published: coordinates, normals, height), ``categories`` (16),
            ``scale`` (factor of all radii, which expect the unit sphere), ``random_start``.

    Raises:
        ValueError: options out of range; in forward, points or categories other than these, or N < 16.

    Source: Qian et al. 2022; guochengqian/openpoints, guochengqian/PointNeXt.
    """
    settings = {"in_channels": 3, "categories": 16, "coordinates": True, "scale": 1.0, "random_start": False}
    return PointNeXtSeg("pointnext_part", num_classes, width, dropout, **{**settings, **options})


def pointnext_scene(
    num_classes: int, width: float = 1.0, dropout: float = 0.5, **options: Any
) -> PointNeXtSeg:
    """PointNeXt-S for scenes: points [B, N, in_channels] -> logits [B, N, num_classes].

    Args:
        num_classes: K.
        width: scales every layer; 1 is the published network.
        dropout: before the last layer.
        options: ``in_channels`` (7: coordinates, colours, height), ``coordinates`` (False as published: the
            stem sees what follows them), ``scale`` (factor of all radii, which are 0.1 to 0.8 m),
            ``random_start``.

    Raises:
        ValueError: options out of range; in forward, points that are not [B, N, in_channels], or N < 256.

    Source: Qian et al. 2022; guochengqian/openpoints, guochengqian/PointNeXt.
    """
    settings = {"in_channels": 7, "coordinates": False, "scale": 1.0, "random_start": False}
    return PointNeXtSeg(
        "pointnext_scene", num_classes, width, dropout, categories=0, **{**settings, **options}
    )
