"""Pixel features: each point learns what an image encoder says of the pixels that it is seen at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.heads import ProjectionHead
from pointcmt.objectives._contrast import needed_size
from pointcmt.objectives._pixels import PixelObjective
from pointcmt.objectives.base import Sizes, full_precision
from pointcmt.types import StudentState, TeacherOutput

_EPSILON = 1e-5


def sampled_at(maps: Tensor, pixels: Tensor) -> Tensor:
    """Feature maps [B, V, C, h, w] at (u, v) [B, V, M, 2] in [0, 1]²: [B, V, M, C].

    Bilinear between the centres of cells; beyond the outermost centres, theirs.
    """
    grid = (2 * pixels - 1).flatten(0, 1)[:, :, None]
    found = F.grid_sample(
        full_precision(maps).flatten(0, 1),
        grid.to(full_precision(maps)),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return found[..., 0].transpose(1, 2).unflatten(0, maps.shape[:2])


class PixelFeatures(PixelObjective):
    """Cosine distance between a head on each local feature and the image features at its pixels.

    The target of a point is the mean, over the views that see it, of the feature map bilinearly at its pixel,
    each channel then standardised over the batch's points: what all of them share is not to be learned.
    Points that no view sees do not count. Where none is seen at all the loss is 0.

    Args:
        weight: 1.
        hidden: width of the head.
        hidden_points: points that the cloud's own surface hides are ``"skip"``-ped, for which the views must
            say which points are visible; or ``"count"`` too.
        local_points: in training at most so many local features of each cloud, drawn by chance at every step;
            None: all.

    Raises:
        ValueError: hidden_points is neither, or local_points below 1.

    Source: ours. The idea that points take up features at the pixels that they project to is that of Liu et
    al., "Learning from 2D: contrastive pixel-to-point knowledge transfer" (2021), and Peng et al., OpenScene
    (CVPR 2023), whose loss is the cosine too.
    """

    default_name = "pixel_features"

    def __init__(
        self,
        weight: float = 1.0,
        hidden: int = 256,
        hidden_points: Literal["count", "skip"] = "skip",
        local_points: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, hidden_points, local_points, name)
        self.hidden = hidden
        self.head: ProjectionHead | None = None

    def bind(
        self,
        *,
        generator: nn.Module | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        sizes = sizes or Sizes()
        local = needed_size(self.name, sizes.local, "the network's local features")
        maps = needed_size(self.name, sizes.maps, "the image encoder's feature maps")
        if self.head is None:
            self.head = ProjectionHead(local, self.hidden, maps)
        made = self.head[0].in_features, self.head[-1].out_features
        if made != (local, maps):
            raise ValueError(
                f"{self.name}: its head was made for local features of {made[0]} and maps of {made[1]}, and "
                f"is given {local} and {maps}: use new objectives for another network"
            )

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        alike, seen = self._alike(student, teacher)
        return ((1 - alike) * seen).sum() / seen.sum().clamp(min=1)

    def found(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        """Mean cosine, in %, of the points that are seen: to watch without labels. At chance 0."""
        alike, seen = self._alike(student, teacher)
        return 100 * (alike * seen).sum() / seen.sum().clamp(min=1)

    def targets(self, centers: Tensor, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """What points [B, M, 3] are to learn [B, M, C], standardised, and which are seen, bool [B, M]."""
        maps, views = teacher.maps, teacher.views
        assert maps is not None and views is not None
        with torch.no_grad(), torch.autocast(maps.device.type, enabled=False):
            pixels, counts = self.pixels(centers, views)
            weight = counts.unsqueeze(-1).to(full_precision(maps))
            sampled = (sampled_at(maps, pixels) * weight).sum(1) / weight.sum(1).clamp(min=1)
            seen = counts.any(1)
            known = sampled[seen]
            if len(known) > 1:
                sampled = (sampled - known.mean(0)) / (known.std(0) + _EPSILON)
            return sampled, seen

    def _alike(self, student: StudentState, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Cosine of each point with its target [B, M], and which points are seen."""
        if self.head is None:
            raise RuntimeError(f"{self.name} has no head yet: enter the training context, or call bind()")
        local, centers = self.drawn(student)
        target, seen = self.targets(centers, teacher)
        with torch.autocast(local.device.type, enabled=False):
            said = self.head(full_precision(local))
            return F.cosine_similarity(said, target.to(said), dim=-1), seen
