"""``pointcmt render-views``: images of meshes, for ``train-teacher --images`` and ``pretrain --images``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pointcmt.data.dataset import Split
from pointcmt.data.princeton import is_princeton, meshes_of
from pointcmt.recipes.progress import say
from pointcmt.recipes.run import held

SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass
class RenderViews:
    """Render a tree of meshes, CLASS/SPLIT/NAME.off as ModelNet's or SPLIT/CLASS/NAME.off, or the pack of the
    Princeton shape benchmark, to images for train-teacher --images and pretrain --images."""

    meshes: Annotated[Path, tyro.conf.Positional]
    """Folder of the meshes (OFF, OBJ, PLY), or of psb_meshes.h5."""
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
    from pointcmt.views.mesh import render_folder, render_meshes

    with held(options.out):
        if is_princeton(options.meshes):
            meshes = {
                k: v
                for split in SPLITS
                if split in options.splits
                for k, v in meshes_of(options.meshes, split).items()
            }
            count = render_meshes(meshes, options.out, options.rig, options.size, up=options.up)
        else:
            count = render_folder(
                options.meshes, options.out, options.rig, options.size, up=options.up, splits=options.splits
            )
    say(f"{count} shapes rendered to {options.out}")
