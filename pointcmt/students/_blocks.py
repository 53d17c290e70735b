"""What the reference students share: checks of the input, and shared MLPs applied to rows of features.

Features are kept channel-last, [..., C], so that a 1x1 convolution is one matrix product and a point's
feature is one contiguous row. The modules that hold the parameters are the public repositories' own
(``Conv2d``, ``BatchNorm2d``, …): only their weights are used here, reshaped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcmt import ops

# a 1x1 Conv1d or Conv2d, or a Linear; indexing an nn.Sequential tells mypy no more than Module
Conv = Any


def check_points(student: str, points: Tensor, in_channels: int, at_least: int, why: str = "") -> None:
    """ValueError unless points are floating [B, N, in_channels] with B ≥ 1 and N ≥ at_least."""
    if points.dim() != 3 or not points.is_floating_point() or points.shape[2] != in_channels:
        hint = ""
        if points.dim() == 3 and points.shape[1] == in_channels:
            hint = "; transpose [B, C, N] to [B, N, C] first"
        raise ValueError(
            f"{student} expects floating-point points [B, N, {in_channels}], got {points.dtype} of shape "
            f"{list(points.shape)}{hint}"
        )
    if points.shape[0] == 0:
        raise ValueError(f"{student} expects at least one cloud, got points of shape {list(points.shape)}")
    if points.shape[1] < at_least:
        raise ValueError(
            f"{student} needs at least {at_least} points per cloud{why}, got points of shape "
            f"{list(points.shape)}"
        )


def check_options(student: str, num_classes: int, feature_dim: int, width: float, dropout: float) -> None:
    """ValueError that names the option which is out of range."""
    for name, value in (("num_classes", num_classes), ("feature_dim", feature_dim)):
        if value < 1:
            raise ValueError(f"{student}: {name} must be at least 1, got {value}")
    if not width > 0:
        raise ValueError(f"{student}: width must be positive, got {width}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{student}: dropout must be in [0, 1), got {dropout}")


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, a multiple of 4 (exactly ``channels`` at width 1), at least 4."""
    return channels if width == 1 else max(4, 4 * round(channels * width / 4))


def sample(xyz: Tensor, npoint: int, random_start: bool = False) -> Tensor:
    """Furthest point sampling of min(npoint, N) points, from point 0 or from a random one of each cloud.

    Args:
        xyz: [B, N, 3].

    Returns:
        int64 [B, min(npoint, N)].
    """
    batch, n, _ = xyz.shape
    npoint = min(npoint, n)
    if not random_start:
        return ops.furthest_point_sample(xyz, npoint)
    # the operator starts at point 0: put another point there, and translate back
    start = torch.randint(n, (batch,), device=xyz.device)
    order = torch.arange(n, device=xyz.device).expand(batch, n).clone()
    order[:, 0] = start
    order.scatter_(1, start[:, None], 0)
    shuffled = xyz.gather(1, order[..., None].expand_as(xyz))
    return order.gather(1, ops.furthest_point_sample(shuffled, npoint))


def rows(features: Tensor, idx: Tensor) -> Tensor:
    """Rows of ``features`` [B, N, C] named by ``idx`` [B, ...]: [B, ..., C]."""
    batch, n, channels = features.shape
    offset = torch.arange(batch, device=idx.device).view(-1, *[1] * (idx.dim() - 1)) * n
    flat = features.reshape(batch * n, channels).index_select(0, (idx + offset).flatten())
    return flat.view(*idx.shape, channels)


def weight_of(conv: Conv) -> Tensor:
    """The weight of a 1x1 convolution or of a linear layer as a matrix [C_out, C_in]."""
    return conv.weight.flatten(1)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., C] @ weight.T in the weight's precision, also under autocast.

    For the linear layers that are applied per point before gathering: what follows subtracts two such
    products, and of the small difference half precision would leave little.
    """
    with torch.autocast(x.device.type, enabled=False):
        return x.to(weight.dtype) @ weight.T


def linear(x: Tensor, conv: Conv) -> Tensor:
    """A 1x1 convolution on channel-last rows: [..., C_in] -> [..., C_out]."""
    return F.linear(x, weight_of(conv), conv.bias)


def norm(x: Tensor, bn: nn.Module) -> Tensor:
    """Batch normalisation over all rows of x [..., C], by the module's own rules and running statistics."""
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(bn, nn.BatchNorm2d):  # [R, C, 1, 1] and [R, C] hold the same numbers
        return bn(flat[:, :, None, None]).view(x.shape)
    return bn(flat).view(x.shape)


