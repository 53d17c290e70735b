"""What the reference students share: checks of the input, and shared MLPs applied to rows of features.

Features are kept channel-last, [..., C], so that a 1x1 convolution is one matrix product and a point's
feature is one contiguous row. The modules that hold the parameters are the public repositories' own
(``Conv2d``, ``BatchNorm2d``, …): only their weights are used here, reshaped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcmt import ops

# a 1x1 Conv1d or Conv2d, or a Linear; indexing an nn.Sequential tells mypy no more than Module
Conv = Any
_FEW = 16  # input channels up to which a product is as narrow as `product` says


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
    """``channels`` times ``width``, a multiple of 8 (exactly ``channels`` at width 1), at least 8: whole
    vectors for the fused operators."""
    return channels if width == 1 else max(8, 8 * round(channels * width / 8))


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
    # an embedding look-up is a gather of rows whose backward pass PyTorch has made fast on every device
    return F.embedding(idx + offset, features.reshape(batch * n, channels))


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


def at_least_float(x: Tensor) -> Tensor:
    """Half precision as float32, the rest as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` on rows: x [..., C_in], weight [C_out, C_in] -> [..., C_out]."""
    if weight.shape[1] > _FEW:
        return F.linear(x, weight, bias)
    # autograd multiplies in the order of the weight's layout, and for many rows of few channels the gradient
    # x.T @ grad is taken several times faster on a CPU than (grad.T @ x).T
    y = x @ weight.T.contiguous()
    return y if bias is None else y + bias


def linear(x: Tensor, conv: Conv) -> Tensor:
    """A 1x1 convolution on channel-last rows: [..., C_in] -> [..., C_out]."""
    return product(x, weight_of(conv), conv.bias)


class _Statistics(NamedTuple):
    """What a BatchNorm module would hand to ``F.batch_norm`` in its present mode."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor
    bias: Tensor
    training: bool
    momentum: float
    eps: float


def _statistics(bn: nn.Module) -> _Statistics | None:
    """The module's parameters by the rules of its own ``forward``; None where it must be called itself.

    Counts the batch, as ``forward`` does. SyncBatchNorm and other
    subclasses have rules of their own, and hooks want to see the call.
    """
    if type(bn) not in (nn.BatchNorm1d, nn.BatchNorm2d) or bn._forward_hooks or bn._forward_pre_hooks:
        return None
    assert isinstance(bn, nn.BatchNorm1d | nn.BatchNorm2d)
    if bn.weight is None or bn.bias is None:
        return None
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    keep = not bn.training or bn.track_running_stats
    mean, var = (bn.running_mean, bn.running_var) if keep else (None, None)
    training = bn.training or (bn.running_mean is None and bn.running_var is None)
    return _Statistics(mean, var, bn.weight, bn.bias, training, momentum, bn.eps)


def _activate(x: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(x, slope) if slope else F.relu(x)


def norm(x: Tensor, bn: nn.Module) -> Tensor:
    """Batch normalisation over all rows of x [..., C], by the module's own rules and running statistics."""
    # a single "image" [1, C, rows, 1] in channels-last order is the rows as they lie in memory
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    found = _statistics(bn)
    if found is not None:
        mean, var, weight, bias, training, momentum, eps = found
        y = F.batch_norm(image, mean, var, weight, bias, training, momentum, eps)
    elif isinstance(bn, nn.BatchNorm1d):
        y = bn(image[..., 0])[..., None]
    else:
        y = bn(image)
    return y.permute(0, 2, 3, 1).reshape(x.shape)


def norm_act(x: Tensor, bn: nn.Module, slope: float = 0.0) -> Tensor:
    """Batch normalisation over all rows of x [..., C], then (leaky) ReLU."""
    found = _statistics(bn)
    return _activate(norm(x, bn), slope) if found is None else ops.norm_act(x, *found, slope)


def norm_act_max(x: Tensor, bn: nn.Module, slope: float = 0.0) -> Tensor:
    """Batch normalisation over all rows of x [..., S, C], (leaky) ReLU, maximum over the S samples.

    x may have channels beyond the module's; they are left out of the result.
    """
    return _norm_act_max(x, bn, slope)


def scaled_norm_act_max(
    of_points: Tensor, of_centres: Tensor, idx: Tensor, factors: Tensor, bn: nn.Module, slope: float = 0.0
) -> Tensor:
    """As :func:`norm_act_max` on factors · (of_points[idx] + of_centres).

    [B, N, C], [B, M, C], [B, M, S] and [B, M, S, C] -> [B, M, C'], without the channels beyond the module's.
    """
    return _norm_act_max(of_points, bn, slope, of_centres, idx, factors)


def _norm_act_max(x: Tensor, bn: nn.Module, slope: float, *edges: Tensor) -> Tensor:
    """x: rows, or points with ``edges``: centres, idx and factors."""
    found = _statistics(bn)
    if found is None:
        if edges:
            centres, idx, factors = edges
            x = (rows(x, idx) + centres[:, :, None]) * factors
        return _activate(norm(x[..., : bn.num_features], bn), slope).max(-2).values
    channels, extra = len(found.weight), x.shape[-1] - len(found.weight)
    if not extra:
        return ops.norm_act_max(x, *found, slope, *edges)
    mean, var = found.running_mean, found.running_var
    padded = found._replace(
        running_mean=None if mean is None else F.pad(mean, (0, extra)),
        running_var=None if var is None else F.pad(var, (0, extra)),
        weight=F.pad(found.weight, (0, extra)),
        bias=F.pad(found.bias, (0, extra)),
    )
    out = ops.norm_act_max(x, *padded, slope, *edges)[..., :channels]
    if found.training:
        for kept, updated in ((mean, padded.running_mean), (var, padded.running_var)):
            if kept is not None and updated is not None:
                kept.copy_(updated[:channels])
    return out


def gather_norm_act(
    of_points: Tensor, of_centres: Tensor, idx: Tensor, bn: nn.Module, slope: float = 0.0
) -> Tensor:
    """act(bn(of_points[idx] + of_centres)): [B, N, C], [B, M, C], [B, M, S] -> [B, M, S, C]."""
    found = _statistics(bn)
    if found is None:
        return _activate(norm(rows(of_points, idx) + of_centres[:, :, None], bn), slope)
    return ops.norm_act(of_points, *found, slope, of_centres, idx)


def gather_norm_act_max(
    of_points: Tensor, of_centres: Tensor, idx: Tensor, bn: nn.Module, slope: float = 0.0
) -> Tensor:
    """As :func:`gather_norm_act`, then the maximum over the S samples: [B, M, C]."""
    found = _statistics(bn)
    if found is None:
        return gather_norm_act(of_points, of_centres, idx, bn, slope).max(-2).values
    return ops.norm_act_max(of_points, *found, slope, of_centres, idx)


def _linear_then(
    x: Tensor, conv: Conv, bn: nn.Module, slope: float, highest: bool = False, weight: Tensor | None = None
) -> Tensor:
    """1x1 convolution, normalisation, leaky ReLU, and where ``highest`` the maximum over the samples.

    ``weight`` [C_out, C_in] takes the place of the convolution's.
    """
    weight = weight_of(conv) if weight is None else weight
    found = _statistics(bn)
    if found is None:
        return (norm_act_max if highest else norm_act)(product(x, weight, conv.bias), bn, slope)
    if not found.training and found.running_mean is not None and found.running_var is not None:
        # fixed statistics make the normalisation linear too: it goes into the product
        scale = found.weight * torch.rsqrt(found.running_var + found.eps)
        shift = found.bias - found.running_mean * scale
        offset = shift if conv.bias is None else shift + conv.bias * scale
        y = product(x, weight * scale[:, None], offset)
        return _activate(y.max(-2).values if highest else y, slope)
    normalise = ops.norm_act_max if highest else ops.norm_act
    y = product(x, weight)
    if conv.bias is None:
        return normalise(y, *found, slope)
    # a batch's own statistics take the bias out again: it is left out of the product, shifts the running
    # mean, and has a gradient of exactly zero
    mean = None if found.running_mean is None else found.running_mean.clone()
    out = normalise(y, *found._replace(bias=found.bias + 0 * conv.bias, running_mean=mean), slope)
    if mean is not None and found.running_mean is not None:
        with torch.no_grad():
            found.running_mean.copy_(mean + found.momentum * conv.bias)
    return out


def linear_norm_act(
    x: Tensor, conv: Conv, bn: nn.Module, slope: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """1x1 convolution, batch normalisation, (leaky) ReLU on channel-last rows.

    ``weight`` [C_out, C_in], where given, takes the place of the convolution's.
    """
    return _linear_then(x, conv, bn, slope, weight=weight)


def linear_norm_act_max(x: Tensor, conv: Conv, bn: nn.Module, slope: float = 0.0) -> Tensor:
    """As :func:`linear_norm_act` on x [..., S, C], then the maximum over the S samples: [..., C_out]."""
    return _linear_then(x, conv, bn, slope, highest=True)


def linear_norm_add_act(x: Tensor, conv: Conv, bn: nn.Module, skip: Tensor) -> Tensor:
    """relu(bn(conv(x)) + skip) on channel-last rows: the end of a residual block."""
    return F.relu(_linear_then(x, conv, bn, slope=1.0) + skip)


def linear_norm_act_pool(x: Tensor, conv: Conv, bn: nn.Module, slope: float) -> tuple[Tensor, Tensor]:
    """As :func:`linear_norm_act` on x [B, N, C], then maximum and mean over the N points: two [B, C_out]."""
    y = linear_norm_act(x, conv, bn, slope)
    return y.max(1).values, y.mean(1)
