"""``pointcmt render-views``: images of meshes, for ``train-teacher --images``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pointcmt.recipes.progress import say


@dataclass
class RenderViews:
    """Render a tree of meshes, CLASS/SPLIT/NAME.off as ModelNet's or SPLIT/CLASS/NAME.off, to images for
    train-teacher --images."""

    meshes: Annotated[Path, tyro.conf.Positional]
    """Folder of the meshes (OFF, OBJ, PLY)."""
    out: Path
    """Folder of the images. What is there already is not rendered again."""
    rig: str = "dodecahedron20"
    """Cameras: dodecahedron20, ring12 or simpleview (6)."""
    size: int = 224
    """Height and width of an image in pixels."""
    up: Literal["x", "y", "z"] = "z"
    """Which axis of the meshes points up (ModelNet: z); check-data guesses it."""
    splits: tuple[str, ...] = ("train", "test")
    """Names of the split folders."""


def render_views(options: RenderViews) -> None:
    """Run the command."""
    # pyvista is an optional dependency
    from pointcmt.views.mesh import render_folder

    count = render_folder(
        options.meshes, options.out, options.rig, options.size, up=options.up, splits=options.splits
    )
    say(f"{count} shapes rendered to {options.out}")
