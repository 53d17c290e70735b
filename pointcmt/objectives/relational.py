"""Relational distillation (RKD): distances and angles between shapes should be those of their images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pointcmt.objectives.base import Objective, full_precision
from pointcmt.types import StudentState, TeacherOutput


class RelationalDistillation(Objective):
    """Huber loss between the students' and the teacher's distances and angles within a batch.

    Distances between the features of every two shapes, each divided by the mean of its own network's; and
    the cosines of the angles at the second of every three shapes. The features may differ in size and in
    coordinates: only the shapes' relations are compared.

    Args:
        weight: 1, of ``distance`` × the first + ``angle`` × the second.
        distance, angle: the paper's 25 and 50 for classification.

    Source: Park et al., "Relational knowledge distillation", CVPR 2019, equations 3 to 9.
    """

    default_name = "relational"

    def __init__(
        self, weight: float = 1.0, distance: float = 25.0, angle: float = 50.0, name: str | None = None
    ) -> None:
        super().__init__(weight, name)
        self.distance, self.angle = float(distance), float(angle)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        with torch.autocast(student.feature.device.type, enabled=False):
            ours, theirs = full_precision(student.feature), full_precision(teacher.feature)
            total = ours.new_zeros(())
            if self.distance:
                total = total + self.distance * F.smooth_l1_loss(_distances(ours), _distances(theirs))
            if self.angle:
                total = total + self.angle * F.smooth_l1_loss(_angles(ours), _angles(theirs))
            return total


def _distances(features: Tensor) -> Tensor:
    """[B, B] distances in units of the mean of those between different shapes."""
    # the square root has no gradient at the zeros of the diagonal
    squared = (features[:, None] - features[None]).square().sum(-1)
    distances = squared.clamp(min=1e-12).sqrt()
    return distances / distances[squared > 0].mean().clamp(min=1e-12) if (squared > 0).any() else distances


def _angles(features: Tensor) -> Tensor:
    """[B, B, B] cosine at shape i between the directions to j and k."""
    directions = F.normalize(features[None] - features[:, None], dim=-1)  # [i, j]: from i to j
    return directions @ directions.transpose(1, 2)
