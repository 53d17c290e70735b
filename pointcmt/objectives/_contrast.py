"""What the contrastive losses share: candidates of all ranks, and log-sum-exp without the whole matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pointcmt.ops._deferred import can_watch, deferred

MAX_LOGITS = 1 << 24
"""Most logits that are in memory at a time by default: 64 MiB in float32."""


def world_size() -> int:
    """Number of ranks of ``torch.distributed``; 1 where it is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Every rank's rows, one rank after the other; the gradient of a row is the sum of what all ranks have
    for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.start, ctx.count = sum(sizes[: dist.get_rank()]), len(tensor)
        most = max(sizes)
        padded = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, most - len(tensor))).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # every rank's loss is a mean over its own anchors, and DDP takes the mean of the ranks' gradients:
        # the sum here is then exactly the gradient of the mean over all anchors
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.count], None


def gathered(tensor: Tensor, gather: bool = True) -> tuple[Tensor, int]:
    """Rows [B, ...] of all ranks [ΣB, ...] with their gradients, and at which row this rank's begin.

    The tensor as it is, and 0, in one process or where ``gather`` is false. Ranks may have different B.
    """
    if not gather or world_size() == 1:
        return tensor, 0
    own = torch.tensor([len(tensor)], device=tensor.device)
    counts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    return _Gather.apply(tensor, sizes), sum(sizes[: dist.get_rank()])


def mean_over_ranks(values: Tensor, valid: Tensor | None = None, gather: bool = True) -> Tensor:
    """Of per-anchor losses [A], the scalar whose mean over the ranks is the mean over all their anchors.

    Args:
        values: losses.
        valid: bool [A] which of them count; None: all.
        gather: False takes this rank's mean.
    """
    if valid is None:
        valid = torch.ones_like(values, dtype=torch.bool)
    count = valid.sum(dtype=values.dtype)
    ranks = world_size() if gather else 1
    if ranks > 1:
        dist.all_reduce(count)
    return torch.where(valid, values, 0.0).sum() * ranks / count.clamp(min=1)


class _LogSumExp(torch.autograd.Function):
    """Log-sum-exp of each row of ``anchors @ candidates.T * scale``, some rows at a time, forward and
    backward: the logits are computed twice and never kept."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, candidates: Tensor, excluded: Tensor | None, scale: float, rows: int
    ) -> Tensor:
        ctx.scale, ctx.rows = scale, rows
        parts = [
            torch.logsumexp(_logits(anchors, candidates, excluded, scale, start, rows), 1)
            for start in range(0, len(anchors), rows)
        ]
        result = torch.cat(parts)
        ctx.save_for_backward(anchors, candidates, excluded, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        anchors, candidates, excluded, result = ctx.saved_tensors
        with torch.autocast(anchors.device.type, enabled=False):
            to_anchors, to_candidates = torch.empty_like(anchors), torch.zeros_like(candidates)
            for start in range(0, len(anchors), ctx.rows):
                part = slice(start, start + ctx.rows)
                logits = _logits(anchors, candidates, excluded, ctx.scale, start, ctx.rows)
                weights = (logits - result[part, None]).exp_() * (gradient[part, None] * ctx.scale)
                to_anchors[part] = weights @ candidates
                to_candidates.addmm_(weights.t(), anchors[part])
        return to_anchors, to_candidates, None, None, None


def _logits(
    anchors: Tensor, candidates: Tensor, excluded: Tensor | None, scale: float, start: int, rows: int
) -> Tensor:
    logits = anchors[start : start + rows] @ candidates.t() * scale
    if excluded is not None:
        logits = logits.scatter(1, excluded[start : start + rows, None], -torch.inf)
    return logits


def log_sum_exp(
    anchors: Tensor,
    candidates: Tensor,
    temperature: float,
    *,
    excluded: Tensor | None = None,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """log Σ_j exp(a_i · c_j / temperature) of anchors [A, D] over candidates [M, D] → [A].

    Args:
        anchors, candidates: float32 or float64.
        temperature: positive.
        excluded: int64 [A], one candidate that is left out for each anchor (itself); None: none.
        max_logits: at most so many of the A·M logits are in memory at a time (one row at least).
    """
    if len(anchors) * len(candidates) <= max_logits:
        logits = _logits(anchors, candidates, excluded, 1 / temperature, 0, len(anchors))
        return torch.logsumexp(logits, 1)
    rows = max(1, max_logits // len(candidates))
    return _LogSumExp.apply(anchors, candidates, excluded, 1 / temperature, rows)


def prepared(loss: str, normalize: bool, temperature: float, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors [..., D] checked, in float32 or wider, of length one where ``normalize``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, NaN or infinite values (on a GPU at a later
            call or on leaving the training context), or a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"{loss}: temperature is {temperature}; expected a positive number, such as 0.1")
    first_name, first = next(iter(tensors.items()))
    result = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{loss}: {name} has dtype {tensor.dtype}; expected a floating one")
        if tensor.shape[-1] != first.shape[-1] or tensor.shape[-1] == 0:
            raise ValueError(
                f"{loss}: {first_name} {list(first.shape)} and {name} {list(tensor.shape)} must have one "
                "size D > 0 of features; project them into one space first (pointcmt.heads)"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{loss}: {first_name} is on {first.device} and {name} on {tensor.device}; move them together"
            )
        _check_finite(loss, name, tensor)
        wide = tensor if tensor.dtype.itemsize >= 4 else tensor.float()
        result.append(F.normalize(wide, dim=-1) if normalize else wide)
    if any(tensor.dtype == torch.float64 for tensor in result):
        result = [tensor.double() for tensor in result]
    return tuple(result)


def check_negatives(loss: str, candidates: int, least: int, gather: bool) -> None:
    """Raise ``ValueError`` where there is nothing to tell the positive from."""
    if candidates < least:
        ranks = f" over {world_size()} ranks" if gather and world_size() > 1 else ""
        raise ValueError(
            f"{loss}: a batch of {candidates * 2 // least} shape(s){ranks} has no negatives, so there is "
            "nothing to contrast with: use batches of at least 2 shapes (32 is usual), and drop a last batch "
            "that is smaller (DataLoader(drop_last=True))"
        )


def _check_finite(loss: str, name: str, tensor: Tensor) -> None:
    message = (
        f"{loss}: {{count}} values of {name} are NaN or infinite: the network diverged, or its input has "
        "such values. Lower the learning rate or clip gradients, and look at the input"
    )
    if can_watch(tensor):
        deferred.look()
        # a forward pass in float16 that overflowed is for the GradScaler to skip, and no error
        with deferred.tolerated(tensor.dtype == torch.float16):
            deferred.watch((~torch.isfinite(tensor.detach())).sum(), message)
    elif tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        count = int((~torch.isfinite(tensor.detach())).sum())
        if count:
            raise ValueError(message.format(count=count))


def needed_size(objective: str, size: int | None, what: str) -> int:
    """The size, or the error that says how it becomes known."""
    if size is None:
        raise ValueError(
            f"{objective}: the size of {what} is not known, and a projection head is made by it: give the "
            "method points=<a few clouds as the network takes them>, and an image encoder that says its "
            "feature_dim (and map_channels)"
        )
    return size


def check_batch(objective: str, shapes: int) -> None:
    """Raise ``ValueError`` for a batch of one shape over all ranks, before its heads fail on it."""
    check_negatives(objective, shapes * world_size(), 2, gather=True)


def chance(candidates: int) -> float:
    """The loss of one that guesses among so many candidates on each rank."""
    return math.log(candidates * world_size())
