"""PointNet++ (Qi et al., NeurIPS 2017), single-scale and multi-scale grouping.

Architecture, parameter names and shapes of yanx27/Pointnet_Pointnet2_pytorch (``pointnet2_cls_ssg``,
``pointnet2_cls_msg``), whose trained classifiers are in its repository. Two differences in the forward
pass: furthest point sampling starts at point 0, not at random, and logits come out, not log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pointcmt.ops import ball_query
from pointcmt.students import _blocks as blocks
from pointcmt.types import PointFeatures


class SetAbstraction(nn.Module):
    """One set abstraction level: sample centres, group by ball query, shared MLP, maximum.

    Args:
        npoint: centres to sample (all points are centres where the cloud has fewer); None groups the
            whole cloud around the origin.
        radius, nsample: of the ball query; unused when npoint is None.
        in_channels: of the points' features, without the 3 coordinates.
        mlp: output channels of the shared MLP's layers.
        random_start: in training mode furthest point sampling starts at a random point.
    """

    def __init__(
        self,
        npoint: int | None,
        radius: float,
        nsample: int,
        in_channels: int,
        mlp: Sequence[int],
        random_start: bool = False,
    ) -> None:
        super().__init__()
        self.npoint, self.radius, self.nsample, self.random_start = npoint, radius, nsample, random_start
        self.mlp_convs, self.mlp_bns = _shared_mlp(in_channels + 3, mlp)

    def forward(self, xyz: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, N, 3] and [B, N, C] (or None) -> centres [B, M, 3] and features [B, M, C']."""
        if self.npoint is None:
            centres = xyz.new_zeros(len(xyz), 1, 3)
            x = xyz if features is None else torch.cat([xyz, features], -1)
            x = self.mlp_convs[0](blocks.image(x[:, None]))
        else:
            centres = blocks.rows(xyz, blocks.sample(xyz, self.npoint, self.random_start and self.training))
            idx = ball_query(self.radius, self.nsample, xyz, centres)
            parts: list[blocks.Part] = [(xyz, -centres)]
            if features is not None:
                parts.append((features, None))
            x = blocks.convolve(blocks.Edges(parts, idx), self.mlp_convs[0])
        return centres, _rest_of_mlp(x, self.mlp_convs, self.mlp_bns)


