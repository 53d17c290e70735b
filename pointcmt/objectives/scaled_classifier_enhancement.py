"""Classifier enhancement with the image feature brought to the scale of the student's."""

from __future__ import annotations

from torch import Tensor

from pointcmt.objectives.classifier_enhancement import ClassifierEnhancement
from pointcmt.types import StudentState, TeacherOutput


class ScaledClassifierEnhancement(ClassifierEnhancement):
    """CE of image features whose mean length in the batch is made that of the student's.

    Two networks' features may differ in length by any factor, and the length is what a linear classifier's
    confidence follows. No gradient reaches the factor.

    Args:
        weight: as of CE, which is a sum over the batch.
    """

    default_name = "scaled_classifier_enhancement"

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        ours, theirs = (x.detach().float().norm(dim=1).mean() for x in (student.feature, teacher.feature))
        factor = (ours / theirs.clamp(min=1e-12)).to(teacher.feature.dtype)
        return super().forward(student, teacher._replace(feature=teacher.feature * factor))
