"""From points to the cells of an image's feature map, whatever was done to the clouds since."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt.types import Views

OUTSIDE = -1
"""The cell of a point that falls into none."""


def cells_of(pixels: Tensor, height: int, width: int) -> Tensor:
    """Cell ``row·width + column`` of (u, v) [..., 2] on a map of height × width: int64 [...].

    For where points are in images: ``pointcmt.views.pixels_of``.

    ``column = ⌊width·u⌋`` and ``row = ⌊height·v⌋``; u = 1 and v = 1 belong to the last ones. −1 outside the
    image and for NaN.

    Source: Pic@Point (Herzog and Suwelack 2024), section 3.3.
    """
    inside = ((pixels >= 0) & (pixels <= 1)).all(-1)  # false for NaN
    column = (pixels[..., 0] * width).floor().clamp(0, width - 1)
    row = (pixels[..., 1] * height).floor().clamp(0, height - 1)
    cell = torch.where(inside, row * width + column, OUTSIDE)
    return cell.long()


def visible_at(pixels: Tensor, views: Views) -> Tensor:
    """Whether the cloud's own surface hides what is at (u, v) [B, V, M, 2]: bool [B, V, M], true if visible.

    Taken from ``views.visible`` of the cloud's point that is nearest in the image. That is exact for centres
    that are points of the cloud, as furthest point sampling picks them; for centres between points it is the
    answer of a neighbour in the image.

    Raises:
        ValueError: the views do not say which points are visible.
    """
    if views.pixels is None or views.visible is None:
        raise ValueError(
            "the views do not say which points are visible: give those of teacher.project(points, "
            "cameras=True), or let hidden points count (hidden='count')"
        )
    flags = []
    for mine, cloud, visible in zip(
        pixels.flatten(0, 1), views.pixels.flatten(0, 1), views.visible.flatten(0, 1), strict=True
    ):
        # not by the product of matrices, whose rounding confuses points close to each other
        apart = torch.cdist(mine, cloud, compute_mode="donot_use_mm_for_euclid_dist")
        flags.append(visible[apart.argmin(1)])
    return torch.stack(flags).view(pixels.shape[:-1])


def moved(views: Views, motion: Tensor) -> Views:
    """The cameras that see clouds moved by ``motion`` as ``views`` saw them where they were.

    Images, pixels and visibility stay; ``view_matrix`` becomes ``view_matrix @ motion⁻¹``. For clouds that
    are turned, scaled or shifted after their images were made.

    Args:
        views: with cameras.
        motion: [B, 3, 3] ``p' = motion @ p``, or [B, 4, 4] ``p' = motion @ (p, 1)``.

    Raises:
        ValueError: no cameras, or another shape.
    """
    if views.view_matrix is None:
        raise ValueError(
            "moved() turns cameras, and these views have none: give those of teacher.project(points, "
            "cameras=True)"
        )
    batch = len(views.view_matrix)
    if motion.shape not in ((batch, 3, 3), (batch, 4, 4)):
        raise ValueError(
            f"motion has shape {list(motion.shape)}; expected [{batch}, 3, 3] or [{batch}, 4, 4]"
        )
    whole = motion.new_zeros(batch, 4, 4)
    whole[:, : motion.shape[1], : motion.shape[2]] = motion
    whole[:, 3, 3] = 1
    with torch.autocast(motion.device.type, enabled=False):
        back = torch.linalg.inv(whole.double()).to(views.view_matrix)
    return views._replace(view_matrix=_product(views.view_matrix, back[:, None]))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of [..., 4, 4], in full precision."""
    return (left[..., :, :, None].float() * right[..., None, :, :].float()).sum(-2)
