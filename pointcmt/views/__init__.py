"""Views of shapes: projected from points (``project_points``), or of meshes (``pointcmt.views.mesh``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

from torch import Tensor

from pointcmt.types import Views
from pointcmt.views.cameras import Rig, list_rigs, register_rig, rig
from pointcmt.views.projection import (
    count_channels,
    estimate_normals,
    pixels_of,
    project_points,
    unit_sphere,
)

__all__ = [
    "Rig",
    "ViewSpec",
    "count_channels",
    "estimate_normals",
    "list_rigs",
    "pixels_of",
    "project_points",
    "register_rig",
    "rig",
    "unit_sphere",
]


@dataclass(frozen=True)
class ViewSpec:
    """How clouds become a teacher's images: the arguments of ``project_points``, to keep and to compare.

    Wherever views are made for one teacher (training it, caching its features, evaluating it) they must be
    made alike: a teacher's file keeps its ``ViewSpec`` (``ImageTeacher(view_spec=…)``), and a feature cache
    its ``describe()``.

    Attributes:
        rig: name of a registered rig.
        size: height and width of a view in pixels.
        channels: what a view shows; see ``project_points``.
        splat: radius of a point in pixels.
        up: the axis of the clouds that points up.
        normalize: centre and scale each cloud to the unit sphere first.
    """

    rig: str = "simpleview"
    size: int = 128
    channels: tuple[str, ...] = ("depth",)
    splat: float = 0.0
    up: str = "z"
    normalize: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # a list, as JSON gives it, is welcome
        count_channels(self.channels)
        rig(self.rig, self.up)

    @property
    def num_channels(self) -> int:
        """Image channels C: the teacher's ``in_chans``."""
        return count_channels(self.channels)

    @property
    def num_views(self) -> int:
        """Views V of a shape."""
        return len(rig(self.rig, self.up))

    @overload
    def project(self, points: Tensor, *, cameras: Literal[False] = False) -> Tensor: ...
    @overload
    def project(self, points: Tensor, *, cameras: Literal[True]) -> Views: ...
    def project(self, points: Tensor, *, cameras: bool = False) -> Tensor | Views:
        """Clouds [B, N, 3] → views [B, V, C, S, S] float32 on their device; with ``cameras`` a ``Views``."""
        options = asdict(self)
        if cameras:
            return project_points(points, cameras=True, **options)
        return project_points(points, **options)

    def describe(self) -> dict[str, Any]:
        """JSON-serialisable record, equal where views are made alike; ``ViewSpec(**record)`` restores it."""
        record = asdict(self)
        record["channels"] = list(self.channels)
        return record
