"""Soft labels of standardised logits: only how the teacher ranks classes, not how large its scores are."""

from __future__ import annotations

from torch import Tensor

from pointcmt.objectives.base import check_logits
from pointcmt.objectives.soft_labels import SoftLabels
from pointcmt.types import StudentState, TeacherOutput


class StandardisedSoftLabels(SoftLabels):
    """Soft labels where each shape's logits, of both networks, are given mean 0 and deviation 1 over the
    classes first.

    The student is then asked for the teacher's relations between classes and is free in the scale of its
    logits, which a small network or a regularised one may not reach.

    Args:
        weight: 9, as the paper takes it beside a cross-entropy of weight 0.1.
        temperature: 2, the paper's base temperature.

    Raises:
        ValueError: temperature is not positive; class counts differ.

    Source: Sun et al., "Logit standardization in knowledge distillation", CVPR 2024, algorithm 1.
    """

    default_name = "standardised_soft_labels"

    def __init__(self, weight: float = 9.0, temperature: float = 2.0, name: str | None = None) -> None:
        super().__init__(weight, temperature, name=name)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        ours, theirs = map(_standardised, check_logits(self, student, teacher))
        return super().forward(student._replace(logits=ours), teacher._replace(logits=theirs))


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-7)
