"""Moving features to where the neighbours are: gather, group, interpolate; all differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pointcmt.ops._checks import check_features, check_range
from pointcmt.ops._extension import compiled_ops, use_compiled


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


def reference_three_interpolate(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """The readable twin of :func:`three_interpolate`, in PyTorch."""
    grouped = reference_group_points(features, idx).to(weight.dtype)
    a, b, c = (grouped * weight[:, None]).unbind(-1)
    return (a + b + c).to(features.dtype)


def _fake_gather(features: Tensor, idx: Tensor) -> Tensor:
    return features.new_empty((*features.shape[:2], *idx.shape[1:]))


def _fake_gather_backward(grad: Tensor, idx: Tensor, n: int) -> Tensor:
    return grad.new_empty((*grad.shape[:2], n))


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
    torch.library.register_fake("pointcmt::three_interpolate", _fake_interpolate)
    torch.library.register_fake("pointcmt::three_interpolate_backward", _fake_interpolate_backward)
    torch.library.register_fake("pointcmt::three_interpolate_weight_backward", _fake_weight_backward)
    torch.library.register_autograd(
        "pointcmt::three_interpolate", _interpolate_gradient, setup_context=_interpolate_context
    )
