"""What the objectives of local features and the pixels they are seen at have in common."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pointcmt.objectives.base import Objective
from pointcmt.types import StudentState, Views
from pointcmt.views import pixels_of
from pointcmt.views.cells import visible_at


class PixelObjective(Objective):
    """An objective of local features and what the images show where their centres project to.

    Args:
        weight, name: as of every objective.
        hidden_points: centres that the cloud's own surface hides ``"count"`` too, or are ``"skip"``-ped.
        local_points: in training at most so many local features of each cloud; None: all.

    Raises:
        ValueError: hidden_points is neither, or local_points below 1.
    """

    needs_local = True
    needs_maps = True
    needs_cameras = True
    sees_copies = True

    def __init__(
        self,
        weight: float,
        hidden_points: Literal["count", "skip"],
        local_points: int | None,
        name: str | None,
    ) -> None:
        super().__init__(weight, name)
        if hidden_points not in ("count", "skip"):
            raise ValueError(f"{self.name}: hidden_points is {hidden_points!r}; expected 'count' or 'skip'")
        if local_points is not None and local_points < 1:
            raise ValueError(f"{self.name}: local_points is {local_points}; expected at least 1, or None")
        self.hidden_points, self.local_points = hidden_points, local_points

    def drawn(self, student: StudentState) -> tuple[Tensor, Tensor]:
        """Local features [B, M, C] and their centres [B, M, 3]: in training some of them, by chance.

        Raises:
            ValueError: the pass was of several copies of each cloud.
        """
        local, centers = student.local, student.centers
        assert local is not None and centers is not None
        if student.copies != 1:
            raise ValueError(
                f"{self.name} takes one copy of each cloud, and the pass was of {student.copies}: each "
                "augmented copy would need cameras of its own"
            )
        if self.training and self.local_points is not None and self.local_points < local.shape[1]:
            chosen = torch.randperm(local.shape[1], device=local.device)[: self.local_points]
            local, centers = local[:, chosen], centers[:, chosen]
        return local, centers

    def pixels(self, centers: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """Where centres [B, M, 3] are in each view [B, V, M, 2], and which of them count: bool [B, V, M].

        Raises:
            ValueError: the views lack their cameras.
        """
        if views.view_matrix is None or views.projection_matrix is None:
            raise ValueError(
                f"{self.name}: the views lack a view or a projection matrix; give both "
                "(teacher.project(points, cameras=True))"
            )
        pixels, counts = pixels_of(centers, views.view_matrix, views.projection_matrix)
        if self.hidden_points == "skip":
            counts &= visible_at(pixels, views)
        return pixels, counts
