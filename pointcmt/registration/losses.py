"""What CMIGNet is trained by: two contrasts, keypoint scores, matches and their credibility."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pointcmt.ops.rigid import Rigid
from pointcmt.registration.layers import rows_of
from pointcmt.registration.model import Registration

TEMPERATURE = 0.1
"""Of the cross-modal contrast; the public code's."""
MATCHED = 0.05
"""Points this near under the true motion correspond, in units of the unit sphere; the public code's."""
APART = 0.1
"""Points at least this far apart are negatives of the overlap contrast."""
POSITIVE_MARGIN, NEGATIVE_MARGIN = 0.1, 1.4
"""Of distances of normalised features, which lie in [0, 2]; FCGF's and PointContrast's."""


@dataclass(frozen=True)
class LossWeights:
    """Factors of the loss's terms; 0 leaves a term out. The public code's."""

    cross_modal: float = 1.0
    """Contrast of the clouds' features with their images'."""
    overlap_contrast: float = 1.0
    """Contrast of point features in the overlap."""
    significance: float = 0.5
    """Keypoint scores against the certainty of their matches."""
    match: float = 1.0
    """Cross-entropy of the matches, summed over iterations."""
    credibility: float = 1.0
    """Binary cross-entropy of whether a match is right, summed over iterations."""


def registration_loss(
    registration: Registration,
    source: Tensor,
    target: Tensor,
    truth: Rigid | tuple[Tensor, Tensor],
    weights: LossWeights | None = None,
) -> dict[str, Tensor]:
    """The named terms of the loss, unweighted, and ``loss``, their weighted sum.

    Args:
        registration: what the network said in training mode.
        source, target: [B, N, 3], [B, M, 3] what it saw.
        truth: the rotation and translation it was given.
        weights: factors of the terms.

    Raises:
        ValueError: the registration has no trace, or all weights are 0.
    """
    weights = weights or LossWeights()
    trace = registration.trace
    if trace is None:
        raise ValueError("registration_loss needs the trace of a step in training mode, with truth given")
    truth = Rigid(*truth)
    terms: dict[str, Tensor] = {}
    if weights.cross_modal and trace.view_features is not None:
        pooled = (trace.source_features.amax(1) + trace.target_features.amax(1)) / 2
        terms["cross_modal"] = nt_xent(pooled, trace.view_features)
    if weights.overlap_contrast:
        terms["overlap_contrast"] = overlap_contrast(
            trace.source_features, trace.target_features, truth.move(source), target
        )
    if weights.significance and trace.source_scores is not None and trace.target_scores is not None:
        first = trace.iterations[0].logits
        terms["significance"] = F.mse_loss(trace.source_scores, certainty(first, 2)) + F.mse_loss(
            trace.target_scores, certainty(first, 1)
        )
    same = trace.target_index[:, :, None] == trace.target_index[:, None, :]
    aimed = rows_of(truth.move(source), trace.source_index)
    for step in trace.iterations:
        if weights.match:
            term = match_loss(step.logits, same, trace.matched)
            terms["match"] = terms.get("match", 0) + term
        if weights.credibility:
            chosen = rows_of(rows_of(target, trace.target_index), step.chosen)
            right = (chosen - aimed).norm(dim=-1) < MATCHED
            term = F.binary_cross_entropy_with_logits(step.credibility, right.to(step.credibility))
            terms["credibility"] = terms.get("credibility", 0) + term
    if not terms:
        raise ValueError(f"{weights}: no term of the loss is left; give one a weight")
    return {
        "loss": torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum(),
        **terms,
    }


