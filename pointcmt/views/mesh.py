"""Images from meshes: a rig's shaded views through pyvista (VTK), off-screen. Needs ``pointcmt[mesh]``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pointcmt.checkpoint import PathLike, atomic_write
from pointcmt.types import Views
from pointcmt.views.cameras import Rig
from pointcmt.views.cameras import rig as find_rig
from pointcmt.views.mesh_files import CAMERA_KEYS, CAMERAS, MESH_SUFFIXES, folded, is_junk, read_mesh

# one light at the camera and some from all around: every visible face has a shade that tells its slant
_COLOR = (0.8, 0.8, 0.8)
_AMBIENT, _DIFFUSE, _SPECULAR = 0.25, 0.75, 0.1


@overload
def render_mesh(
    path: PathLike,
    rig: str | Rig = ...,
    size: int = ...,
    *,
    up: str = ...,
    cameras: Literal[False] = ...,
) -> Tensor: ...
@overload
def render_mesh(
    path: PathLike, rig: str | Rig = ..., size: int = ..., *, up: str = ..., cameras: Literal[True]
) -> Views: ...
def render_mesh(
    path: PathLike,
    rig: str | Rig = "dodecahedron20",
    size: int = 224,
    *,
    up: str = "z",
    cameras: bool = False,
) -> Tensor | Views:
    """Shaded views of a mesh, scaled to the unit sphere, in front of white.

    Args:
        path: an OFF, OBJ or PLY file.
        rig: a registered name or a ``Rig``; the same cameras as ``project_points``'.
        size: height and width S in pixels.
        up: the axis of the mesh that points up (ModelNet: z).
        cameras: give a ``Views`` of one shape, with the matrices that take the mesh's own coordinates to its
            images: points sampled on the mesh are found there by ``pointcmt.views.pixels_of``.

    Returns:
        [V, 3, S, S] float32 in [0, 1]; with ``cameras`` a ``Views`` with B = 1.

    Raises:
        ModuleNotFoundError: pyvista is not installed.
        RuntimeError: VTK cannot render on this machine.
        FileNotFoundError, ValueError: as ``read_mesh``, or a mesh without a face.
    """
    rigged = find_rig(rig, up)
    if size < 1:
        raise ValueError(f"size={size}; expected at least 1 pixel")
    vertices, faces = _read_surface(path)
    with _plotter(size) as plotter:
        images = _render(plotter, vertices, faces, rigged, up)
    if not cameras:
        return images
    view, projection = mesh_cameras(vertices, faces, rigged)
    return Views(images[None], view_matrix=view[None], projection_matrix=projection[None])


def mesh_cameras(vertices: np.ndarray, faces: np.ndarray, rig: Rig) -> tuple[Tensor, Tensor]:
    """View and projection matrices [V, 4, 4] float32 of a mesh's images, for its own coordinates.

    They have the scaling to the unit sphere in them; conventions as of ``pointcmt.types.Views``.
    """
    view, projection = rig.matrices()
    centre, radius = _sphere_of(vertices, faces)
    scaled = torch.eye(4, dtype=torch.float64)
    scaled[:3, :3] /= radius
    scaled[:3, 3] = torch.from_numpy(-centre / radius)
    return (view.double() @ scaled).float(), projection


def render_folder(
    meshes_root: PathLike,
    out: PathLike,
    rig: str | Rig = "dodecahedron20",
    size: int = 224,
    *,
    up: str = "z",
    splits: Sequence[str] = ("train", "test"),
    progress: bool = True,
) -> int:
    """Render a tree of meshes to the multi-view convention.

    Meshes lie in ``<class>/<split>/<name>.off``, as ModelNet's, or in ``<split>/<class>/<name>.off``. Writes
    ``<out>/<split>/<class>/<name>_001.png`` and so on, view 1 first: what
    ``pointcmt.data.MultiViewImages`` reads, whatever the names, and ``<name>_cameras.json`` with the images'
    matrices. Every file is written whole or not at all, and a shape whose last image exists is done: run it
    again to resume. Hidden files are skipped.

    Args:
        meshes_root: the tree of meshes (OFF, OBJ or PLY).
        out: root of the images.
        rig, size, up: as ``render_mesh``.
        splits: names of the split folders.
        progress: show a progress bar.

    Returns:
        How many shapes were rendered in this run.

    Raises:
        FileNotFoundError: no mesh in those layouts.
        ModuleNotFoundError, RuntimeError, ValueError: as ``render_mesh``; the message names the mesh. Or two
            meshes that would write the same images.
    """
    root = Path(meshes_root)
    folders: dict[Path, Path] = {}  # of the mesh → below ``out``, of its images without their number
    for path in sorted(root.glob("*/*/*")):
        below = path.relative_to(root)
        label, split = below.parts[:2] if below.parts[1] in splits else below.parts[1::-1]
        if path.suffix.lower() in MESH_SUFFIXES and split in splits and not is_junk(below):
            folders[path] = Path(split, label, path.stem)
    if not folders:
        layouts = ", ".join(f"<class>/{split}/*.off, {split}/<class>/*.off" for split in splits)
        raise FileNotFoundError(
            f"no mesh under {root}; tried {layouts} (and {', '.join(MESH_SUFFIXES[1:])}), the layouts of "
            "ModelNet40.zip and of pointcmt.data.PointFolder"
        )
    owners: dict[str, Path] = {}
    for path, folder in folders.items():
        other = owners.setdefault(folded(folder.as_posix()), path)
        if other != path:
            raise ValueError(
                f"{other} and {path} would write the same images (capitals apart, as some systems have it); "
                "rename one"
            )
    meshes = {folder: partial(_read_surface, path) for path, folder in folders.items()}
    return render_meshes(meshes, out, rig, size, up=up, progress=progress)


def render_meshes(
    meshes: Mapping[Path, Callable[[], tuple[np.ndarray, np.ndarray]]],
    out: PathLike,
    rig: str | Rig = "dodecahedron20",
    size: int = 224,
    *,
    up: str = "z",
    progress: bool = True,
) -> int:
    """Render meshes to images and cameras as :func:`render_folder` does, wherever the meshes are kept.

    Args:
        meshes: ``<split>/<class>/<name>`` of each, and what reads its vertices [n, 3] and triangles [m, 3].
        out, rig, size, up, progress: as of :func:`render_folder`; it returns and raises the same.
    """
    from rich.progress import track

    cameras, out = find_rig(rig, up), Path(out)

    def image(folder: Path, view: int) -> Path:
        return out / folder.with_name(f"{folder.name}_{view:03d}.png")

    todo = [folder for folder in meshes if not image(folder, len(cameras)).exists()]
    if not todo:
        return 0
    with _plotter(size) as plotter:
        for folder in track(todo, description="rendering meshes", disable=not progress):
            vertices, faces = meshes[folder]()
            views = _render(plotter, vertices, faces, cameras, up)
            pixels = (views * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            matrices = zip(CAMERA_KEYS, mesh_cameras(vertices, faces, cameras), strict=True)
            with atomic_write(image(folder, 1).with_name(f"{folder.name}{CAMERAS}")) as temporary:
                temporary.write_text(
                    json.dumps({name: value.tolist() for name, value in matrices}), encoding="utf-8"
                )
            # the last view last: it says that the shape is done
            for view, picture in enumerate(pixels, start=1):
                with atomic_write(image(folder, view)) as temporary:
                    Image.fromarray(picture).save(temporary)
    return len(todo)


def _read_surface(path: PathLike) -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = read_mesh(path)
    if len(faces) == 0:
        raise ValueError(f"{path} has {len(vertices)} vertices and no face; a mesh with triangles is needed")
    return vertices, faces


def _sphere_of(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre [3] of the used vertices' bounding box, and the distance of the farthest of them; 1 where 0."""
    used = vertices[np.unique(faces)]
    centre = (used.min(0) + used.max(0)) / 2
    radius = float(np.linalg.norm(used - centre, axis=1).max())
    return centre, radius if radius > 0 else 1.0


