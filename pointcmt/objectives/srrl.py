"""Softmax regression representation learning (SRRL): the teacher's classifier judges our feature."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.objectives.base import Objective, Sizes, full_precision
from pointcmt.types import StudentState, TeacherOutput


class SoftmaxRegression(Objective):
    """Squared difference of the features, plus that of the teacher's classifier applied to both.

    Args:
        weight: the paper's 1, for both parts alike.
        student_dim: size of the student's feature; with ``teacher_dim``, builds the paper's connector (linear
            map, batch normalisation, ReLU) between the two. Its parameters are trained: add
            ``CrossModalTraining.parameters()`` to the optimizer. Left out, the features are compared as they
            are and must have one size.
        teacher_dim: size of the teacher's feature.

    Raises:
        ValueError: one size without the other, or sizes that do not fit.

    Source: Yang et al., "Knowledge distillation via softmax regression representation learning", ICLR 2021,
    equations 1 and 3 with the L2 form of the latter, α = β = 1; reductions (means) as in the authors' public
    code.
    """

    default_name = "srrl"
    needs_logits = True

    def __init__(
        self,
        weight: float = 1.0,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if (student_dim is None) != (teacher_dim is None):
            raise ValueError(
                f"{self.name}: student_dim is {student_dim} and teacher_dim {teacher_dim}; give both, or "
                "neither"
            )
        self.connector: nn.Module = nn.Identity()
        if student_dim is not None and teacher_dim is not None:
            self.connector = nn.Sequential(
                nn.Linear(student_dim, teacher_dim, bias=False), nn.BatchNorm1d(teacher_dim), nn.ReLU()
            )
        # in a tuple, so that a classifier that is a module does not become a part of this one
        self._classify: tuple[Callable[[Tensor], Tensor], ...] = ()

    def bind(
        self,
        *,
        generator: nn.Module | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        self._classify = () if classify is None else (classify,)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        if not self._classify:
            raise RuntimeError(
                f"{self.name} needs the teacher's classifier: use it in CrossModalTraining, or call "
                "bind(classify=teacher.classify)"
            )
        ours = self.connector(full_precision(student.feature))
        if ours.shape != teacher.feature.shape:
            raise ValueError(
                f"{self.name}: the student's feature has size {ours.shape[1]}, the teacher's "
                f"{teacher.feature.shape[1]}; give student_dim={student.feature.shape[1]} and "
                f"teacher_dim={teacher.feature.shape[1]} to build a connector"
            )
        feature_loss = F.mse_loss(full_precision(ours), full_precision(teacher.feature))
        assert teacher.logits is not None
        logits = self._classify[0](ours)
        return feature_loss + F.mse_loss(full_precision(logits), full_precision(teacher.logits))
