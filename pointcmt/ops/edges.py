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

from pointcmt.ops._checks import check_number, check_required, check_tensors
from pointcmt.ops._extension import compiled_ops, use_compiled


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
) -> Tensor:
    """Batch normalisation over all rows by the rules of ``F.batch_norm``, (leaky) ReLU, and the maximum
    over the S samples of each group.

    Args:
        x: floating rows [..., S, C]; or points [B, N, C] where ``centres`` and ``idx`` are given: then the
            rows are the edges ``x[b, idx[b, m, s]] + centres[b, m]``.
        running_mean, running_var: [C] or None; updated in training (variance unbiased), used otherwise.
        weight, bias: [C]. These and the running statistics are of x's dtype, or float32 where x is of half
            precision, and on its device.
        training: normalise by the rows' own statistics. Without running statistics that is always so.
        momentum: of the running statistics.
        eps: added to the variance.
        slope: of the activation below 0, between 0 and 1, so that the activation keeps the order; 0 is ReLU.
        centres: [B, M, C], of x's dtype.
        idx: int32 or int64 [B, M, S], values in [0, N).

    Returns:
        [..., C], or [B, M, C]. Differentiable in x, centres, weight and bias (once). Among equal samples
        the first receives the gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a slope out of range, or one row only in
            training.
        IndexError: an index out of range (on the CPU; on a GPU an assertion of the kernel).
    """
    for name, number in (("slope", slope), ("eps", eps), ("momentum", momentum)):
        check_number("norm_act_max", name, number)
    own = _check(x, running_mean, running_var, weight, bias, training, slope, centres, idx)
    if not _compiled(x, idx):
        return reference_norm_act_max(
            x, running_mean, running_var, weight, bias, training, momentum, eps, slope, centres, idx
        )
    statistics = (None, None) if own else (running_mean, running_var)
    out, _, _, _, mean, var = torch.ops.pointcmt.norm_act_max(
        x, centres, idx, weight, bias, *statistics, eps, slope
    )
    if own:
        rows = x.numel() // x.shape[-1] if idx is None else idx.numel()
        _update(running_mean, running_var, mean, var, momentum, rows)
    return out


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    slope: float,
    centres: Tensor | None,
    idx: Tensor | None,
) -> bool:
    """Whether the rows' own statistics are used; ValueError where something does not fit."""
    check_required("norm_act_max", x=x, weight=weight, bias=bias)
    check_tensors(
        "norm_act_max", running_mean=running_mean, running_var=running_var, centres=centres, idx=idx
    )
    if not 0 <= slope <= 1:
        raise ValueError(f"norm_act_max: slope must be between 0 and 1, got {slope}")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"norm_act_max: x must be floating rows [..., S, C], got {x.dtype} of shape {list(x.shape)}"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("norm_act_max: running_mean and running_var come together")
    if (centres is None) != (idx is None):
        raise ValueError("norm_act_max: centres and idx come together")
    channels = x.shape[-1]
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtypes = (x.dtype, torch.float32) if half else (x.dtype,)
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, value in named.items():
        if value is None:
            continue
        if value.shape != (channels,) or value.dtype not in dtypes or value.device != x.device:
            raise ValueError(
                f"norm_act_max: {name} must be [{channels}] of {' or '.join(map(str, dtypes))} on x's device "
                f"{x.device}, got {list(value.shape)} of {value.dtype} on {value.device}"
            )
    rows = x.numel() // max(1, channels)
    if centres is not None and idx is not None:
        if (
            x.dim() != 3
            or idx.dim() != 3
            or idx.shape[0] != x.shape[0]
            or centres.shape != (x.shape[0], idx.shape[1], channels)
        ):
            raise ValueError(
                "norm_act_max: points [B, N, C], centres [B, M, C] and idx [B, M, S] were expected, "
                f"got {list(x.shape)}, {list(centres.shape)} and {list(idx.shape)}"
            )
        if idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"norm_act_max: idx must be int32 or int64, got {idx.dtype}")
        if centres.dtype != x.dtype:
            raise ValueError(f"norm_act_max: centres must be of x's dtype {x.dtype}, got {centres.dtype}")
        if centres.device != x.device or idx.device != x.device:
            raise ValueError(
                f"norm_act_max: centres and idx must be on x's device {x.device}, got {centres.device} and "
                f"{idx.device}"
            )
        rows = idx.numel()
    own = training or running_mean is None
    if own and rows < 2:
        raise ValueError(f"norm_act_max: training needs more than one row to normalise over, got {rows}")
    return own


def _compiled(x: Tensor, idx: Tensor | None) -> bool:
    """Half precision, channels that fill no vector, and nothing at all are PyTorch's business."""
    plain = x.dtype in (torch.float32, torch.float64) and x.shape[-1] % 8 == 0 and x.numel() > 0
    plain = plain and (idx is None or idx.numel() > 0)
    return plain and use_compiled(x, op="norm_act_max")


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
    inside = ((idx >= 0) & (idx < n)).all()  # a wrong index would read another cloud
    if idx.device.type != "cpu" or torch.compiler.is_compiling():  # nobody waits for the device
        torch._assert_async(inside, f"norm_act_max: an index is out of range for {n} points")
    elif not inside:
        raise IndexError(f"norm_act_max: an index is out of range for {n} points")
    offset = torch.arange(batch, device=idx.device).view(-1, 1, 1) * n
    rows = x.reshape(batch * n, channels).index_select(0, (idx + offset).flatten())
    return rows.view(*idx.shape, channels) + centres[:, :, None]


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
) -> Tensor:
    """The readable twin of :func:`norm_act_max`, in PyTorch."""
    rows = _rows(x, centres, idx)
    flat = rows.reshape(-1, rows.shape[-1])
    own = training or running_mean is None
    y = F.batch_norm(flat, running_mean, running_var, weight, bias, own, momentum, eps)
    y = F.leaky_relu(y, slope) if slope else F.relu(y)
    return y.view(rows.shape).max(-2).values


def _fake_norm_act_max(
    x: Tensor,
    centres: Tensor | None,
    idx: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    shape = (*x.shape[:-2], x.shape[-1]) if centres is None else tuple(centres.shape)
    total = x.new_empty(shape if running_mean is None and idx is not None else (0,))
    of_channels = torch.empty_like(weight), torch.empty_like(weight)
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), total, *of_channels


def _fake_backward(
    grad: Tensor, x: Tensor, centres: Tensor | None, idx: Tensor | None, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_centres = x.new_empty(0) if centres is None else centres.new_empty(centres.shape)
    return x.new_empty(x.shape), of_centres, torch.empty_like(weight), torch.empty_like(bias)


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, centres, idx, weight, bias, running_mean, _, eps, slope = inputs
    ctx.save_for_backward(x, centres, idx, weight, bias, *output[1:])
    ctx.settings = (eps, slope, running_mean is None)
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_x, grad_centres, *of_affine = torch.ops.pointcmt.norm_act_max_backward(grad, *saved, *ctx.settings)
    return grad_x, None if saved[1] is None else grad_centres, None, *of_affine, *[None] * 4


if "norm_act_max" in compiled_ops("cpu"):
    torch.library.register_fake("pointcmt::norm_act_max", _fake_norm_act_max)
    torch.library.register_fake("pointcmt::norm_act_max_backward", _fake_backward)
    torch.library.register_autograd("pointcmt::norm_act_max", _gradient, setup_context=_context)
