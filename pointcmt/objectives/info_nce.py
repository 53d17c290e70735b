"""InfoNCE: of all candidates, which one belongs to the anchor?"""

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


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor | None = None,
    *,
    temperature: float = 0.1,
    symmetric: bool = False,
    normalize: bool = True,
    gather: bool = True,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Mean over the anchors of −log(exp(a · c⁺ / τ) / Σ_c exp(a · c / τ)), from anchors to candidates.

    At chance it is ln M, with M the number of candidates over all ranks.

    Args:
        anchors: [A, D].
        candidates: [M, D].
        positives: bool [A, M], which candidates belong to each anchor, at least one each; the loss is then
            the mean over them (Khosla et al. 2020, L_out). None: A = M, and row i belongs to row i.
        temperature: τ.
        symmetric: the mean of both directions, anchors to candidates and candidates to anchors.
        normalize: bring the features to length one first.
        gather: where ``torch.distributed`` runs, the other ranks' candidates are negatives too, with their
            gradients. The result is a scalar whose mean over the ranks, and whose gradient as
            ``DistributedDataParallel`` averages it, are those of one process with the joined batch.
        max_logits: at most so many logits are in memory at a time; what exceeds it is computed some rows at
            a time, and again in the backward pass.

    Returns:
        Scalar in float32 (float64 for such input), also under autocast.

    Raises:
        ValueError: shapes that do not fit, an anchor without a positive, a single candidate, NaN or infinite
            values.

    Source: van den Oord, Li and Vinyals, "Representation learning with contrastive predictive coding", 2018,
    equation 4; symmetric as in Radford et al. 2021 (CLIP).
    """
    if anchors.ndim != 2 or candidates.ndim != 2:
        raise ValueError(
            f"info_nce: anchors {list(anchors.shape)} and candidates {list(candidates.shape)}; expected "
            "[A, D] and [M, D]"
        )
    if positives is None and len(anchors) != len(candidates):
        raise ValueError(
            f"info_nce: {len(anchors)} anchors and {len(candidates)} candidates; give as many of each, row "
            "by row, or say with positives=<bool [A, M]> which belong together"
        )
    if positives is not None:
        _check_positives(positives, len(anchors), len(candidates), symmetric)
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, candidates = prepared(
            "info_nce", normalize, temperature, anchors=anchors, candidates=candidates
        )
        loss = _one_direction(anchors, candidates, positives, temperature, gather, max_logits)
        if symmetric:
            back = None if positives is None else positives.t()
            other = _one_direction(candidates, anchors, back, temperature, gather, max_logits)
            loss = (loss + other) / 2
    return loss


def _one_direction(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor | None,
    temperature: float,
    gather: bool,
    max_logits: int,
) -> Tensor:
    if positives is None:
        mine = candidates
    else:
        # the mean of an anchor's positive logits is its logit with the mean of its positives
        share = positives.to(candidates.dtype)
        mine = share @ candidates / share.sum(1, keepdim=True)
    everyone, _ = gathered(candidates, gather)
    check_negatives("info_nce", len(everyone), 2, gather)
    total = log_sum_exp(anchors, everyone, temperature, max_logits=max_logits)
    return mean_over_ranks(total - (anchors * mine).sum(1) / temperature, gather=gather)


def _check_positives(positives: Tensor, anchors: int, candidates: int, symmetric: bool) -> None:
    if positives.dtype != torch.bool or positives.shape != (anchors, candidates):
        raise ValueError(
            f"info_nce: positives is {positives.dtype} {list(positives.shape)}; expected bool "
            f"[{anchors}, {candidates}], true where a candidate belongs to an anchor"
        )
    if positives.device.type == "cpu":
        without = int((~positives.any(1)).sum()) + (int((~positives.any(0)).sum()) if symmetric else 0)
        if without:
            raise ValueError(
                f"info_nce: {without} rows of positives have no positive; leave those anchors out, or give "
                "each at least one"
            )