def nt_xent(first: Tensor, second: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Normalised temperature-scaled cross-entropy of B pairs [B, C]: each of the 2B finds its partner.

    Source: Chen et al., SimCLR (ICML 2020), equation 1; ln(2B − 1) where features say nothing.
    """
    both = F.normalize(torch.cat([first, second]), dim=1)
    similarity = (both @ both.t() / temperature).masked_fill(
        torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf
    )
    partner = torch.arange(len(both), device=both.device).roll(len(first))
    return F.cross_entropy(similarity, partner)


def overlap_contrast(
    source_features: Tensor, target_features: Tensor, aligned: Tensor, target: Tensor, samples: int = 256
) -> Tensor:
    """Contrast of point features: true matches near, the most similar wrong ones far.

    Positives are the source's points with a target point within ``MATCHED`` of where they truly lie, each
    with its nearest; negatives of either are the most similar of the other cloud's points at least ``APART``
    from there, inside and outside of the overlap alike. On normalised features:
    ``max(0, d⁺ − 0.1)² + ½ Σ max(0, 1.4 − d⁻)²``, mean over the positives of a pair, then over the pairs that
    have any (FCGF's hardest-contrastive loss: Choy et al., ICCV 2019).

    Args:
        source_features: [B, N, C] and
        target_features: [B, M, C].
        aligned: [B, N, 3] the source under the true motion.
        target: [B, M, 3].
        samples: of a source's points, drawn at random, to bound the work.
    """
    rows = (
        torch.rand(aligned.shape[:2], device=aligned.device).topk(min(samples, aligned.shape[1]), 1).indices
    )
    source, places = F.normalize(rows_of(source_features, rows), dim=-1), rows_of(aligned, rows)
    nearest, positive, forth, any_forth, back, any_back = _contrasted(
        source.detach(), target_features.detach(), places, target
    )
    # rows first, then the normalisation: its gradient is of the rows in use alone
    partner, negative = (F.normalize(rows_of(target_features, index), dim=-1) for index in (nearest, forth))
    attraction = F.relu(_apart(source, partner) - POSITIVE_MARGIN).square()
    repulsion = torch.zeros_like(attraction)
    for anchor, wrong, usable in (
        (source, negative, any_forth),
        (partner, rows_of(source, back), any_back),
    ):
        repulsion = repulsion + F.relu(NEGATIVE_MARGIN - _apart(anchor, wrong)).square() * usable / 2
    count = positive.sum(1)
    per_pair = ((attraction + repulsion) * positive).sum(1) / count.clamp(min=1)
    return per_pair.sum() / (count > 0).sum().clamp(min=1)


def _contrasted(
    source: Tensor, target_features: Tensor, places: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    """What the contrast compares, without gradient.

    Args:
        source: [B, P, C] normalised features of some of the source's points, which truly lie at
        places: [B, P, 3].
        target_features, target: [B, M, C] and [B, M, 3].

    Returns:
        [B, P] each: the target's point nearest to a place, whether it matches; the most similar wrong point
        of the target, whether there is one; the one of ``source`` for that nearest point, whether there is.
    """
    every = F.normalize(target_features, dim=-1)
    distance = torch.cdist(places, target)  # [B, P, M]
    near, nearest = distance.min(2)
    forth = (source @ every.mT).masked_fill_(distance < APART, -torch.inf).max(2)
    among = torch.cdist(rows_of(target, nearest), places)
    back = (rows_of(every, nearest) @ source.mT).masked_fill_(among < APART, -torch.inf).max(2)
    return (
        nearest,
        near < MATCHED,
        forth.indices,
        forth.values > -torch.inf,
        back.indices,
        back.values > -torch.inf,
    )


def certainty(logits: Tensor, dim: int) -> Tensor:
    """Negative entropy of the match distributions along ``dim``, without gradient: 0 for a sure match."""
    with torch.no_grad():
        log = logits.float().log_softmax(dim)
        return (log.exp() * log).sum(dim)


def match_loss(logits: Tensor, same: Tensor, matched: Tensor) -> Tensor:
    """Cross-entropy of row k's match with column k, over rows that have a true match; mean over them.

    Several keypoints of the source may have the same nearest target point, which then fills several columns:
    ``same`` [B, K, K] says which columns are row k's; their probabilities are summed.
    """
    log = logits.float().log_softmax(2).masked_fill(~same, -torch.inf).logsumexp(2)
    return -(log * matched).sum() / matched.sum().clamp(min=1)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Distances along the last dimension, whose gradient is finite at 0."""
    return ((a - b).square().sum(-1) + 1e-12).sqrt()
