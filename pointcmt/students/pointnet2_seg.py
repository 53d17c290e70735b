"""PointNet++ for parts and scenes (Qi et al., NeurIPS 2017), single-scale and multi-scale grouping.

Architecture, parameter names and shapes of yanx27/Pointnet_Pointnet2_pytorch (``pointnet2_part_seg_ssg``,
``pointnet2_part_seg_msg``, ``pointnet2_sem_seg``, ``pointnet2_sem_seg_msg``). Furthest point sampling starts
at point 0, not at random, and logits come out, not log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pointcmt.students import _blocks as blocks
from pointcmt.students.pointnet2 import SetAbstraction, SetAbstractionMSG
from pointcmt.types import PointFeatures


class FeaturePropagation(nn.Module):
    """From few centres back to more points: interpolation, features from before beside it, a shared MLP."""

    def __init__(self, in_channels: int, mlp: Sequence[int]) -> None:
        super().__init__()
        self.mlp_convs, self.mlp_bns = nn.ModuleList(), nn.ModuleList()
        for out_channels in mlp:
            self.mlp_convs.append(nn.Conv1d(in_channels, out_channels, 1))
            self.mlp_bns.append(nn.BatchNorm1d(out_channels))
            in_channels = out_channels

    def forward(self, near: Tensor, far: Tensor, before: Tensor | None, features: Tensor) -> Tensor:
        """Points [B, N, 3], centres [B, M, 3], their features [B, N, C] (or None) and [B, M, C'] ->
        [B, N, C'']."""
        x = blocks.interpolate(near, far, features, squared=True)
        x = (x if before is None else torch.cat([before, x], -1)).transpose(1, 2)
        for conv, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            x = blocks.norm_relu(conv(x), norm)
        return x.transpose(1, 2)


class PointNet2Seg(blocks.Segmenter):
    """What both have in common: levels ``sa1`` …, back by ``fp…`` to ``fp1``, and a head on each point."""

    def __init__(
        self, name: str, num_classes: int, width: float, dropout: float, in_channels: int, categories: int
    ) -> None:
        blocks.check_options(name, num_classes, 1, width, dropout, in_channels)
        super().__init__(name, in_channels, categories)

    def _head(self, num_classes: int, channels: int, dropout: float) -> None:
        self.conv1 = nn.Conv1d(channels, channels, 1)
        self.bn1 = nn.BatchNorm1d(channels)
        self.drop1 = nn.Dropout(dropout)
        self.conv2 = nn.Conv1d(channels, num_classes, 1)

    def _per_point(self, x: Tensor) -> Tensor:
        return blocks.norm_relu(self.conv1(x.transpose(1, 2)), self.bn1).transpose(1, 2)

    def score(self, local: Tensor) -> Tensor:
        """[B, N, C] -> logits [B, N, num_classes]."""
        return self.conv2(self.drop1(local.transpose(1, 2))).transpose(1, 2)


class PointNet2Part(PointNet2Seg):
    """PointNet++ for parts; see :func:`pointnet2_part`."""

    def __init__(
        self,
        num_classes: int,
        variant: str = "ssg",
        width: float = 1.0,
        dropout: float = 0.5,
        in_channels: int = 3,
        categories: int = 16,
        npoints: tuple[int, int] = (512, 128),
        random_start: bool = False,
    ) -> None:
        if variant not in ("ssg", "msg"):
            raise ValueError(f"pointnet2_part: variant must be 'ssg' or 'msg', got {variant!r}")
        super().__init__("pointnet2_part", num_classes, width, dropout, in_channels, categories)

        def c(*channels: int) -> list[int]:
            return [blocks.scaled(channel, width) for channel in channels]

        self.sa1: SetAbstraction | SetAbstractionMSG
        self.sa2: SetAbstraction | SetAbstractionMSG
        if variant == "ssg":
            self.sa1 = SetAbstraction(npoints[0], 0.2, 32, in_channels, c(64, 64, 128), random_start)
            self.sa2 = SetAbstraction(npoints[1], 0.4, 64, c(128)[0], c(128, 128, 256), random_start)
            first, second, last = c(128)[0], c(256)[0], c(128, 128, 128)
        else:
            mlps = [c(32, 32, 64), c(64, 64, 128), c(64, 96, 128)]
            self.sa1 = SetAbstractionMSG(
                npoints[0], (0.1, 0.2, 0.4), (32, 64, 128), in_channels, mlps, random_start
            )
            first = sum(mlp[-1] for mlp in mlps)
            mlps = [c(128, 128, 256), c(128, 196, 256)]
            self.sa2 = SetAbstractionMSG(npoints[1], (0.4, 0.8), (64, 128), first, mlps, random_start)
            second, last = sum(mlp[-1] for mlp in mlps), c(128, 128)
        self.sa3 = SetAbstraction(None, 0.0, 0, second, c(256, 512, 1024))
        self.fp3 = FeaturePropagation(c(1024)[0] + second, c(256, 256))
        self.fp2 = FeaturePropagation(c(256)[0] + first, c(256, 128))
        self.fp1 = FeaturePropagation(c(128)[0] + categories + 3 + in_channels, last)
        self._head(num_classes, last[-1], dropout)

    def encode(self, points: Tensor, category: Tensor | None = None) -> PointFeatures:
        """points [B, N, in_channels] -> output of ``sa3``, what goes into ``drop1``, the points."""
        blocks.check_points(self.name, points, self.in_channels, at_least=1)
        xyz = points[..., :3].contiguous()
        xyz1, level1 = self.sa1(xyz, points)
        xyz2, level2 = self.sa2(xyz1, level1)
        xyz3, level3 = self.sa3(xyz2, level2)
        level3 = self.pool(level3.flatten(1))[:, None]
        level2 = self.fp3(xyz2, xyz3, level2, level3)
        level1 = self.fp2(xyz1, xyz2, level1, level2)
        kind = self.one_hot(points, category)[:, None].expand(-1, points.shape[1], -1)
        x = self.fp1(xyz, xyz1, torch.cat([kind, xyz, points], -1), level1)
        return PointFeatures(level3.flatten(1), self._per_point(x), xyz)


# of each level: centres, radii, neighbours, channels
_SSG: Any = (
    (1024, 0.1, 32, (32, 32, 64)),
    (256, 0.2, 32, (64, 64, 128)),
    (64, 0.4, 32, (128, 128, 256)),
    (16, 0.8, 32, (256, 256, 512)),
)
_MSG: Any = (
    (1024, (0.05, 0.1), (16, 32), ((16, 16, 32), (32, 32, 64))),
    (256, (0.1, 0.2), (16, 32), ((64, 64, 128), (64, 96, 128))),
    (64, (0.2, 0.4), (16, 32), ((128, 196, 256), (128, 196, 256))),
    (16, (0.4, 0.8), (16, 32), ((256, 256, 512), (256, 384, 512))),
)


class PointNet2Scene(PointNet2Seg):
    """PointNet++ for scenes; see :func:`pointnet2_scene`."""

    def __init__(
        self,
        num_classes: int,
        variant: str = "ssg",
        width: float = 1.0,
        dropout: float = 0.5,
        in_channels: int = 9,
        npoints: tuple[int, int, int, int] = (1024, 256, 64, 16),
        scale: float = 1.0,
        random_start: bool = False,
    ) -> None:
        if variant not in ("ssg", "msg"):
            raise ValueError(f"pointnet2_scene: variant must be 'ssg' or 'msg', got {variant!r}")
        if not scale > 0:
            raise ValueError(f"pointnet2_scene: scale must be positive, got {scale}")
        super().__init__("pointnet2_scene", num_classes, width, dropout, in_channels, 0)

        def c(channels: Sequence[int]) -> list[int]:
            return [blocks.scaled(channel, width) for channel in channels]

        channels = [in_channels]
        levels: list[nn.Module] = []
        for (_, radius, nsample, mlp), npoint in zip(
            _SSG if variant == "ssg" else _MSG, npoints, strict=True
        ):
            if variant == "ssg":
                level: Any = SetAbstraction(
                    npoint, scale * radius, nsample, channels[-1], c(mlp), random_start
                )
                channels.append(c(mlp)[-1])
            else:
                mlps = [c(one) for one in mlp]
                radii = [scale * one for one in radius]
                level = SetAbstractionMSG(npoint, radii, nsample, channels[-1], mlps, random_start)
                channels.append(sum(one[-1] for one in mlps))
            levels.append(level)
        self.sa1, self.sa2, self.sa3, self.sa4 = levels
        up = c((256, 256, 128))
        self.fp4 = FeaturePropagation(channels[4] + channels[3], c((256, 256)))
        self.fp3 = FeaturePropagation(up[0] + channels[2], c((256, 256)))
        self.fp2 = FeaturePropagation(up[1] + channels[1], c((256, 128)))
        self.fp1 = FeaturePropagation(up[2], c((128, 128, 128)))
        self._head(num_classes, c((128,))[0], dropout)

    def encode(self, points: Tensor, category: Tensor | None = None) -> PointFeatures:
        """points [B, N, in_channels] -> the maximum over ``sa4``, what goes into ``drop1``, the points."""
        blocks.check_points(self.name, points, self.in_channels, at_least=1)
        xyz = points[..., :3].contiguous()
        xyz1, level1 = self.sa1(xyz, points)
        xyz2, level2 = self.sa2(xyz1, level1)
        xyz3, level3 = self.sa3(xyz2, level2)
        xyz4, level4 = self.sa4(xyz3, level3)
        pooled = self.pool(level4.amax(1))
        level3 = self.fp4(xyz3, xyz4, level3, level4)
        level2 = self.fp3(xyz2, xyz3, level2, level3)
        level1 = self.fp2(xyz1, xyz2, level1, level2)
        return PointFeatures(pooled, self._per_point(self.fp1(xyz, xyz1, None, level1)), xyz)


def pointnet2_part(
    num_classes: int, variant: str = "ssg", width: float = 1.0, dropout: float = 0.5, **options: Any
) -> PointNet2Part:
    """PointNet++ for parts: points [B, N, 3] and category int64 [B] -> logits [B, N, num_classes].

    Args:
        num_classes: parts of all categories together.
        variant: "ssg" (one radius per level) or "msg" (three, then two).
        width: scales every layer; 1 is the published network.
        dropout: before the last layer.
        options: ``in_channels`` (3; 6 where normals follow the coordinates), ``categories`` (16),
            ``npoints`` (centres per level), ``random_start`` (of furthest point sampling in training). Radii
            expect clouds in the unit sphere.

    Raises:
        ValueError: options out of range; in forward, points or categories other than these.

    Source: Qi et al. 2017, section 3; yanx27/Pointnet_Pointnet2_pytorch.
    """
    return PointNet2Part(num_classes, variant, width, dropout, **options)


def pointnet2_scene(
    num_classes: int, variant: str = "ssg", width: float = 1.0, dropout: float = 0.5, **options: Any
) -> PointNet2Scene:
    """PointNet++ for scenes: points [B, N, 9] -> logits [B, N, num_classes].

    Args:
        num_classes: K.
        variant: "ssg" (one radius per level) or "msg" (two).
        width: scales every layer; 1 is the published network.
        dropout: before the last layer.
        options: ``in_channels`` (9: coordinates, colours, and where in the room), ``npoints`` (centres per
            level), ``scale`` (factor of all radii, which are 0.1 to 0.8 m as published), ``random_start``.

    Raises:
        ValueError: options out of range; in forward, points that are not [B, N, in_channels].

    Source: Qi et al. 2017; yanx27/Pointnet_Pointnet2_pytorch.
    """
    return PointNet2Scene(num_classes, variant, width, dropout, **options)
