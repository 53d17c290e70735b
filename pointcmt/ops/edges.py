"""Batch normalisation, activation and maximum over edges, without writing the edges out.

What a set abstraction or an EdgeConv does to its N·S edges between two matrix products: gather,
normalise, activate, take the maximum. Features are channel-last, so an edge is a contiguous row.
The kernels never write gathered rows, take the maximum before the normalisation (which is
monotone in every channel, falling where its weight is negative), and fold the normalisation's
backward pass into the scatter. Without them PyTorch's own operators do the same, pass by pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pointcmt.ops._extension import compiled_ops, use_compiled


def norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.0,
    centres: Tensor | None = None,
    idx: Tensor | None = None,
) -> Tensor:
    """Batch normalisation over all rows of x, by the rules of ``F.batch_norm``, then (leaky) ReLU.

    Args:
        x: floating rows [..., C]; or points [B, N, C] where ``centres`` and ``idx`` are given: then the
            rows are the edges ``x[b, idx[b, m, s]] + centres[b, m]``.
        running_mean, running_var: [C] or None; updated in training (variance unbiased), used otherwise.
        weight, bias: [C].
        training: normalise by the rows' own statistics. Without running statistics that is always so.
        momentum: of the running statistics.
        eps: added to the variance.
        slope: of the activation below 0; 0 is ReLU.
        centres: [B, M, C].
        idx: int32 or int64 [B, M, S], values in [0, N).

    Returns:
        [..., C], or [B, M, S, C]. Differentiable in x, centres, weight and bias (once).

    Raises:
        ValueError: shapes that do not fit, or one row only in training.
        IndexError: an index out of range (checked on the CPU).
    """
    own = _check("norm_act", x, running_mean, running_var, weight, bias, training, centres, idx, x.dim() - 1)
    if not _compiled("norm_act", x, weight, centres):
        return reference_norm_act(
            x, running_mean, running_var, weight, bias, training, momentum, eps, slope, centres, idx
        )
    statistics = (None, None) if own else (running_mean, running_var)
    out, mean, var = torch.ops.pointcmt.norm_act(x, centres, idx, weight, bias, *statistics, eps, slope)
    if own:
        _update(running_mean, running_var, mean, var, momentum, out.numel() // out.shape[-1])
    return out


def norm_act_max(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.0,
    centres: Tensor | None = None,
    idx: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """As :func:`norm_act`, then the maximum over the S samples of each group.

    Args:
        x: floating [..., S, C]; or points [B, N, C] with ``centres`` and ``idx``.
        slope: 0 ≤ slope ≤ 1, so that the activation keeps the order.
        factors: [B, M, S, C], only with ``centres`` and ``idx``: the rows are the edges times these.
        others: as for :func:`norm_act`.

    Returns:
        [..., C], or [B, M, C]; differentiable in factors too. Among equal samples the first receives the
        gradient.

    Raises:
        ValueError: shapes that do not fit, a slope out of range, or one row only in training.
        IndexError: an index out of range (checked on the CPU).
    """
    if not 0 <= slope <= 1:
        raise ValueError(f"norm_act_max: slope must be between 0 and 1, got {slope}")
    own = _check(
        "norm_act_max", x, running_mean, running_var, weight, bias, training, centres, idx, x.dim() - 2
    )
    if factors is not None and (idx is None or factors.shape != (*idx.shape, x.shape[-1])):
        raise ValueError(
            "norm_act_max: factors [B, M, S, C] come with points [B, N, C] and idx [B, M, S], "
            f"got {list(factors.shape)}, {list(x.shape)} and {None if idx is None else list(idx.shape)}"
        )
    if not _compiled("norm_act_max", x, weight, centres, factors):
        return reference_norm_act_max(
            x, running_mean, running_var, weight, bias, training, momentum, eps, slope, centres, idx, factors
        )
    statistics = (None, None) if own else (running_mean, running_var)
    out, _, _, _, mean, var = torch.ops.pointcmt.norm_act_max(
        x, centres, idx, factors, weight, bias, *statistics, eps, slope
    )
    if own:
        rows = x.numel() // x.shape[-1] if idx is None else idx.numel()
        _update(running_mean, running_var, mean, var, momentum, rows)
    return out


def _check(
    op: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    centres: Tensor | None,
    idx: Tensor | None,
    leading: int,
) -> bool:
    """Whether the rows' own statistics are used; ValueError where something does not fit."""
    if leading < 1 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating rows, got {x.dtype} of shape {list(x.shape)}")
    channels = x.shape[-1]
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"{op}: weight and bias must be [{channels}], got {list(weight.shape)} and {list(bias.shape)}"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var come together")
    if (centres is None) != (idx is None):
        raise ValueError(f"{op}: centres and idx come together")
    rows = x.numel() // max(1, channels)
    if centres is not None and idx is not None:
        if x.dim() != 3 or idx.dim() != 3 or centres.shape != (x.shape[0], idx.shape[1], channels):
            raise ValueError(
                f"{op}: points [B, N, C], centres [B, M, C] and idx [B, M, S] were expected, "
                f"got {list(x.shape)}, {list(centres.shape)} and {list(idx.shape)}"
            )
        if idx.shape[0] != x.shape[0] or idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: idx must be int32 or int64 [B, M, S], got {idx.dtype} {list(idx.shape)}")
        rows = idx.numel()
    own = training or running_mean is None
    if own and rows < 2:
        raise ValueError(f"{op}: training needs more than one row to normalise over, got {rows}")
    return own


