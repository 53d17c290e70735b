"""Some of a rig's views of each shape, drawn by chance: what contrastive pre-training looks at in a step."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from pointcmt.types import Views
from pointcmt.views import Rig, ViewSpec, project_points, rig


def draw_cameras(shapes: int, views: int, count: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Which ``count`` different ones of ``views`` cameras look at each shape: int64 [shapes, count], on the
    CPU.

    Raises:
        ValueError: more than there are.
    """
    if not 1 <= count <= views:
        raise ValueError(
            f"{count} views per step of a rig with {views} cameras; expected 1 to {views}, or a larger rig"
        )
    return torch.rand(shapes, views, generator=generator).argsort(1)[:, :count]


def project_chosen(spec: ViewSpec, points: Tensor, cameras: Tensor) -> Views:
    """Views of clouds [B, N, 3] by the cameras of the spec's rig that int64 [B, V] names, with their cameras.

    Equal to those of ``spec.project(points, cameras=True)``; only those are made.

    Raises:
        ValueError: a camera that the rig does not have, or another shape.
    """
    whole = rig(spec.rig, spec.up)
    if cameras.ndim != 2 or len(cameras) != len(points):
        raise ValueError(
            f"cameras has shape {list(cameras.shape)}; expected [{len(points)}, V], a row for each cloud"
        )
    cameras = cameras.cpu()
    if cameras.numel() and not 0 <= int(cameras.min()) <= int(cameras.max()) < len(whole):
        raise ValueError(f"cameras go up to {int(cameras.max())}; the rig {whole.name!r} has {len(whole)}")
    options = {name: value for name, value in asdict(spec).items() if name not in ("rig", "up")}
    places, made = [], []
    for camera in cameras.unique().tolist():
        rows, slots = (cameras == camera).nonzero(as_tuple=True)
        one = Rig(whole.name, (whole.eyes[camera],), (whole.ups[camera],), whole.field_of_view)
        made.append(project_points(points[rows.to(points.device)], one, cameras=True, **options))
        places.append(rows * cameras.shape[1] + slots)
    order = torch.cat(places).argsort().to(points.device)

    def joined(*parts: Tensor) -> Tensor:
        return torch.cat([part.squeeze(1) for part in parts])[order].unflatten(0, cameras.shape)

    return Views(*(joined(*parts) for parts in zip(*made, strict=True)))
