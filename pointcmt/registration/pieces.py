"""A function of a batch, computed piece by piece, and again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Piece = tuple[slice, slice]
"""Some pairs of a batch, and some of their rows."""


def in_pieces(
    function: Callable[..., tuple[Tensor, ...]],
    pieces: Sequence[Piece],
    rows: Sequence[Tensor],
    others: Sequence[Tensor],
    parameters: Iterable[Tensor] = (),
) -> tuple[Tensor, ...]:
    """``function(*rows, *others)`` of some pairs and rows after the other.

    The same to rounding as of all at once. Between pieces nothing is kept but the results, which are written
    to where they belong: results of their own, small ones between large passing tensors, would leave holes in
    the heap that the C library cannot use again, 400 MB of them in the first step of the paper's network.

    Args:
        function: its results [b, r, …] do not depend on the other pairs, nor on the other rows, and nothing
            in it is random.
        pieces: they cover batch and rows, each once.
        rows: [B, R, …] each, of which it is given some pairs and some of their rows.
        others: [B, …] each, of which it is given some pairs.
        parameters: what else it depends on, for the gradient.

    Returns:
        [B, R, …] each. Differentiable once.
    """
    if not torch.is_grad_enabled():
        return _computed(function, pieces, rows, others)
    return _InPieces.apply(function, pieces, len(rows), len(others), *rows, *others, *parameters)


def _part(piece: Piece, rows: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [x[piece] for x in rows] + [x[piece[0]] for x in others]


def _computed(
    function: Callable[..., tuple[Tensor, ...]],
    pieces: Sequence[Piece],
    rows: Sequence[Tensor],
    others: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    whole: list[Tensor] = []
    for piece in pieces:
        results = function(*_part(piece, rows, others))
        if not whole:
            whole = [x.new_empty(*rows[0].shape[:2], *x.shape[2:]) for x in results]
        for place, result in zip(whole, results, strict=True):
            place[piece] = result
    return tuple(whole)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Any, pieces: Sequence[Piece], rows: int, others: int, *tensors: Tensor
    ) -> Any:
        ctx.function, ctx.pieces, ctx.rows, ctx.inputs = function, pieces, rows, rows + others
        ctx.save_for_backward(*tensors)
        device = tensors[0].device.type
        ctx.precision = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return _computed(function, pieces, tensors[:rows], tensors[rows : rows + others])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_results: Tensor) -> tuple[Tensor | None, ...]:
        tensors, rows, inputs = ctx.saved_tensors, ctx.rows, ctx.inputs
        needed = ctx.needs_input_grad[4:]
        whole = [torch.zeros_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        for piece in ctx.pieces:
            # where a tensor's part is: the piece, its pairs, all of it
            places: list[Any] = [*[piece] * rows, *[piece[0]] * (inputs - rows)]
            places += [...] * (len(tensors) - inputs)
            part = [
                x.detach().requires_grad_(need)
                for x, need in zip(_part(piece, tensors[:rows], tensors[rows:inputs]), needed, strict=False)
            ]
            with torch.enable_grad(), torch.autocast(**ctx.precision):
                results = ctx.function(*part)
            sought = [k for k, need in enumerate(needed) if need]
            gradients = torch.autograd.grad(
                results,
                [part[k] if k < inputs else tensors[k] for k in sought],
                [x[piece] for x in of_results],
                allow_unused=True,
            )
            del results
            for k, gradient in zip(sought, gradients, strict=True):
                sum_ = whole[k]
                if gradient is not None and sum_ is not None:
                    sum_[places[k]] += gradient
        return (None, None, None, None, *whole)
