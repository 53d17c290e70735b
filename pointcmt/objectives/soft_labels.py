"""Soft labels: the student should predict the teacher's softened class distribution."""

from __future__ import annotations

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

    Raises:
        ValueError: temperature is not positive; class counts differ.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2 (the
        factor
    T² keeps the gradient's size independent of T).
    """

    default_name = "soft_labels"
    needs_logits = True

    def __init__(self, weight: float = 1.0, temperature: float = 4.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        if not temperature > 0:
            raise ValueError(f"{self.name}: temperature is {temperature}; expected a positive number")
        self.temperature = float(temperature)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        ours, theirs = (
            F.log_softmax(scores / self.temperature, dim=1) for scores in check_logits(self, student, teacher)
        )
        return self.temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature:g}"
