"""Moving features to where the neighbours are: gather, group, interpolate; all differentiable."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pointcmt.ops._checks import check_features, check_range, check_required, check_xyz
from pointcmt.ops._extension import compiled_ops, use_compiled
from pointcmt.ops.neighbors import ball_query


def gather_points(features: Tensor, idx: Tensor) -> Tensor:
    """Picks one feature column per index: ``out[b, c, m] = features[b, c, idx[b, m]]``.

    Args:
        features: [B, C, N], any floating dtype (float16 and bfloat16 stay as they are).
        idx: int32 or int64 [B, M], values in [0, N).

    Returns:
        [B, C, M], features' dtype, differentiable in features.

    Raises:
        ValueError: wrong shapes or dtypes.
        IndexError: an index out of range (on CUDA, a device-side assertion).

    Source: ``gather_operation`` of erikwijmans/Pointnet2_PyTorch.
    """
    check_features("gather_points", features, idx, "[B, M]")
    if use_compiled(features, op="gather_points"):
        return torch.ops.pointcmt.gather_points(features, idx)
    return reference_gather_points(features, idx)


def group_points(features: Tensor, idx: Tensor) -> Tensor:
    """Picks the features of every neighbour: ``out[b, c, m, s] = features[b, c, idx[b, m, s]]``.

    Args:
        features: [B, C, N], any floating dtype (float16 and bfloat16 stay as they are).
        idx: int32 or int64 [B, M, S], values in [0, N).

    Returns:
        [B, C, M, S], features' dtype, differentiable in features.

    Raises:
        ValueError: wrong shapes or dtypes.
        IndexError: an index out of range (on CUDA, a device-side assertion).

    Source: ``grouping_operation`` of erikwijmans/Pointnet2_PyTorch.
    """
    check_features("group_points", features, idx, "[B, M, S]")
    if use_compiled(features, op="group_points"):
        return torch.ops.pointcmt.group_points(features, idx)
    return reference_group_points(features, idx)


def group_relative(xyz: Tensor, new_xyz: Tensor, idx: Tensor, features: Tensor | None = None) -> Tensor:
    """The neighbours' coordinates, relative to their centre, and their features, in one tensor.

    As ``torch.cat([group_points(xyz.mT, idx) - new_xyz.mT[..., None], group_points(features, idx)], 1)``,
    in one pass.

    Args:
        xyz: floating [B, N, 3], in units of the cloud.
        new_xyz: [B, M, 3], the centres.
        idx: int32 or int64 [B, M, S], values in [0, N).
        features: [B, C, N], or None.

    Returns:
        [B, 3 + C, M, S], in the dtype that the inputs promote to; differentiable in all but idx.

    Raises:
        ValueError: wrong shapes or dtypes.
        IndexError: an index out of range (on CUDA, a device-side assertion).

    Source: ``QueryAndGroup`` of erikwijmans/Pointnet2_PyTorch; Qi et al., PointNet++ (NeurIPS 2017).
    """
    check_xyz("group_relative", xyz=xyz, new_xyz=new_xyz)
    check_features("group_relative", xyz.mT if features is None else features, idx, "[B, M, S]")
    if idx.shape[1] != new_xyz.shape[1] or (features is not None and features.shape[2] != xyz.shape[1]):
        raise ValueError(
            "group_relative: xyz [B, N, 3], new_xyz [B, M, 3], idx [B, M, S] and features [B, C, N] must "
            f"agree in N and in M, got {list(xyz.shape)}, {list(new_xyz.shape)}, {list(idx.shape)} and "
            f"{None if features is None else list(features.shape)}"
        )
    given = [xyz, new_xyz] if features is None else [xyz, new_xyz, features]
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in given])
    xyz, new_xyz, *rest = (tensor.to(dtype) for tensor in given)
    features = rest[0] if rest else None
    if use_compiled(xyz, op="group_relative"):
        return torch.ops.pointcmt.group_relative(xyz, new_xyz, idx, features)
    return reference_group_relative(xyz, new_xyz, idx, features)


def query_and_group(
    radius: float, nsample: int, xyz: Tensor, new_xyz: Tensor, features: Tensor | None = None
) -> Tensor:
    """The points in a ball around each centre: :func:`~pointcmt.ops.ball_query`, then :func:`group_relative`.

    Args:
        radius: of the balls, in units of the cloud.
        nsample: points per ball.
        xyz, new_xyz, features: as for :func:`group_relative`.

    Returns:
        [B, 3 + C, M, nsample].
    """
    return group_relative(xyz, new_xyz, ball_query(radius, nsample, xyz, new_xyz), features)


def three_interpolate(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of three features: ``out[b, c, i] = Σ_j weight[b, i, j] · features[b, c, idx[b, i, j]]``.

    Args:
        features: [B, C, m], any floating dtype; half precision is summed in float32.
        idx: int32 or int64 [B, n, 3], values in [0, m).
        weight: floating [B, n, 3].

    Returns:
        [B, C, n], features' dtype, differentiable in features and in weight. (pointnet2_ops gives
        weight a gradient of zero; its distances carry none, so nothing there can tell.)

    Raises:
        ValueError: wrong shapes or dtypes.
        IndexError: an index out of range (on CUDA, a device-side assertion).

    Source: Qi et al., PointNet++ (NeurIPS 2017), equation 2; erikwijmans/Pointnet2_PyTorch.
    """
    check_features("three_interpolate", features, idx, "[B, n, 3]")
    check_required("three_interpolate", weight=weight)
    if idx.shape[-1] != 3 or weight.shape != idx.shape or not weight.is_floating_point():
        raise ValueError(
            "three_interpolate: idx and weight must both be [B, n, 3] and weight floating, "
            f"got idx {list(idx.shape)} and weight {weight.dtype} of shape {list(weight.shape)}"
        )
    if weight.device != features.device:
        raise ValueError(
            f"three_interpolate: features are on {features.device} and weight on {weight.device}; "
            "move them together"
        )
    # weights in the precision that the sum is taken in, whatever autocast made of them
    weight = weight.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    if use_compiled(features, op="three_interpolate"):
        return torch.ops.pointcmt.three_interpolate(features, idx, weight)
    return reference_three_interpolate(features, idx, weight)