class SetAbstractionMSG(nn.Module):
    """A set abstraction level with several radii around the same centres; see :class:`SetAbstraction`."""

    def __init__(
        self,
        npoint: int,
        radii: Sequence[float],
        nsamples: Sequence[int],
        in_channels: int,
        mlps: Sequence[Sequence[int]],
        random_start: bool = False,
    ) -> None:
        super().__init__()
        self.npoint, self.radii, self.nsamples = npoint, tuple(radii), tuple(nsamples)
        self.random_start = random_start
        self.conv_blocks, self.bn_blocks = nn.ModuleList(), nn.ModuleList()
        for mlp in mlps:
            convs, bns = _shared_mlp(in_channels + 3, mlp)
            self.conv_blocks.append(convs)
            self.bn_blocks.append(bns)

    def forward(self, xyz: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, N, 3] and [B, N, C] (or None) -> centres [B, M, 3] and features [B, M, sum of C']."""
        centres = blocks.rows(xyz, blocks.sample(xyz, self.npoint, self.random_start and self.training))
        parts: list[blocks.Part] = [(xyz, -centres)]
        if features is not None:  # which here the public code puts before the coordinates
            parts.insert(0, (features, None))
        found = []
        mlps: list[Any] = list(zip(self.conv_blocks, self.bn_blocks, strict=True))
        for radius, nsample, (convs, bns) in zip(self.radii, self.nsamples, mlps, strict=True):
            idx = ball_query(radius, nsample, xyz, centres)
            found.append(_rest_of_mlp(blocks.convolve(blocks.Edges(parts, idx), convs[0]), convs, bns))
        return centres, torch.cat(found, -1)


def _shared_mlp(in_channels: int, mlp: Sequence[int]) -> tuple[nn.ModuleList, nn.ModuleList]:
    convs, bns = nn.ModuleList(), nn.ModuleList()
    for out_channels in mlp:
        convs.append(nn.Conv2d(in_channels, out_channels, 1))
        bns.append(nn.BatchNorm2d(out_channels))
        in_channels = out_channels
    return convs, bns


def _rest_of_mlp(x: Tensor, convs: Any, bns: Any) -> Tensor:
    """What follows the first convolution of a shared MLP, and the maximum: [B, C, M, S] -> [B, M, C']."""
    for norm, conv in zip(bns[:-1], convs[1:], strict=True):
        x = conv(blocks.norm_relu(x, norm))
    return blocks.norm_act_highest(x, bns[-1])


class PointNet2(blocks.Student):
    """PointNet++; see :func:`pointnet2`. The shape feature of its classifier is the input of ``drop1``."""

    def __init__(
        self,
        num_classes: int,
        variant: str = "ssg",
        width: float = 1.0,
        feature_dim: int = 512,
        dropout: float | None = None,
        in_channels: int = 3,
        npoints: tuple[int, int] = (512, 128),
        radii: Sequence | None = None,
        nsamples: Sequence | None = None,
        random_start: bool = False,
    ) -> None:
        super().__init__()
        if variant not in ("ssg", "msg"):
            raise ValueError(f"pointnet2: variant must be 'ssg' or 'msg', got {variant!r}")
        drops = ((0.4, 0.4) if variant == "ssg" else (0.4, 0.5)) if dropout is None else (dropout, dropout)
        blocks.check_options("pointnet2", num_classes, feature_dim, width, drops[0], in_channels)
        self.in_channels = in_channels
        extra = in_channels - 3
        self.sa1: SetAbstraction | SetAbstractionMSG
        self.sa2: SetAbstraction | SetAbstractionMSG

        def c(*channels: int) -> list[int]:
            return [blocks.scaled(channel, width) for channel in channels]

        if variant == "ssg":
            radii = (0.2, 0.4) if radii is None else radii
            nsamples = (32, 64) if nsamples is None else nsamples
            self.sa1 = SetAbstraction(npoints[0], radii[0], nsamples[0], extra, c(64, 64, 128), random_start)
            self.sa2 = SetAbstraction(
                npoints[1], radii[1], nsamples[1], c(128)[0], c(128, 128, 256), random_start
            )
            last = c(256)[0]
        else:
            radii = ((0.1, 0.2, 0.4), (0.2, 0.4, 0.8)) if radii is None else radii
            nsamples = ((16, 32, 128), (32, 64, 128)) if nsamples is None else nsamples
            mlps = [c(32, 32, 64), c(64, 64, 128), c(64, 96, 128)]
            self.sa1 = SetAbstractionMSG(npoints[0], radii[0], nsamples[0], extra, mlps, random_start)
            middle = sum(mlp[-1] for mlp in mlps)
            mlps = [c(64, 64, 128), c(128, 128, 256), c(128, 128, 256)]
            self.sa2 = SetAbstractionMSG(npoints[1], radii[1], nsamples[1], middle, mlps, random_start)
            last = sum(mlp[-1] for mlp in mlps)
        self.sa3 = SetAbstraction(None, 0.0, 0, last, c(256, 512, 1024))
        hidden = c(256)[0]
        self.fc1 = nn.Linear(c(1024)[0], feature_dim)
        self.bn1 = nn.BatchNorm1d(feature_dim)
        self.drop1 = nn.Dropout(drops[0])
        self.fc2 = nn.Linear(feature_dim, hidden)
        self.bn2 = nn.BatchNorm1d(hidden)
        self.drop2 = nn.Dropout(drops[1])
        self.fc3 = nn.Linear(hidden, num_classes)

    def encode(self, points: Tensor) -> PointFeatures:
        """points [B, N, in_channels] -> the output of ``sa3``, the centres and features of ``sa2``."""
        blocks.check_points("pointnet2", points, self.in_channels, at_least=1)
        centres, local = self.sa2(*self.sa1(*blocks.split(points)))
        return PointFeatures(self.sa3(centres, local)[1].flatten(1), local, centres)

    def head(self, feature: Tensor) -> Tensor:
        """[B, 1024] -> logits [B, num_classes]."""
        x = self.drop1(torch.relu(self.bn1(self.fc1(feature))))
        x = self.drop2(torch.relu(self.bn2(self.fc2(x))))
        return self.fc3(x)


def pointnet2(
    num_classes: int,
    variant: str = "ssg",
    width: float = 1.0,
    feature_dim: int = 512,
    dropout: float | None = None,
    **options: Any,
) -> PointNet2:
    """PointNet++ classifier: points [B, N, 3] -> logits [B, num_classes].

    Args:
        num_classes: K.
        variant: "ssg" (one radius per level) or "msg" (three).
        width: scales every layer except the shape feature; 1 is the published network.
        feature_dim: size of the shape feature before the classifier.
        dropout: of both dropout layers; None takes the public code's (0.4 and 0.4; for msg 0.4 and 0.5).
        options: ``in_channels`` (3; 6 where normals follow the coordinates), ``npoints`` (centres per
            level; a cloud with fewer points uses them all), ``radii`` and ``nsamples`` (per level, for msg
            three per level), in the points' unit: the defaults expect clouds in the unit sphere;
            ``random_start``: in training mode furthest point sampling starts at a random point.

    Raises:
        ValueError: options out of range; in forward, points that are not [B, N, in_channels].

    Source: Qi et al. 2017, section 3; yanx27/Pointnet_Pointnet2_pytorch.
    """
    return PointNet2(num_classes, variant, width, feature_dim, dropout, **options)
