"""Plain feature matching: the student's feature should be the teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pointcmt.objectives.base import Objective, check_features, full_precision
from pointcmt.types import StudentState, TeacherOutput


class FeatureL2(Objective):
    """Mean squared difference of the two features, over batch and feature.

    Args:
        weight: 100, as Tian et al. set it where they train with this loss beside the task's. Romero et al.
            give no such weight: they train the hinted layers with this loss alone, and with labels after.

    Source: the hint loss of Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3, at the
    shape feature and without a regressor, since both sizes are equal; weight and mean as in the public code
    of Tian et al., "Contrastive Representation Distillation", ICLR 2020 (HobbitLong/RepDistiller:
    distiller_zoo/FitNet.py, and ``--distill hint -b 100`` in scripts/run_cifar_distill.sh).
    """

    default_name = "feature_l2"

    def __init__(self, weight: float = 100.0, name: str | None = None) -> None:
        super().__init__(weight, name)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        check_features(self, student, teacher)
        return F.mse_loss(full_precision(student.feature), full_precision(teacher.feature))
