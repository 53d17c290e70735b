"""Classifier enhancement (CE): the student's classifier should agree on its own and on the image feature."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pointcmt.objectives.base import Objective, check_features, full_precision
from pointcmt.types import StudentState, TeacherOutput


class ClassifierEnhancement(Objective):
    """KL(student's class distribution ‖ that of its own classifier applied to the image feature), batch sum.

    The gradient passes through both arguments: to the student's feature and to its classifier.

    Args:
        weight: the paper's 0.3. It belongs to the sum over a batch of 32: 9.6 per sample mean, so another
            batch size means another weight for the same strength.

    Source: Yan et al., NeurIPS 2022, section 3.4; direction, reduction and weight as in the authors' public
        code.
    """

    default_name = "classifier_enhancement"
    needs_classify = True

    def __init__(self, weight: float = 0.3, name: str | None = None) -> None:
        super().__init__(weight, name)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        check_features(self, student, teacher)
        assert student.logits is not None and student.classify is not None
        # log_softmax leaves log-probabilities as they are, so a student that returns those is served too
        ours = F.log_softmax(full_precision(student.logits), dim=1)
        image = F.log_softmax(full_precision(student.classify(teacher.feature)), dim=1)
        return F.kl_div(image, ours, log_target=True, reduction="sum")
