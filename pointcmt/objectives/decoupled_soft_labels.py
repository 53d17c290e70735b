"""Decoupled soft labels (DKD): how sure of the right class, and how the others rank, each with a weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pointcmt.objectives.base import Objective, check_logits
from pointcmt.types import StudentState, TeacherOutput


class DecoupledSoftLabels(Objective):
    """α KL of (right class, all others) + β KL within the other classes, both at temperature T, times T².

    Hinton's loss weighs the second by how unsure the teacher is of the right class, so that sure teachers
    teach little of it. Of labelled clouds only, because the right class is needed.

    Args:
        weight: 1.
        alpha, beta: 1 and 2. The paper has α 1 and β from 2 to 10, chosen by how sure the teacher is.
        temperature: 4, the paper's.

    Raises:
        ValueError: temperature is not positive; class counts differ.

    Source: Zhao et al., "Decoupled knowledge distillation", CVPR 2022, equation 7.
    """

    default_name = "decoupled_soft_labels"
    needs_logits = True
    needs_labels = True

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 2.0,
        temperature: float = 4.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if not temperature > 0:
            raise ValueError(f"{self.name}: temperature is {temperature}; expected a positive number")
        self.alpha, self.beta, self.temperature = float(alpha), float(beta), float(temperature)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        assert student.labels is not None
        both = check_logits(self, student, teacher)
        right = F.one_hot(student.labels, both[0].shape[1]).bool()
        parts = []
        for scores in both:
            scores = scores / self.temperature
            logs = F.log_softmax(scores, dim=1)
            sure = torch.stack([logs[right], logs.masked_fill(right, -torch.inf).logsumexp(1)], dim=1)
            others = F.log_softmax(scores[~right].view(len(scores), -1), dim=1)
            parts.append((sure, others))
        (sure, others), (their_sure, their_others) = parts
        loss = self.alpha * F.kl_div(sure, their_sure, log_target=True, reduction="batchmean")
        loss = loss + self.beta * F.kl_div(others, their_others, log_target=True, reduction="batchmean")
        return self.temperature**2 * loss
