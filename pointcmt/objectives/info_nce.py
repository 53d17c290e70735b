"""InfoNCE: of all candidates, which one belongs to the anchor?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pointcmt.heads import SizedHead
from pointcmt.objectives._contrast import (
    MAX_LOGITS,
    chance,
    check_batch,
    check_negatives,
    gathered,
    log_sum_exp,
    mean_over_ranks,
    needed_size,
    prepared,
)
from pointcmt.objectives.base import Objective, Sizes
from pointcmt.types import StudentState, TeacherOutput


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


class GlobalInfoNCE(Objective):
    """InfoNCE from each cloud to the images of its batch, through a head on either side.

    Args:
        weight: 1.
        temperature: τ; Pic@Point does not say its own, CrossPoint has 0.1.
        hidden: width of both heads.
        out_features: size of the common space.
        symmetric: also from images to clouds (the mean of both directions).

    Source: Pic@Point (Herzog and Suwelack, ACML 2024), equation 3: one direction, heads of two layers, 512-d.
    """

    default_name = "global_info_nce"
    needs_global = True
    sees_copies = True
    image_side = ("image_head",)

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 0.1,
        hidden: int = 512,
        out_features: int = 512,
        symmetric: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.temperature, self.symmetric = temperature, symmetric
        self.point_head = SizedHead(hidden, out_features)
        self.image_head = SizedHead(hidden, out_features)
        self.chance: float | None = None

    def bind(
        self,
        *,
        generator: nn.Module | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        sizes = sizes or Sizes()
        self.point_head.build(needed_size(self.name, sizes.global_, "the network's pooled feature"))
        self.image_head.build(needed_size(self.name, sizes.image, "the image feature"))

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        assert student.global_ is not None
        check_batch(self.name, len(teacher.feature))
        self.chance = chance(len(teacher.feature))
        images = self.image_head(teacher.feature)
        losses = [
            info_nce(part, images, temperature=self.temperature, symmetric=self.symmetric)
            for part in self.point_head(student.global_).chunk(student.copies)
        ]
        return torch.stack(losses).mean()

    def embed(self, student: StudentState, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Clouds and images [B, D] each in the common space: do the right ones find each other?"""
        return self.point_head(student.global_).chunk(student.copies)[0], self.image_head(teacher.feature)


