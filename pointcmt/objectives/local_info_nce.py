"""Local InfoNCE: which cell of which image does a point of the cloud fall into?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.heads import LocalHead, MapHead
from pointcmt.objectives._contrast import (
    MAX_LOGITS,
    chance,
    check_batch,
    check_negatives,
    gathered,
    log_sum_exp,
    mean_over_ranks,
    needed_size,
    prepared,
)
from pointcmt.objectives._pixels import PixelObjective
from pointcmt.objectives.base import Sizes
from pointcmt.types import StudentState, TeacherOutput
from pointcmt.views.cells import OUTSIDE, cells_of


def local_info_nce(
    local: Tensor,
    maps: Tensor,
    cell: Tensor,
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    gather: bool = True,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Mean over the local features of −log(exp(z · q⁺ / τ) / Σ_q exp(z · q / τ)), q all cells of all images.

    The positive is the cell of the same shape's image that the feature's centre falls into; the other cells
    of that image are negatives as those of the others are. At chance it is ln(h·w·B), with B over all ranks.

    Args:
        local: [B, M, D] local features of the clouds.
        maps: [B, D, h, w] features of the cells of one image of each.
        cell: int64 [B, M], ``row·w + column`` of the cell that each centre falls into; −1 where it falls into
            none, and then it does not count.
        temperature: τ.
        normalize, gather: as for :func:`pointcmt.objectives.info_nce`.
        max_logits: at most so many of the B·M × h·w·B logits are in memory at a time: what exceeds it is
            computed some rows at a time, and again in the backward pass.

    Returns:
        Scalar in float32 (float64 for such input), also under autocast.

    Raises:
        ValueError: shapes that do not fit, cells outside the maps, no centre in any cell, a single cell
            altogether, NaN or infinite values.

    Source: Herzog and Suwelack, "Pic@Point: cross-modal learning by local and global point-picture
    correspondence", ACML 2024, equations 1 and 2.
    """
    if (
        local.ndim != 3
        or maps.ndim != 4
        or local.shape[0] != maps.shape[0]
        or local.shape[2] != maps.shape[1]
    ):
        raise ValueError(
            f"local_info_nce: local {list(local.shape)} and maps {list(maps.shape)}; expected [B, M, D] and "
            "[B, D, h, w], projected into one space (pointcmt.heads)"
        )
    cells = maps.shape[2] * maps.shape[3]
    if cell.shape != local.shape[:2] or cell.dtype != torch.int64:
        raise ValueError(
            f"local_info_nce: cell is {cell.dtype} {list(cell.shape)}; expected int64 "
            f"{list(local.shape[:2])}, as pointcmt.views.cells.cells_of gives"
        )
    valid = cell >= 0
    if cell.device.type == "cpu" and cell.numel():
        if int(cell.max()) >= cells:
            raise ValueError(
                f"local_info_nce: cell goes up to {int(cell.max())}, and maps of {maps.shape[2]}×"
                f"{maps.shape[3]} have {cells} cells; expected row·w + column"
            )
        if not valid.any():
            raise ValueError(
                "local_info_nce: no centre falls into its image: the cameras are not those of these points. "
                "Give views of the same clouds (teacher.project(points, cameras=True)), and turn the cameras "
                "with clouds that were turned (pointcmt.views.cells.moved)"
            )
    with torch.autocast(local.device.type, enabled=False):
        anchors, rows = prepared(
            "local_info_nce",
            normalize,
            temperature,
            local=local,
            maps=maps.flatten(2).transpose(1, 2),
        )
        everyone, _ = gathered(rows, gather)
        candidates = everyone.flatten(0, 1)
        check_negatives("local_info_nce", len(candidates), 2, gather)
        index = cell.clamp(min=0).unsqueeze(-1).expand(-1, -1, rows.shape[2])
        positive = (anchors * rows.gather(1, index)).sum(-1) / temperature
        total = log_sum_exp(anchors.flatten(0, 1), candidates, temperature, max_logits=max_logits)
        return mean_over_ranks(total - positive.flatten(), valid.flatten(), gather)