def _compiled(op: str, x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Half precision, channels that fill no vector, and nothing at all are PyTorch's business."""
    if op == "norm_act" and x.is_cuda and not any(other is not None for other in others):
        return False  # nothing to gather, no maximum: PyTorch's kernels for CUDA are made for that
    given = [other for other in others if other is not None]
    same = all(other.dtype == x.dtype for other in (weight, *given))
    plain = x.dtype in (torch.float32, torch.float64) and same and x.shape[-1] % 8 == 0 and x.numel() > 0
    return plain and all(other.numel() > 0 for other in given) and use_compiled(x, op=op)


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    n: int,
) -> None:
    if running_mean is None or running_var is None:
        return
    with torch.no_grad():
        running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        running_var.lerp_((var.detach() * (n / (n - 1))).to(running_var.dtype), momentum)


def _rows(x: Tensor, centres: Tensor | None, idx: Tensor | None) -> Tensor:
    if centres is None or idx is None:
        return x
    batch, n, channels = x.shape
    offset = torch.arange(batch, device=idx.device).view(-1, 1, 1) * n
    rows = x.reshape(batch * n, channels).index_select(0, (idx + offset).flatten())
    return rows.view(*idx.shape, channels) + centres[:, :, None]


def reference_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.0,
    centres: Tensor | None = None,
    idx: Tensor | None = None,
) -> Tensor:
    """The readable twin of :func:`norm_act`, in PyTorch."""
    rows = _rows(x, centres, idx)
    flat = rows.reshape(-1, rows.shape[-1])
    own = training or running_mean is None
    y = F.batch_norm(flat, running_mean, running_var, weight, bias, own, momentum, eps)
    return F.leaky_relu(y, slope).view(rows.shape) if slope else F.relu(y).view(rows.shape)


def reference_norm_act_max(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.0,
    centres: Tensor | None = None,
    idx: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """The readable twin of :func:`norm_act_max`, in PyTorch."""
    rows = _rows(x, centres, idx)
    rows = rows if factors is None else rows * factors
    normalised = reference_norm_act(
        rows, running_mean, running_var, weight, bias, training, momentum, eps, slope
    )
    return normalised.max(-2).values


def _fake_norm_act(
    x: Tensor, centres: Tensor | None, idx: Tensor | None, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape if idx is None else (*idx.shape, x.shape[-1])
    return x.new_empty(shape), torch.empty_like(weight), torch.empty_like(weight)


def _fake_norm_act_max(
    x: Tensor,
    centres: Tensor | None,
    idx: Tensor | None,
    factors: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    shape = (*x.shape[:-2], x.shape[-1]) if centres is None else tuple(centres.shape)
    total = x.new_empty(shape if running_mean is None and idx is not None and factors is None else (0,))
    of_channels = torch.empty_like(weight), torch.empty_like(weight)
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), total, *of_channels


def _fake_backward(
    grad: Tensor, x: Tensor, centres: Tensor | None, idx: Tensor | None, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_centres = x.new_empty(0) if centres is None else centres.new_empty(centres.shape)
    return x.new_empty(x.shape), of_centres, torch.empty_like(weight), torch.empty_like(bias)


def _fake_max_backward(
    grad: Tensor, x: Tensor, centres: Tensor | None, idx: Tensor | None, factors: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    of_x, of_centres, of_weight, of_bias = _fake_backward(grad, x, centres, idx, *rest)
    of_factors = x.new_empty(0) if factors is None else factors.new_empty(factors.shape)
    return of_x, of_centres, of_factors, of_weight, of_bias


def _norm_act_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, centres, idx, weight, bias, running_mean, _, eps, slope = inputs
    _, mean, var = output
    ctx.save_for_backward(x, centres, idx, weight, bias, mean, var)
    ctx.settings = (eps, slope, running_mean is None)
    ctx.mark_non_differentiable(mean, var)


def _norm_act_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, centres, idx, weight, bias, mean, var = ctx.saved_tensors
    grad_x, grad_centres, grad_weight, grad_bias = torch.ops.pointcmt.norm_act_backward(
        grad, x, centres, idx, weight, bias, mean, var, *ctx.settings
    )
    return grad_x, None if centres is None else grad_centres, None, grad_weight, grad_bias, *[None] * 4


def _norm_act_max_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, centres, idx, factors, weight, bias, running_mean, _, eps, slope = inputs
    ctx.save_for_backward(x, centres, idx, factors, weight, bias, *output[1:])
    ctx.settings = (eps, slope, running_mean is None)
    ctx.mark_non_differentiable(*output[1:])


def _norm_act_max_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_x, grad_centres, grad_factors, *of_affine = torch.ops.pointcmt.norm_act_max_backward(
        grad, *saved, *ctx.settings
    )
    grad_centres = None if saved[1] is None else grad_centres
    grad_factors = None if saved[3] is None else grad_factors
    return grad_x, grad_centres, None, grad_factors, *of_affine, *[None] * 4


if "norm_act_max" in compiled_ops("cpu"):
    torch.library.register_fake("pointcmt::norm_act", _fake_norm_act)
    torch.library.register_fake("pointcmt::norm_act_backward", _fake_backward)
    torch.library.register_fake("pointcmt::norm_act_max", _fake_norm_act_max)
    torch.library.register_fake("pointcmt::norm_act_max_backward", _fake_max_backward)
    torch.library.register_autograd("pointcmt::norm_act", _norm_act_gradient, setup_context=_norm_act_context)
    torch.library.register_autograd(
        "pointcmt::norm_act_max", _norm_act_max_gradient, setup_context=_norm_act_max_context
    )