def _normalised(
    op: Callable[..., Tensor],
    x: Tensor,
    bn: nn.Module,
    slope: float,
    centres: Tensor | None = None,
    idx: Tensor | None = None,
) -> Tensor | None:
    """``pointcmt.ops``' norm_act or norm_act_max by the rules of a BatchNorm module, counting the batch.

    None where the module is more than a plain BatchNorm (synchronised, hooked, without weights): then
    it has to be called itself.
    """
    if type(bn) not in (nn.BatchNorm1d, nn.BatchNorm2d) or bn._forward_hooks or bn._forward_pre_hooks:
        return None
    assert isinstance(bn, nn.BatchNorm1d | nn.BatchNorm2d)
    if bn.weight is None or bn.bias is None:
        return None
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(
                bn.num_batches_tracked
            )  # the average of all batches, as nn.BatchNorm takes
    return op(
        x,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        bn.training,
        momentum,
        bn.eps,
        slope,
        centres,
        idx,
    )


def norm_act(x: Tensor, bn: nn.Module, slope: float = 0.0) -> Tensor:
    """Batch normalisation over all rows of x [..., C], then (leaky) ReLU."""
    fused = _normalised(ops.norm_act, x, bn, slope)
    if fused is not None:
        return fused
    y = norm(x, bn)
    return F.leaky_relu(y, slope) if slope else F.relu(y)


def linear_norm_act(x: Tensor, conv: Conv, bn: nn.Module, slope: float = 0.0) -> Tensor:
    """1x1 convolution, batch normalisation, (leaky) ReLU on channel-last rows."""
    return norm_act(linear(x, conv), bn, slope)


def linear_norm_act_max(x: Tensor, conv: Conv, bn: nn.Module, slope: float = 0.0) -> Tensor:
    """As :func:`linear_norm_act` on x [..., S, C], then the maximum over the S samples: [..., C_out]."""
    return norm_act_max(linear(x, conv), bn, slope)


def gather_norm_act(
    of_points: Tensor, of_centres: Tensor, idx: Tensor, bn: nn.Module, slope: float = 0.0
) -> Tensor:
    """act(bn(of_points[idx] + of_centres)): [B, N, C], [B, M, C], [B, M, S] -> [B, M, S, C]."""
    fused = _normalised(ops.norm_act, of_points, bn, slope, of_centres, idx)
    if fused is not None:
        return fused
    return norm_act(rows(of_points, idx) + of_centres[:, :, None], bn, slope)


def gather_norm_act_max(
    of_points: Tensor, of_centres: Tensor, idx: Tensor, bn: nn.Module, slope: float = 0.0
) -> Tensor:
    """As :func:`gather_norm_act`, then the maximum over the S samples: [B, M, C]."""
    fused = _normalised(ops.norm_act_max, of_points, bn, slope, of_centres, idx)
    if fused is not None:
        return fused
    return gather_norm_act(of_points, of_centres, idx, bn, slope).amax(-2)


def linear_norm_act_pool(x: Tensor, conv: Conv, bn: nn.Module, slope: float) -> tuple[Tensor, Tensor]:
    """As :func:`linear_norm_act` on x [B, N, C], then maximum and mean over the N points: two [B, C_out]."""
    y = linear_norm_act(x, conv, bn, slope)
    return y.amax(1), y.mean(1)


def linear_norm_add_act(x: Tensor, conv: Conv, bn: nn.Module, skip: Tensor) -> Tensor:
    """relu(bn(conv(x)) + skip) on channel-last rows: the end of a residual block."""
    return F.relu(norm(linear(x, conv), bn) + skip)


def norm_act_max(x: Tensor, bn: nn.Module, slope: float = 0.0) -> Tensor:
    """Batch normalisation over all rows of x [..., S, C], (leaky) ReLU, maximum over the S samples."""
    fused = _normalised(ops.norm_act_max, x, bn, slope)
    return norm_act(x, bn, slope).amax(-2) if fused is None else fused