class LocalInfoNCE(PixelObjective):
    """Local InfoNCE from the network's local features to the cells of the images' feature maps.

    Each local feature's centre is projected into the image by the image's cameras; of several views of a
    shape the loss is the mean.

    Args:
        weight: 1.
        temperature: τ; Pic@Point does not say its own, CrossPoint has 0.1.
        hidden: width of the heads.
        out_features: size of the common space.
        pose: size of the code of the view matrix, which the head for points is told; 0: it is not told
            (ablation).
        hidden_points: centres that the cloud's own surface hides ``"count"`` too, as in the paper, with the
            cell that they project to; or ``"skip"`` takes visible ones only, for which the views must say
            which points are visible.
        local_points: in training at most so many local features of each cloud, drawn by chance at every step,
            against all cells as ever: the loss has the same mean. 64 is what PointNeXt-S has, with which all
            of them count as in the paper; where a network has one per point, as DGCNN, all of them (None)
            cost more than the network.
        max_logits: at most so many logits are in memory at a time.

    Raises:
        ValueError: hidden_points is neither, or local_points below 1.

    Source: Pic@Point (Herzog and Suwelack, ACML 2024), sections 3.2 and 3.3.
    """

    default_name = "local_info_nce"
    image_side = ("map_head",)

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 0.1,
        hidden: int = 512,
        out_features: int = 512,
        pose: int = 64,
        hidden_points: Literal["count", "skip"] = "count",
        local_points: int | None = 64,
        max_logits: int = MAX_LOGITS,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, hidden_points, local_points, name)
        self.temperature, self.max_logits = temperature, max_logits
        self.widths = hidden, out_features, pose
        self.point_head: LocalHead | None = None
        self.map_head: MapHead | None = None
        self.chance: float | None = None

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
        hidden, out_features, pose = self.widths
        if self.point_head is None or self.map_head is None:
            self.point_head = LocalHead(local, hidden, out_features, pose)
            self.map_head = MapHead(maps, hidden, out_features)
        made = self.point_head.first.in_features, self.map_head.head[0].in_features
        if made != (local, maps):
            raise ValueError(
                f"{self.name}: its heads were made for local features of {made[0]} and maps of {made[1]}, "
                f"and are given {local} and {maps}: use new objectives for another network"
            )

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        assert teacher.maps is not None and teacher.views is not None
        matrices = teacher.views.view_matrix
        assert matrices is not None
        check_batch(self.name, len(teacher.maps))
        before, images, cell = self._projected(student, teacher)
        self.chance = chance(len(images) * images.shape[3] * images.shape[4])
        losses = [
            local_info_nce(
                self._head().with_pose(before, matrices[:, view]),
                images[:, view],
                cell[:, view],
                temperature=self.temperature,
                max_logits=self.max_logits,
            )
            for view in range(images.shape[1])
        ]
        return torch.stack(losses).mean()

    def found(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        """Part in % of the local features whose own cell is the one of its image that they are most similar
        to, in the first view: to watch without labels. At chance 100 / (h·w)."""
        assert teacher.views is not None and teacher.views.view_matrix is not None
        before, images, cell = self._projected(student, teacher)
        local = self._head().with_pose(before, teacher.views.view_matrix[:, 0])
        cells = F.normalize(images[:, 0].flatten(2).float(), dim=1)  # [B, D, h·w]
        right = (local.float() @ cells).argmax(-1) == cell[:, 0]
        return 100 * right.sum() / (cell[:, 0] >= 0).sum().clamp(min=1)

    def embed_cells(self, student: StudentState, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Local features [B, V, M, D] as each view is compared with them, and its cells [B, V, D, h, w], of
        length one in the common space: to show what is similar to what."""
        assert teacher.views is not None and teacher.views.view_matrix is not None
        before, images, _ = self._projected(student, teacher)
        views = teacher.views.view_matrix.unbind(1)
        local = torch.stack([self._head().with_pose(before, view) for view in views], 1)
        return F.normalize(local.float(), dim=-1), F.normalize(images.float(), dim=2)

    def _head(self) -> LocalHead:
        if self.point_head is None:
            raise RuntimeError(f"{self.name} has no heads yet: enter the training context, or call bind()")
        return self.point_head

    def _projected(self, student: StudentState, teacher: TeacherOutput) -> tuple[Tensor, Tensor, Tensor]:
        """The local features before the pose is joined [B, M, hidden], the maps in the common space
        [B, V, D, h, w], and the cell of each centre [B, V, M]."""
        maps, views = teacher.maps, teacher.views
        assert maps is not None and views is not None
        local, centers = self.drawn(student)
        pixels, counts = self.pixels(centers, views)
        before = self._head().before_pose(local)
        assert self.map_head is not None
        images = self.map_head(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
        cell = torch.where(counts, cells_of(pixels, maps.shape[3], maps.shape[4]), OUTSIDE)
        return before, images, cell
