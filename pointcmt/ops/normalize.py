"""Bringing clouds to a common scale."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt.ops._checks import check_required


def unit_cube(points: Tensor) -> Tensor:
    """Centres each cloud on its bounding box and scales the box's longest side to 1.

    Coordinates come out in [-0.5, 0.5]. Differentiable, the box included; where several points lie
    on one face of the box they share its gradient. A cloud whose points all coincide has no scale:
    it is only centred.

    Args:
        points: [..., N, 3], N ≥ 1, floating, in any unit.

    Returns:
        [..., N, 3] in the dtype of ``points``.

    Raises:
        ValueError: ``points`` is not floating [..., N, 3] with N ≥ 1.

    Source: the scaling that PointCMT applies before its EMD (Yan et al., NeurIPS 2022; public code).
    """
    check_required("unit_cube", points=points)
    if points.dim() < 2 or points.shape[-1] != 3 or not points.is_floating_point():
        raise ValueError(
            f"unit_cube: points must be a floating-point tensor [..., N, 3], "
            f"got {points.dtype} of shape {list(points.shape)}"
        )
    if points.shape[-2] == 0:
        raise ValueError(f"unit_cube: clouds need at least one point, got {list(points.shape)}")
    low, high = points.amin(-2, keepdim=True), points.amax(-2, keepdim=True)
    side = (high - low).amax(-1, keepdim=True)
    return (points - (low + high) / 2) / torch.where(side > 0, side, torch.ones_like(side))
