"""The backward passes of gathering and interpolating, as the extensions expose them by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ZeroGradient(torch.autograd.Function):
    """The identity, with a gradient of zeros: what the extensions give their non-differentiated inputs.

    Unlike ``detach`` it keeps the graph connected, so that a backward pass through an output whose
    only input with gradient is this one gives zeros, as there, and not an error.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)


def scatter_columns(grad: Tensor, idx: Tensor, n: int) -> Tensor:
    """Adds column m of grad [B, C, M] to column idx[b, m] of zeros [B, C, n]."""
    index = idx.long()[:, None].expand(-1, grad.shape[1], -1)
    return grad.new_zeros(grad.shape[0], grad.shape[1], n).scatter_add_(2, index, grad)


def scatter_interpolated(grad: Tensor, idx: Tensor, weight: Tensor, m: int) -> Tensor:
    """Gradient of ``three_interpolate`` to its features: grad [B, C, n], idx and weight [B, n, 3] → [B, C,
    m].
    """
    weighted = grad[..., None] * weight[:, None]  # [B, C, n, 3]
    return scatter_columns(weighted.flatten(2), idx.flatten(1), m)
