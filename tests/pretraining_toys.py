"""A network with local features, an image encoder with maps, and cameras: small, for pre-training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pointcmt.adapters import Adapter, Tap
from pointcmt.types import TeacherOutput, Views
from pointcmt.views import pixels_of
from pointcmt.views.cells import cells_of

LOCAL, MAPS, IMAGE, SIZE = 24, 10, 12, 32


class Network(nn.Module):
    """[B, N, C] → [B, K]: a layer per point (the local features), the maximum over them, a head."""

    def __init__(self, channels: int = 3, num_classes: int = 4) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Linear(channels, 32), nn.ReLU(), nn.Linear(32, LOCAL))
        self.pool = nn.Identity()
        self.hidden = nn.Linear(LOCAL, 16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        pooled = self.pool(self.points(points).amax(1))
        return self.head(self.hidden(pooled).relu())


def network(channels: int = 3) -> Network:
    torch.manual_seed(50)
    return Network(channels)


def made(num_classes: int) -> Network:
    """For ``--student tests.pretraining_toys:made``."""
    return Network(num_classes=num_classes)


def _local(module: nn.Module, tapped: Any, inputs: tuple) -> tuple[Tensor, Tensor]:
    return tapped, inputs[0][..., :3]


def adapter(local: bool = True) -> Adapter:
    return Adapter(
        name="toy",
        matches=lambda module: isinstance(module, Network),
        feature_module="head",
        feature_from="input",
        classify=lambda module, feature: module.head(feature),
        local=Tap("points", "output", _local) if local else None,
        global_=Tap("pool", "output", lambda module, tapped, inputs: tapped),
    )


class Images(nn.Module):
    """Views [B, V, 1, S, S] → features and maps of 4×4 cells, by one convolution."""

    feature_dim, map_channels, num_classes = IMAGE, MAPS, None

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, MAPS, SIZE // 4, SIZE // 4)
        self.norm = nn.BatchNorm2d(MAPS)
        self.linear = nn.Linear(MAPS, IMAGE)

    def forward(self, views: Tensor, per_view: bool = False, maps: bool = False) -> TeacherOutput:
        found = self.norm(self.convolution(views.flatten(0, 1))).relu()
        each = self.linear(found.mean((2, 3))).unflatten(0, views.shape[:2])
        return TeacherOutput(
            each.amax(1),
            per_view=each if per_view else None,
            maps=found.unflatten(0, views.shape[:2]) if maps else None,
        )


class NoMaps(Images):
    def forward(self, views: Tensor, per_view: bool = False) -> TeacherOutput:  # type: ignore[override]
        return super().forward(views, per_view)


def images() -> Images:
    torch.manual_seed(51)
    return Images()


def cameras(batch: int, views: int) -> tuple[Tensor, Tensor]:
    """View [B, V, 4, 4] and projection matrices of cameras around the z axis, 3 away, 60° wide."""
    matrices = []
    for view in range(views):
        angle = 2 * math.pi * view / max(views, 1)
        eye = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle), 0.0])
        forward = -eye / 3
        down = torch.tensor([0.0, 0.0, -1.0])
        right = torch.linalg.cross(down, forward)
        matrix = torch.eye(4)
        matrix[:3, :3] = torch.stack([right, down, forward])
        matrix[:3, 3] = -matrix[:3, :3] @ eye
        matrices.append(matrix)
    focal = 1 / math.tan(math.radians(30))
    projection = torch.tensor([[focal, 0, 0, 0], [0, focal, 0, 0], [0, 0, 1, -0.1], [0, 0, 1.0, 0]])
    return (
        torch.stack(matrices).expand(batch, -1, -1, -1).clone(),
        projection.expand(batch, views, -1, -1).clone(),
    )


def clouds(batch: int = 6, points: int = 20, seed: int = 0) -> Tensor:
    """Boxes of different proportions, points drawn uniformly: [B, N, 3] inside the unit sphere."""
    generator = torch.Generator().manual_seed(seed)
    sides = 0.1 + 0.45 * torch.rand(batch, 1, 3, generator=generator)
    return sides * (2 * torch.rand(batch, points, 3, generator=generator) - 1)


def views_of(points: Tensor, views: int = 1, with_cameras: bool = True) -> Views:
    """Images of density [B, V, 1, S, S], with pixels and cameras; every point counts as visible."""
    view_matrix, projection = cameras(len(points), views)
    pixels, _ = pixels_of(points, view_matrix, projection)
    cell = cells_of(pixels, SIZE, SIZE)
    picture = torch.zeros(len(points), views, SIZE * SIZE)
    picture.scatter_add_(2, cell.clamp(min=0), (cell >= 0).float())
    shown = picture.view(len(points), views, 1, SIZE, SIZE).clamp(max=1)
    if not with_cameras:
        return Views(shown)
    return Views(shown, pixels, torch.ones(pixels.shape[:-1], dtype=torch.bool), view_matrix, projection)