class IntraModalInfoNCE(Objective):
    """InfoNCE between two augmented copies of each cloud, in both directions, through one head.

    Args:
        weight: 1.
        temperature: τ; 0.1 as in CrossPoint, whose code MM-Point's comes from.
        hidden, out_features: of the head; those of MM-Point's released checkpoint.

    Source: MM-Point (Yu and Song, AAAI 2024), intra-modal term.
    """

    default_name = "intra_info_nce"
    needs_global = True
    sees_copies = True

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 0.1,
        hidden: int = 1024,
        out_features: int = 512,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.temperature = temperature
        self.point_head = SizedHead(hidden, out_features)
        self.chance: float | None = None

    def bind(
        self,
        *,
        generator: nn.Module | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        sizes = sizes or Sizes()
        self.point_head.build(needed_size(self.name, sizes.global_, "the network's pooled feature"))

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        first, second = two_copies(self.name, student, self.point_head)
        self.chance = chance(len(first))
        return info_nce(first, second, temperature=self.temperature, symmetric=True)

    def embed(self, student: StudentState, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Both copies [B, D] each in the space that they are compared in."""
        first, second = two_copies(self.name, student, self.point_head)
        return first, second


class MultiViewInfoNCE(Objective):
    """InfoNCE between each cloud and m views of it at once, in both directions, a pair of heads per view.

    Of two copies of the clouds the first is compared with the first half of the views, the second with the
    others.

    Args:
        weight: 1.
        views: m.
        temperature: τ.
        hidden: width of all heads.
        out_features: sizes of the m spaces, from coarse to fine; default: from 512 down to 128.
        shared: one pair of heads for all views, of the first size (ablation).
        reduction: ``"sum"`` over the views and both directions, as in the paper, or ``"mean"``, so that the
            scale does not depend on m.

    Raises:
        ValueError: fewer than one view, or another number of sizes than of views.

    Source: MM-Point (Yu and Song, AAAI 2024): inter-modal term and Multi-MLP. The paper's numbers are not
    public: m of 4 is what its figure shows, 512 and 128 the sizes in its released checkpoint.
    """

    default_name = "multi_view_info_nce"
    needs_global = True
    needs_per_view = True
    sees_copies = True
    image_side = ("image_heads",)

    def __init__(
        self,
        weight: float = 1.0,
        views: int = 4,
        temperature: float = 0.1,
        hidden: int = 1024,
        out_features: Sequence[int] | None = None,
        shared: bool = False,
        reduction: Literal["sum", "mean"] = "sum",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if views < 1:
            raise ValueError(f"{self.name}: views is {views}; expected at least 1")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"{self.name}: reduction is {reduction!r}; expected 'sum' or 'mean'")
        spaces = _coarse_to_fine(views) if out_features is None else list(out_features)
        if len(spaces) != views:
            raise ValueError(f"{self.name}: {len(spaces)} sizes in out_features for {views} views")
        if shared:
            spaces = spaces[:1]
        self.views, self.temperature, self.reduction = views, temperature, reduction
        self.point_heads = nn.ModuleList(SizedHead(hidden, size) for size in spaces)
        self.image_heads = nn.ModuleList(SizedHead(hidden, size) for size in spaces)
        self.chance: float | None = None

    def bind(
        self,
        *,
        generator: nn.Module | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        sizes = sizes or Sizes()
        for heads, size, what in (
            (self.point_heads, sizes.global_, "the network's pooled feature"),
            (self.image_heads, sizes.image, "the image features"),
        ):
            for head in heads:
                assert isinstance(head, SizedHead)
                head.build(needed_size(self.name, size, what))

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        assert student.global_ is not None and teacher.per_view is not None
        batch, given = teacher.per_view.shape[:2]
        if given != self.views:
            raise ValueError(
                f"{self.name}: {given} views per shape; expected {self.views}. Give loss() so many, or make "
                f"the objective with views={given}"
            )
        check_batch(self.name, batch)
        terms = 2 * self.views if self.reduction == "sum" else 1
        self.chance = terms * chance(batch)
        copies = student.global_.chunk(student.copies)
        if len(self.point_heads) == 1:
            # one batch for the shared head, so that its statistics are those of all views
            images = self.image_heads[0](teacher.per_view).unbind(1)
            clouds = self.point_heads[0](student.global_).chunk(student.copies)
        losses = []
        for view in range(self.views):
            copy = view * len(copies) // self.views
            if len(self.point_heads) == 1:
                point, image = clouds[copy], images[view]
            else:
                point = self.point_heads[view](copies[copy])
                image = self.image_heads[view](teacher.per_view[:, view])
            losses.append(info_nce(point, image, temperature=self.temperature, symmetric=True))
        return terms * torch.stack(losses).mean()

    def embed(self, student: StudentState, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Clouds and their first views [B, D] each in the first space."""
        assert student.global_ is not None and teacher.per_view is not None
        clouds = self.point_heads[0](student.global_.chunk(student.copies)[0])
        return clouds, self.image_heads[0](teacher.per_view[:, 0])


def two_copies(objective: str, student: StudentState, head: nn.Module) -> list[Tensor]:
    """Projections [B, D] of the two copies of each cloud.

    Raises:
        ValueError: the context has not two copies, or one shape.
    """
    if student.copies != 2:
        raise ValueError(
            f"{objective} compares two augmented copies of each cloud, and the pass was of {student.copies}: "
            "make the context with copies=2, and give the network torch.cat([augment(points), "
            "augment(points)])"
        )
    assert student.global_ is not None
    check_batch(objective, len(student.global_) // 2)
    return list(head(student.global_).chunk(2))


def _coarse_to_fine(views: int) -> list[int]:
    """Sizes from 512 down to 128 in even proportions, in multiples of 32."""
    if views == 1:
        return [512]
    return [round(512 * 4 ** (-view / (views - 1)) / 32) * 32 for view in range(views)]
