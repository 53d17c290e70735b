"""``pointnet2_ops.pointnet2_modules``: the set abstraction and feature propagation layers of PointNet++.

Parameter names and shapes are the original's, so its checkpoints load.
Source: Qi et al., PointNet++ (NeurIPS 2017), sections 3.2–3.4; erikwijmans/Pointnet2_PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.compat.pointnet2_ops import pointnet2_utils

__all__ = ["PointnetFPModule", "PointnetSAModule", "PointnetSAModuleMSG", "build_shared_mlp"]


def build_shared_mlp(mlp_spec: Sequence[int], bn: bool = True) -> nn.Sequential:
    """1 × 1 convolutions of these widths, each with batch normalisation (if ``bn``) and ReLU."""
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(mlp_spec):
        layers.append(nn.Conv2d(width_in, width_out, kernel_size=1, bias=not bn))
        if bn:
            layers.append(nn.BatchNorm2d(width_out))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class PointnetSAModuleMSG(nn.Module):
    """Set abstraction with several radii at once.

    Args:
        npoint: centres to sample; None makes one group of all points.
        radii: one radius per scale.
        nsamples: points per ball, per scale.
        mlps: widths per scale; the first is the number of input features, without coordinates.
        bn: batch normalisation.
        use_xyz: let the relative coordinates into the layers.
    """

    def __init__(
        self,
        npoint: int | None,
        radii: Sequence[float | None],
        nsamples: Sequence[int | None],
        mlps: Sequence[Sequence[int]],
        bn: bool = True,
        use_xyz: bool = True,
    ) -> None:
        super().__init__()
        if not len(radii) == len(nsamples) == len(mlps):
            raise ValueError(
                "radii, nsamples and mlps must have one entry per scale, got "
                f"{len(radii)}, {len(nsamples)} and {len(mlps)}"
            )
        self.npoint = npoint
        self.groupers = nn.ModuleList()
        self.mlps = nn.ModuleList()
        for radius, nsample, mlp in zip(radii, nsamples, mlps, strict=True):
            if npoint is None:
                self.groupers.append(pointnet2_utils.GroupAll(use_xyz))
            elif radius is None or nsample is None:
                raise ValueError(f"npoint={npoint} needs a radius and nsample for every scale")
            else:
                self.groupers.append(pointnet2_utils.QueryAndGroup(radius, nsample, use_xyz=use_xyz))
            width, *rest = mlp
            self.mlps.append(build_shared_mlp([width + 3 if use_xyz else width, *rest], bn))

    def forward(self, xyz: Tensor, features: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """xyz [B, N, 3], features [B, C, N] → centres [B, npoint, 3] (None for one group), features [B, ΣC',
        npoint].
        """
        centres = None
        if self.npoint is not None:
            idx = pointnet2_utils.furthest_point_sample(xyz, self.npoint)
            centres = pointnet2_utils.gather_operation(xyz.transpose(1, 2).contiguous(), idx)
            centres = centres.transpose(1, 2).contiguous()
        scales = []
        for group, mlp in zip(self.groupers, self.mlps, strict=True):
            around = mlp(group(xyz, centres, features))  # [B, C', npoint, nsample]
            scales.append(F.max_pool2d(around, (1, around.shape[3])).squeeze(-1))
        return centres, torch.cat(scales, dim=1)


class PointnetSAModule(PointnetSAModuleMSG):
    """Set abstraction with one radius; arguments as in :class:`PointnetSAModuleMSG`, one value each."""

    def __init__(
        self,
        mlp: Sequence[int],
        npoint: int | None = None,
        radius: float | None = None,
        nsample: int | None = None,
        bn: bool = True,
        use_xyz: bool = True,
    ) -> None:
        super().__init__(npoint, [radius], [nsample], [mlp], bn=bn, use_xyz=use_xyz)


class PointnetFPModule(nn.Module):
    """Carries features from a coarse set of points to a fine one, by inverse distance to the nearest three.

    Args:
        mlp: widths; the first is the sum of the features of both sets.
        bn: batch normalisation.
    """

    def __init__(self, mlp: Sequence[int], bn: bool = True) -> None:
        super().__init__()
        self.mlp = build_shared_mlp(mlp, bn=bn)

    def forward(
        self, unknown: Tensor, known: Tensor | None, unknow_feats: Tensor | None, known_feats: Tensor
    ) -> Tensor:
        """unknown [B, n, 3], known [B, m, 3], features [B, C1, n] and [B, C2, m] → [B, C', n]."""
        if known is None:
            carried = known_feats.expand(-1, -1, unknown.shape[1])
        else:
            distance, idx = pointnet2_utils.three_nn(unknown, known)
            closeness = 1.0 / (distance + 1e-8)  # the original's guard against division by zero
            weight = closeness / closeness.sum(dim=2, keepdim=True)
            carried = pointnet2_utils.three_interpolate(known_feats, idx, weight)
        if unknow_feats is not None:
            carried = torch.cat([carried, unknow_feats], dim=1)
        return self.mlp(carried.unsqueeze(-1)).squeeze(-1)
