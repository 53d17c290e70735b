"""NT-Xent: SimCLR's loss between two versions of each shape, among all versions of all shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pointcmt.heads import SizedHead
from pointcmt.objectives._contrast import (
    MAX_LOGITS,
    check_batch,
    check_negatives,
    gathered,
    log_sum_exp,
    mean_over_ranks,
    needed_size,
    prepared,
    world_size,
)
from pointcmt.objectives.base import Objective, Sizes
from pointcmt.objectives.info_nce import two_copies
from pointcmt.types import StudentState, TeacherOutput


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


class IntraModalNTXent(Objective):
    """NT-Xent between two augmented copies of each cloud, through a head.

    Args:
        weight: 1.
        temperature: τ.
        hidden, out_features: of the head.

    Source: CrossPoint (Afham et al., CVPR 2022), intra-modal term, and its public code.
    """

    default_name = "intra_nt_xent"
    needs_global = True
    sees_copies = True

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 0.1,
        hidden: int = 1024,
        out_features: int = 256,
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
        self.chance = _chance(len(first))
        return nt_xent(first, second, temperature=self.temperature)

    def embed(self, student: StudentState, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Both copies [B, D] each in the space that they are compared in."""
        first, second = two_copies(self.name, student, self.point_head)
        return first, second


class CrossModalNTXent(Objective):
    """NT-Xent between each cloud and its image, through a head on either side.

    Of several augmented copies of a cloud it is the mean of their projections, not brought to length one,
    that is compared with the image's.

    Args:
        weight: 1.
        temperature: τ.
        hidden: widths of the heads for clouds and for images; the latter has no biases.
        out_features: size of the common space.
        point_head: the head for clouds of an :class:`IntraModalNTXent` that is in the same context, which
            trains it; None: one of its own.

    Source: CrossPoint (Afham et al., CVPR 2022), cross-modal term, as in its public code: the paper's formula
    is not quite NT-Xent.
    """

    default_name = "cross_nt_xent"
    needs_global = True
    sees_copies = True
    image_side = ("image_head",)

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 0.1,
        hidden: tuple[int, int] = (1024, 512),
        out_features: int = 256,
        point_head: SizedHead | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.temperature = temperature
        self.point_head: SizedHead | None = None
        # in a tuple, so that the other objective's head does not become a part of this one as well
        self._shared: tuple[SizedHead, ...] = ()
        if point_head is None:
            self.point_head = SizedHead(hidden[0], out_features)
        else:
            self._shared = (point_head,)
            out_features = point_head.out_features
        self.image_head = SizedHead(hidden[1], out_features, bias=False)
        self.chance: float | None = None

    def bind(
        self,
        *,
        generator: nn.Module | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        sizes = sizes or Sizes()
        self._head().build(needed_size(self.name, sizes.global_, "the network's pooled feature"))
        self.image_head.build(needed_size(self.name, sizes.image, "the image feature"))

    def _head(self) -> SizedHead:
        return self._shared[0] if self.point_head is None else self.point_head

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        check_batch(self.name, len(teacher.feature))
        self.chance = _chance(len(teacher.feature))
        return nt_xent(*self.embed(student, teacher), temperature=self.temperature)

    def embed(self, student: StudentState, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Clouds and images [B, D] each in the common space."""
        assert student.global_ is not None
        clouds = torch.stack(self._head()(student.global_).chunk(student.copies)).mean(0)
        return clouds, self.image_head(teacher.feature)


def _chance(shapes: int) -> float:
    return math.log(2 * shapes * world_size() - 1)
