"""Cross-modal training as a plugin: images teach the point-cloud network you already have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pointcmt._version import __version__

if TYPE_CHECKING:
    from pointcmt.generator import PointGenerator
    from pointcmt.methods import CrossPoint, MMPoint, PicAtPoint, PointCMT
    from pointcmt.teacher import ImageTeacher
    from pointcmt.training import CrossModalTraining

__all__ = [
    "CrossModalTraining",
    "CrossPoint",
    "ImageTeacher",
    "MMPoint",
    "PicAtPoint",
    "PointCMT",
    "PointGenerator",
    "__version__",
]

# imported when first asked for: an adapter package or `pointcmt --help` should not wait for timm
_HOMES = {
    "CrossModalTraining": "pointcmt.training",
    "CrossPoint": "pointcmt.methods",
    "ImageTeacher": "pointcmt.teacher",
    "MMPoint": "pointcmt.methods",
    "PicAtPoint": "pointcmt.methods",
    "PointCMT": "pointcmt.methods",
    "PointGenerator": "pointcmt.generator",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'pointcmt' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
