"""Soft labels: the student should predict the teacher's softened class distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pointcmt.objectives.base import Objective, check_logits
from pointcmt.types import StudentState, TeacherOutput


class SoftLabels(Objective):
    """T² · KL(teacher's softmax at temperature T ‖ student's), mean over the batch.

    Args:
        weight: 1.
        temperature: T, 4 by default: of the range that the paper explores, the value that later work settled
            on.
        confidence: shapes whose likeliest class the teacher gives less than this, at temperature 1, are left
            out; 0 leaves out none. The mean is over all shapes of the batch.

    Raises:
        ValueError: temperature is not positive, confidence not in [0, 1); class counts differ.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2 (the
    factor T² keeps the gradient's size independent of T).
    """

    default_name = "soft_labels"
    needs_logits = True

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 4.0,
        confidence: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if not 0 <= confidence < 1:
            raise ValueError(f"{self.name}: confidence is {confidence}; expected a probability in [0, 1)")
        if not temperature > 0:
            raise ValueError(f"{self.name}: temperature is {temperature}; expected a positive number")
        self.temperature, self.confidence = float(temperature), float(confidence)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        scores = check_logits(self, student, teacher)
        ours, theirs = (F.log_softmax(each / self.temperature, dim=1) for each in scores)
        if not self.confidence:
            return self.temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        sure = scores[1].softmax(1).amax(1) >= self.confidence
        each = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(1)
        return self.temperature**2 * torch.where(sure, each, 0.0).mean()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature:g}"