def reference_gather_points(features: Tensor, idx: Tensor) -> Tensor:
    """The readable twin of :func:`gather_points`, in PyTorch."""
    check_range("gather_points", idx, features.shape[2])
    return features.gather(2, idx.long()[:, None].expand(-1, features.shape[1], -1))


def reference_group_points(features: Tensor, idx: Tensor) -> Tensor:
    """The readable twin of :func:`group_points`, in PyTorch."""
    return reference_gather_points(features, idx.flatten(1)).unflatten(2, idx.shape[1:])


def reference_group_relative(xyz: Tensor, new_xyz: Tensor, idx: Tensor, features: Tensor | None) -> Tensor:
    """The readable twin of :func:`group_relative`, in PyTorch."""
    relative = reference_group_points(xyz.mT, idx) - new_xyz.mT[..., None]
    return relative if features is None else torch.cat([relative, reference_group_points(features, idx)], 1)


def reference_three_interpolate(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """The readable twin of :func:`three_interpolate`, in PyTorch."""
    grouped = reference_group_points(features, idx).to(weight.dtype)
    a, b, c = (grouped * weight[:, None]).unbind(-1)
    return (a + b + c).to(features.dtype)


def _fake_gather(features: Tensor, idx: Tensor) -> Tensor:
    return features.new_empty((*features.shape[:2], *idx.shape[1:]))


def _fake_gather_backward(grad: Tensor, idx: Tensor, n: int) -> Tensor:
    return grad.new_empty((*grad.shape[:2], n))


def _fake_group_relative(xyz: Tensor, new_xyz: Tensor, idx: Tensor, features: Tensor | None) -> Tensor:
    channels = 0 if features is None else features.shape[1]
    return xyz.new_empty((xyz.shape[0], 3 + channels, *idx.shape[1:]))


def _fake_group_relative_backward(
    grad: Tensor, idx: Tensor, n: int, coordinates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = grad.shape[:2]
    of_xyz, of_centres = ((batch, n, 3), (batch, idx.shape[1], 3)) if coordinates else ((0,), (0,))
    return grad.new_empty(of_xyz), grad.new_empty(of_centres), grad.new_empty(batch, channels - 3, n)


def _group_relative_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    xyz, _, idx, features = inputs
    ctx.save_for_backward(idx)
    ctx.n, ctx.with_features = xyz.shape[1], features is not None


def _group_relative_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (idx,) = ctx.saved_tensors
    coordinates = any(ctx.needs_input_grad[:2])
    of_xyz, of_centres, of_features = torch.ops.pointcmt.group_relative_backward(
        grad, idx, ctx.n, coordinates
    )
    of_features = of_features if ctx.with_features else None
    return (of_xyz, of_centres, None, of_features) if coordinates else (None, None, None, of_features)


def _group_relative_scatter_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _scatter_context(ctx, inputs, output[2])
    ctx.coordinates = inputs[3]


def _group_relative_scatter_gradient(
    ctx: Any, of_xyz: Tensor, of_centres: Tensor, of_features: Tensor
) -> tuple[Tensor, None, None, None]:
    (idx,) = ctx.saved_tensors
    if not ctx.coordinates:
        batch, _, n = of_features.shape
        of_xyz, of_centres = of_features.new_zeros(batch, n, 3), of_features.new_zeros(batch, idx.shape[1], 3)
    return torch.ops.pointcmt.group_relative(of_xyz, of_centres, idx, of_features), None, None, None


def _fake_interpolate(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    return features.new_empty((*features.shape[:2], idx.shape[1]))


def _fake_interpolate_backward(grad: Tensor, idx: Tensor, weight: Tensor, m: int) -> Tensor:
    return grad.new_empty((*grad.shape[:2], m))


def _fake_weight_backward(grad: Tensor, features: Tensor, idx: Tensor) -> Tensor:
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.new_empty(idx.shape, dtype=dtype)


# Gathering and scattering are each other's derivative, so both are differentiable any number of times.


def _gather_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    features, idx = inputs
    ctx.save_for_backward(idx)
    ctx.n = features.shape[2]


def _scatter_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _register_gather(name: str) -> None:
    forward = getattr(torch.ops.pointcmt, name)
    backward = getattr(torch.ops.pointcmt, f"{name}_backward")

    def gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (idx,) = ctx.saved_tensors
        return backward(grad, idx, ctx.n), None

    def scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (idx,) = ctx.saved_tensors
        return forward(grad, idx), None, None

    torch.library.register_fake(f"pointcmt::{name}", _fake_gather)
    torch.library.register_fake(f"pointcmt::{name}_backward", _fake_gather_backward)
    torch.library.register_autograd(f"pointcmt::{name}", gather_gradient, setup_context=_gather_context)
    torch.library.register_autograd(
        f"pointcmt::{name}_backward", scatter_gradient, setup_context=_scatter_context
    )


def _interpolate_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    features, idx, weight = inputs
    ctx.save_for_backward(features, idx, weight)


def _interpolate_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    features, idx, weight = ctx.saved_tensors
    ops = torch.ops.pointcmt
    grad_features, grad_weight = None, None
    if ctx.needs_input_grad[0]:
        grad_features = ops.three_interpolate_backward(grad, idx, weight, features.shape[2])
    if ctx.needs_input_grad[2]:
        grad_weight = ops.three_interpolate_weight_backward(grad, features, idx)
    return grad_features, None, grad_weight


if "group_points" in compiled_ops("cpu"):
    _register_gather("gather_points")
    _register_gather("group_points")
    torch.library.register_fake("pointcmt::group_relative", _fake_group_relative)
    torch.library.register_fake("pointcmt::group_relative_backward", _fake_group_relative_backward)
    torch.library.register_autograd(
        "pointcmt::group_relative", _group_relative_gradient, setup_context=_group_relative_context
    )
    torch.library.register_autograd(
        "pointcmt::group_relative_backward",
        _group_relative_scatter_gradient,
        setup_context=_group_relative_scatter_context,
    )
    torch.library.register_fake("pointcmt::three_interpolate", _fake_interpolate)
    torch.library.register_fake("pointcmt::three_interpolate_backward", _fake_interpolate_backward)
    torch.library.register_fake("pointcmt::three_interpolate_weight_backward", _fake_weight_backward)
    torch.library.register_autograd(
        "pointcmt::three_interpolate", _interpolate_gradient, setup_context=_interpolate_context
    )
