"""NT-Xent: SimCLR's loss between two versions of each shape, among all versions of all shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt.objectives._contrast import (
    MAX_LOGITS,
    check_negatives,
    gathered,
    log_sum_exp,
    mean_over_ranks,
    prepared,
)


def nt_xent(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    gather: bool = True,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Mean over 2B anchors of the cross-entropy that tells the other version among the 2B − 1 others.

    Unlike InfoNCE, the other shapes' versions of the anchor's own kind are negatives too. At chance it is
    ln(2B − 1), with B over all ranks.

    Args:
        first: [B, D] features of one version of each shape.
        second: [B, D] of the other, in the same order.
        temperature: τ.
        normalize, gather, max_logits: as for :func:`pointcmt.objectives.info_nce`.

    Returns:
        Scalar in float32 (float64 for such input), also under autocast.

    Raises:
        ValueError: shapes that do not fit, a batch of one shape, NaN or infinite values.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020,
    equation 1; equal to ``NTXentLoss`` of the package lightly, which CrossPoint and CMIGNet use.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"nt_xent: first {list(first.shape)} and second {list(second.shape)}; expected two tensors "
            "[B, D] of the same shapes in the same order"
        )
    with torch.autocast(first.device.type, enabled=False):
        first, second = prepared("nt_xent", normalize, temperature, first=first, second=second)
        everyone_first, start = gathered(first, gather)
        everyone_second, _ = gathered(second, gather)
        count = len(everyone_first)
        check_negatives("nt_xent", 2 * count, 4, gather)
        itself = torch.arange(start, start + len(first), device=first.device)
        total = log_sum_exp(
            torch.cat([first, second]),
            torch.cat([everyone_first, everyone_second]),
            temperature,
            excluded=torch.cat([itself, itself + count]),
            max_logits=max_logits,
        )
        return mean_over_ranks(total - (first * second).sum(1).repeat(2) / temperature, gather=gather)
