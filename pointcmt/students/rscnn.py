"""RS-CNN (Liu et al., CVPR 2019), single-scale neighbourhoods.

Architecture, parameter names and shapes of Yochengliu/Relation-Shape-CNN (``RSCNN_SSN`` for
classification), whose trained classifier is public.

The paper's relation vector h_ij is (|x_i - x_j|, x_i - x_j, x_i, x_j). The public code subtracts the centre
in place before it reads the "absolute" coordinates, so that there, and in the weights trained with it,
x_i is 0 and x_j is x_j - x_i. This file computes what the public code computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pointcmt.ops import ball_query
from pointcmt.students import _blocks as blocks
from pointcmt.types import PointFeatures


class RSConv(nn.Module):
    """Relation-shape convolution over groups of points (section 3.2 of the paper).

    Args:
        in_channels: of the points' features, without the 3 coordinates.
        out_channels: after channel raising.
        raised: channels to which a first layer lifts the coordinates; None in later layers.
    """

    def __init__(self, in_channels: int, out_channels: int, raised: int | None = None) -> None:
        super().__init__()
        first = raised is not None
        middle = max(1, out_channels // 2 if first else out_channels // 4)
        width = raised if raised is not None else in_channels + 3
        self.bn_rsconv = nn.BatchNorm2d(width)
        self.bn_channel_raising = nn.BatchNorm1d(out_channels)
        # in later layers the public code has this one too, and never uses it: it is kept for its name, and
        # not trained, or DistributedDataParallel would wait for its gradients
        self.bn_xyz_raising = nn.BatchNorm2d(16 if raised is None else raised).requires_grad_(first)
        self.bn_mapping = nn.BatchNorm2d(middle)
        self.mapping_func1 = nn.Conv2d(10, middle, 1)
        self.mapping_func2 = nn.Conv2d(middle, width, 1)
        self.cr_mapping = nn.Conv1d(width, out_channels, 1)
        self.xyz_raising = nn.Conv2d(in_channels + 3, width, 1) if first else None

    def forward(self, xyz: Tensor, features: Tensor | None, centres: Tensor, idx: Tensor) -> Tensor:
        """xyz [B, N, 3], features [B, N, C] or None, centres [B, M, 3], idx [B, M, S] -> [B, M, C']."""
        delta = blocks.rows(xyz, idx) - centres[:, :, None]
        distance = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
        # h_ij with its second and third group of channels as the head of this file says
        relation = blocks.image(torch.cat([distance, torch.zeros_like(delta), delta, delta], -1))
        relation = self.mapping_func2(blocks.norm_relu(self.mapping_func1(relation), self.bn_mapping))
        parts: list[blocks.Part] = [(xyz, -centres)]
        if features is not None:
            parts.append((features, None))
        edges = blocks.Edges(parts, idx)
        if self.xyz_raising is None:
            x = edges.gathered()
        else:
            x = blocks.norm_relu(blocks.convolve(edges, self.xyz_raising), self.bn_xyz_raising)
        x = blocks.norm_act_highest(relation * x, self.bn_rsconv).transpose(1, 2)
        return torch.relu(self.bn_channel_raising(self.cr_mapping(x))).transpose(1, 2)


def _wrap(name: str, module: nn.Module) -> nn.Sequential:
    """A Sequential that holds ``module`` under ``name``: the public code's nesting of parameter names."""
    wrapper = nn.Sequential()
    wrapper.add_module(name, module)
    return wrapper


class RelationLevel(nn.Module):
    """Sample centres, group around them, relation-shape convolution."""

    def __init__(
        self, npoint: int, radius: float, nsample: int, conv: RSConv, random_start: bool = False
    ) -> None:
        super().__init__()
        self.npoint, self.radius, self.nsample, self.random_start = npoint, radius, nsample, random_start
        self.mlps = nn.ModuleList([_wrap("RSConvLayer0", _wrap("RS_Conv", conv))])

    def forward(self, xyz: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, N, 3] and [B, N, C] (or None) -> centres [B, M, 3] and features [B, M, C']."""
        chosen = blocks.sample(xyz, self.npoint, self.random_start and self.training)
        centres = blocks.rows(xyz, chosen)
        idx = centred_ball_query(self.radius, self.nsample, xyz, centres, chosen)
        return centres, self.mlps.get_submodule("0.RSConvLayer0.RS_Conv")(xyz, features, centres, idx)


class GlobalConv(nn.Module):
    """Shared layer over the whole cloud and the maximum: [B, N, C] -> [B, 1, C']."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_avg = nn.Conv2d(in_channels, out_channels, 1)
        self.bn_avg = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, in_channels] -> [B, 1, out_channels]."""
        return blocks.norm_act_highest(self.conv_avg(blocks.image(x[:, None])), self.bn_avg)


class GlobalLevel(nn.Module):
    """The last level: all points with their coordinates, pooled."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList([GlobalConv(in_channels + 3, out_channels)])

    def forward(self, xyz: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, 3] and [B, N, C] -> the origin [B, 1, 3] and the feature [B, 1, C']."""
        return xyz.new_zeros(len(xyz), 1, 3), self.mlps[0](torch.cat([xyz, features], -1))


def centred_ball_query(radius: float, nsample: int, xyz: Tensor, centres: Tensor, chosen: Tensor) -> Tensor:
    """RS-CNN's groups: the centre itself, then its first ``nsample`` neighbours, short rows filled with it.

    The same points as in the public kernel (which lists the centre first); their order within a group is
    that of :func:`pointcmt.ops.ball_query`, and is of no effect on what follows.

    Args:
        xyz: [B, N, 3]; centres: [B, M, 3], the points of xyz named by ``chosen`` int64 [B, M].

    Returns:
        int64 [B, M, nsample + 1].
    """
    idx = ball_query(radius, nsample + 1, xyz, centres)
    own = chosen[..., None]
    # ball_query fills with its first hit, this rule with the centre
    padding = idx == idx[..., :1]
    padding[..., 0] = False
    idx = torch.where(padding, own, idx)
    # where nsample + 1 others come before the centre, it takes the place of the last of them
    missing = (idx != own).all(-1)
    last = torch.where(missing, chosen, idx[..., -1])
    return torch.cat([idx[..., :-1], last[..., None]], -1)


class RSCNN(blocks.Student):
    """RS-CNN; see :func:`rscnn`. The shape feature of its classifier is the output of ``FC_layer[0]``."""

    def __init__(
        self,
        num_classes: int,
        width: float = 1.0,
        feature_dim: int = 512,
        dropout: float = 0.5,
        in_channels: int = 3,
        npoints: Sequence[int] = (512, 128),
        radii: Sequence[float] = (0.23, 0.32),
        nsamples: Sequence[int] = (48, 64),
        random_start: bool = False,
    ) -> None:
        super().__init__()
        blocks.check_options("rscnn", num_classes, feature_dim, width, dropout, in_channels)
        self.in_channels = in_channels
        raised, first, second, last, hidden = (
            blocks.scaled(channels, width) for channels in (16, 128, 512, 1024, 256)
        )
        self.SA_modules = nn.ModuleList(
            [
                RelationLevel(
                    npoints[0], radii[0], nsamples[0], RSConv(in_channels - 3, first, raised), random_start
                ),
                RelationLevel(npoints[1], radii[1], nsamples[1], RSConv(first, second), random_start),
                GlobalLevel(second, last),
            ]
        )
        self.FC_layer = nn.Sequential(
            _fully_connected(last, feature_dim),
            nn.Dropout(dropout),
            _fully_connected(feature_dim, hidden),
            nn.Dropout(dropout),
            _wrap("fc", nn.Linear(hidden, num_classes)),
        )
        # the public code's initialisation
        for module in self.SA_modules.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.constant_(module._parameters["bias"], 0)  # type: ignore[arg-type]
        nn.init.constant_(self.FC_layer.get_parameter("4.fc.bias"), 0)

    def encode(self, points: Tensor) -> PointFeatures:
        """points [B, N, in_channels] -> what the last level pools, the centres and features of the second."""
        blocks.check_points("rscnn", points, self.in_channels, at_least=1)
        first, second, whole = self.SA_modules
        centres, local = second(*first(*blocks.split(points)))
        return PointFeatures(whole(centres, local)[1].flatten(1), local, centres)

    def head(self, feature: Tensor) -> Tensor:
        """[B, 1024] -> logits [B, num_classes]."""
        return self.FC_layer(feature)


def _fully_connected(in_channels: int, out_channels: int) -> nn.Sequential:
    layer = nn.Sequential()
    layer.add_module("fc", nn.Linear(in_channels, out_channels, bias=False))
    layer.add_module("bn", _wrap("bn", nn.BatchNorm1d(out_channels)))
    layer.add_module("activation", nn.ReLU())
    return layer


def rscnn(
    num_classes: int, width: float = 1.0, feature_dim: int = 512, dropout: float = 0.5, **options: Any
) -> RSCNN:
    """RS-CNN classifier with single-scale neighbourhoods: points [B, N, 3] -> logits [B, num_classes].

    Args:
        num_classes: K.
        width: scales every layer except the shape feature; 1 is the published network.
        feature_dim: size of the shape feature before the classifier.
        dropout: of both dropout layers.
        options: ``in_channels`` (3; 6 where normals follow the coordinates), ``npoints`` (centres per
            level; a cloud with fewer points uses them all), ``radii`` and ``nsamples`` (per level, radii in
            the points' unit: the defaults expect clouds in the unit sphere); ``random_start``: in training
            mode furthest point sampling starts at a random point.

    Raises:
        ValueError: options out of range; in forward, points that are not [B, N, in_channels].

    Source: Liu et al. 2019, sections 3 and 4; Yochengliu/Relation-Shape-CNN.
    """
    return RSCNN(num_classes, width, feature_dim, dropout, **options)