def _normalize(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """To the unit sphere around the origin."""
    centre, radius = _sphere_of(vertices, faces)
    return (vertices - centre) / radius


def _import_pyvista() -> Any:
    # Mesa draws with an LLVM of its own. Triton brings another, and ends the process by a segmentation fault
    # where Mesa's was loaded before it (timm and torch.compile import it); the other way round both work
    with suppress(ImportError):
        importlib.import_module("triton")
    try:
        import pyvista
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rendering meshes needs pyvista: pip install 'pointcmt[mesh]' "
            "(views projected from points need nothing: pointcmt.views.project_points)"
        ) from error
    except ImportError as error:  # VTK's wheels link to the system's libraries
        raise RuntimeError(_no_rendering(str(error))) from error
    return pyvista


def _no_rendering(reason: str) -> str:
    return (
        f"VTK cannot render off-screen here: {reason}. It needs OpenGL libraries, no display. On Debian or "
        "Ubuntu: apt-get install libgl1 libegl1 libosmesa6 libxrender1; on Fedora: dnf install mesa-libGL "
        "mesa-libEGL mesa-libOSMesa libXrender. Views projected from points need none of this"
    )


@contextmanager
def _plotter(size: int) -> Iterator[Any]:
    """An off-screen plotter of size × size pixels, known to draw."""
    pyvista = _import_pyvista()
    # without a display VTK looks for an X server first and complains; EGL is what it then uses
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")
    try:
        plotter = pyvista.Plotter(off_screen=True, window_size=[size, size], lighting="none")
        plotter.set_background("white")
        plotter.add_light(pyvista.Light(light_type="headlight"))
        blank = plotter.screenshot(return_img=True)
    except Exception as error:
        raise RuntimeError(_no_rendering(repr(error))) from error
    try:
        if blank is None or blank.shape[:2] != (size, size):
            raise RuntimeError(_no_rendering(f"asked for {size}×{size} pixels, got {np.shape(blank)}"))
        yield plotter
    finally:
        plotter.close()


def _render(plotter: Any, vertices: np.ndarray, faces: np.ndarray, cameras: Rig, up: str) -> Tensor:
    pyvista = _import_pyvista()
    surface = pyvista.PolyData.from_regular_faces(_normalize(vertices, faces), faces)
    plotter.add_mesh(
        surface,
        name="shape",  # replaces the shape before
        color=_COLOR,
        ambient=_AMBIENT,
        diffuse=_DIFFUSE,
        specular=_SPECULAR,
        smooth_shading=False,
        show_scalar_bar=False,
        reset_camera=False,
        render=False,
    )
    images = []
    for eye, top in zip(cameras.eyes, cameras.ups, strict=True):
        camera = plotter.camera
        camera.position, camera.focal_point, camera.up = eye, (0.0, 0.0, 0.0), top
        camera.view_angle = cameras.field_of_view
        distance = float(np.linalg.norm(eye))
        camera.clipping_range = (max(distance - 1.01, 0.01), distance + 1.01)
        plotter.render()
        images.append(np.array(plotter.screenshot(return_img=True)[..., :3]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
