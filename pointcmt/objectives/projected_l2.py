"""Feature matching through a linear map that is dropped afterwards."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.objectives._contrast import needed_size
from pointcmt.objectives.base import Objective, Sizes, full_precision
from pointcmt.types import StudentState, TeacherOutput


class ProjectedL2(Objective):
    """Squared distance, at unit length, between the student's feature, mapped linearly, and the image's.

    ``2 - 2 cos``, mean over the batch. The map takes up what differs by a change of coordinates, so that the
    student's feature need not be the teacher's, but hold what it holds; the sizes may differ. It is trained
    (``CrossModalTraining.parameters()``) and belongs to this objective, not to the network.

    Args:
        weight: 1.

    Source: the regressor of Romero et al., "FitNets", ICLR 2015, as one linear layer; unit length as in Tian
        et al., "Contrastive representation distillation", ICLR 2020.
    """

    default_name = "projected_l2"

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.map: nn.Linear | None = None

    def bind(
        self,
        *,
        generator: nn.Module | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        sizes = sizes or Sizes()
        ours = needed_size(self.name, sizes.feature, "the student's feature")
        theirs = needed_size(self.name, sizes.image, "the image feature")
        if self.map is None:
            self.map = nn.Linear(ours, theirs)
        elif (self.map.in_features, self.map.out_features) != (ours, theirs):
            raise ValueError(
                f"{self.name}: its map was made for features of {self.map.in_features} and "
                f"{self.map.out_features}, and is given {ours} and {theirs}: use a new objective for another "
                "network"
            )

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        if self.map is None:
            raise RuntimeError(f"{self.name} has no map yet: enter the training context, or call bind()")
        mapped = F.normalize(self.map(full_precision(student.feature)), dim=1)
        return 2 - 2 * (mapped * F.normalize(full_precision(teacher.feature), dim=1)).sum(1).mean()
