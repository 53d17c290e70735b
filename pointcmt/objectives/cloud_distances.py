"""Distances between clouds that can stand in for EMD in feature enhancement.

Each takes x [B, N, 3] and y [B, N, 3] in one unit of length and gives [B] in that unit, differentiable in
both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EPS = 1e-12


def chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Chamfer distance, unsquared: mean distance to the nearest point, averaged over both directions.

    Source: Fan et al., "A Point Set Generation Network", CVPR 2017 (there squared and summed); the unsquared
    mean is "CD-P" of Wang et al., "Cascaded Point Completion", 2020, in the unit of EMD.
    """
    squared = _squared_distances(x, y)
    to_y, to_x = squared.amin(2), squared.amin(1)
    return (_safe_sqrt(to_y).mean(1) + _safe_sqrt(to_x).mean(1)) / 2


def sinkhorn(x: Tensor, y: Tensor, blur: float = 0.01, scaling: float = 0.8) -> Tensor:
    """Debiased entropic optimal transport of Euclidean cost (Sinkhorn divergence, p = 1), by geomloss.

    Args:
        x: [B, N, 3].
        y: [B, M, 3].
        blur: finest length that the transport resolves.
        scaling: factor between the steps of the annealing, in (0, 1); nearer 1 is more exact and slower.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences",
    AISTATS 2019.
    """
    from geomloss import SamplesLoss

    return SamplesLoss("sinkhorn", p=1, blur=blur, scaling=scaling, backend="tensorized")(
        x.contiguous(), y.contiguous()
    )


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 64) -> Tensor:
    """Sliced 1-Wasserstein distance over directions spread evenly on the sphere.

    The directions are fixed (a Fibonacci sphere), so the loss draws no random numbers.

    Args:
        x: [B, N, 3].
        y: [B, N, 3].
        projections: number of directions.

    Source: Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", JMIV 2015.
    """
    index = torch.arange(projections, device=x.device, dtype=x.dtype) + 0.5
    # opposite directions give the same slice, so half a sphere is enough
    z = index / projections
    angle = index * (torch.pi * (1 + 5**0.5))
    radius = (1 - z * z).sqrt()
    directions = torch.stack((radius * angle.cos(), radius * angle.sin(), z))
    ours, theirs = (x @ directions).sort(1).values, (y @ directions).sort(1).values
    return (ours - theirs).abs().mean((1, 2))


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    # by differences, not by the product rule: that one loses all digits where points nearly coincide
    return (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)


def _safe_sqrt(squared: Tensor) -> Tensor:
    # the root has no gradient at 0, where two points coincide
    return squared.clamp_min(_EPS).sqrt()


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "chamfer": chamfer,
    "sinkhorn": sinkhorn,
    "sliced_wasserstein": sliced_wasserstein,
}
