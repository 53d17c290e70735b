"""Small versions of the reference students, and clouds for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pointcmt import students

VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "pointnet2-ssg": lambda k, **options: students.pointnet2(k, "ssg", **options),
    "pointnet2-msg": lambda k, **options: students.pointnet2(k, "msg", **options),
    "dgcnn": students.dgcnn,
    "rscnn": students.rscnn,
    "pointmlp": lambda k, **options: students.pointmlp(k, "full", **options),
    "pointmlp-elite": lambda k, **options: students.pointmlp(k, "elite", **options),
    "pointnext": students.pointnext,
}


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture
def build(variant) -> Callable[..., nn.Module]:
    """``build(num_classes, **options)``: the student."""
    return VARIANTS[variant]


@pytest.fixture
def small(variant) -> Callable[..., nn.Module]:
    """The student at an eighth of its width: ``small(num_classes=10, **options)``, seeded."""

    def build(num_classes: int = 10, **options) -> nn.Module:
        torch.manual_seed(7)
        options = {"width": 0.125, "feature_dim": 64, **options}
        if variant == "dgcnn":
            options.setdefault("k", 8)
        return VARIANTS[variant](num_classes, **options)

    return build


@pytest.fixture
def clouds() -> Callable[..., Tensor]:
    """``clouds(batch, points, seed)``: different shapes in the unit sphere, none near the origin."""

    def make(batch: int = 4, points: int = 128, seed: int = 0, channels: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        stretch = 0.2 + torch.rand(batch, 1, 3, generator=generator)
        directions = torch.randn(batch, points, 3, generator=generator) * stretch
        radii = 0.4 + 0.6 * torch.rand(batch, points, 1, generator=generator)
        xyz = directions / directions.norm(dim=-1, keepdim=True) * radii
        return torch.cat([xyz, torch.randn(batch, points, channels - 3, generator=generator)], -1)

    return make
