"""Reading mesh files: one reader for whoever samples their surface and whoever renders it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# beside a shape's images: the matrices of their cameras, by these names, as lists [V, 4, 4]
CAMERAS = "_cameras.json"
CAMERA_KEYS = ("view_matrix", "projection_matrix")
MESH_SUFFIXES = (".off", ".obj", ".ply")

_OFF_HEAD = re.compile(rb"(?:\s+|#[^\n]*\n)*(?P<kind>(?:ST)?C?N?)(?P<more>4?n?)OFF", re.IGNORECASE)
_OFF_COLUMNS = {"ST": 2, "C": 4, "N": 3}  # floats of each kind beside x y z, in the binary form


# of Windows, macOS, network storage (thumbnails in @eaDir) and file systems
_JUNK_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_JUNK_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")


def folded(name: str) -> str:
    """What names have in common that differ in nothing but capitals or how an accent is stored: files of such
    names are one on some systems."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def is_junk(path: Path) -> bool:
    """Whether a path (below the data's root) is what an operating system leaves behind, or is hidden."""
    return path.name.lower() in _JUNK_FILES or any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _JUNK_FOLDERS
        for part in path.parts
    )


def read_mesh(path: str | os.PathLike[str], finite: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Vertices float64 [n, 3] and triangles int64 [m, 3] of an OFF, OBJ or PLY file; polygons become fans.

    OFF files are read in all the forms that are about: COFF, NOFF, STOFF (what they add is left out),
    lower case, binary, and with the counts on the first line, as many of ModelNet's have them
    (``OFF490 518 0``). A file without a face is a cloud: ``m`` is 0. ``finite=False`` takes vertices that are
    not finite as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, or a file that is damaged; the message names it.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"no mesh at {path}; expected an {', '.join(MESH_SUFFIXES)} file")
    if suffix not in MESH_SUFFIXES:
        raise ValueError(
            f"{path} is of no known format {path.suffix!r}; expected one of {', '.join(MESH_SUFFIXES)}"
        )
    try:
        vertices, faces = _read_off(path.read_bytes()) if suffix == ".off" else _read_trimesh(path)
    except Exception as error:  # trimesh raises whatever its parsers trip over
        raise ValueError(
            f"{path} cannot be read as a mesh ({type(error).__name__}: {error}); export or download it again"
        ) from error
    if finite and not np.isfinite(vertices).all():
        row = int(np.flatnonzero(~np.isfinite(vertices).all(1))[0])
        raise ValueError(f"{path}: vertex {row} is {vertices[row].tolist()}; expected finite coordinates")
    if len(faces) and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise ValueError(
            f"{path} has faces that name vertices {faces.min()} to {faces.max()} of {len(vertices)}"
        )
    return vertices, faces


def _read_trimesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import trimesh

    # materials are files that the mesh names: data must not have other files opened
    loaded: Any = trimesh.load(path, process=False, skip_materials=True)
    if isinstance(loaded, trimesh.Scene):  # an OBJ of several parts
        loaded = loaded.to_mesh() if loaded.geometry else trimesh.PointCloud(np.zeros((0, 3)))
    vertices = np.asarray(loaded.vertices, dtype=np.float64).reshape(-1, 3)
    faces = np.asarray(getattr(loaded, "faces", np.zeros((0, 3))), dtype=np.int64).reshape(-1, 3)
    return vertices, faces


def _read_off(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    head = _OFF_HEAD.match(content)
    if head is None:
        raise ValueError("does not begin with OFF (or COFF, NOFF, STOFF)")
    if head["more"]:
        raise ValueError("is an OFF file of other than three dimensions (4OFF, nOFF)")
    rest = content[head.end() :]
    binary = re.match(rb"[ \t]*BINARY[^\n]*\n", rest, re.IGNORECASE)
    if binary is not None:
        return _read_binary_off(rest[binary.end() :], head["kind"].decode().upper())
    lines = (line.split(b"#")[0].split() for line in rest.splitlines())
    body = [line for line in lines if line]
    vertex_count, face_count = (int(number) for number in body[0][:2])
    if vertex_count < 0 or face_count < 0 or len(body) < 1 + vertex_count + face_count:
        raise ValueError(
            f"promises {vertex_count} vertices and {face_count} faces, has {len(body) - 1} lines: truncated?"
        )
    rows = [line[:3] for line in body[1 : 1 + vertex_count]]
    vertices = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return vertices, _fans(_corners(line) for line in body[1 + vertex_count : 1 + vertex_count + face_count])


def _corners(line: list[bytes]) -> list[int]:
    count = int(line[0])
    if count < 0 or len(line) < 1 + count:
        raise ValueError(f"a face of {count} corners on a line of {len(line)} numbers")
    return [int(number) for number in line[1 : 1 + count]]


def _read_binary_off(content: bytes, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Geomview's binary form: big-endian int32 counts, float32 vertices, faces with colours of their own."""
    vertex_count, face_count, _ = (int(number) for number in np.frombuffer(content, ">i4", 3))
    width = 3 + sum(columns for name, columns in _OFF_COLUMNS.items() if name in kind)
    if vertex_count < 0 or face_count < 0 or 12 + 4 * width * vertex_count > len(content):
        raise ValueError(f"promises {vertex_count} vertices and {face_count} faces: truncated?")
    vertices = np.frombuffer(content, ">f4", vertex_count * width, 12).reshape(-1, width)[:, :3]
    tail = content[12 + 4 * width * vertex_count :]
    numbers = np.frombuffer(tail, ">i4", len(tail) // 4)
    at = 0
    faces: list[list[int]] = []
    for _ in range(face_count):
        if at >= len(numbers) or not 0 <= numbers[at] < len(numbers) - at - 1:
            raise ValueError(f"promises {face_count} faces, has {len(faces)}: truncated?")
        corners = int(numbers[at])
        faces.append(numbers[at + 1 : at + 1 + corners].tolist())
        at += 1 + corners
        at += 1 + max(int(numbers[at]), 0)  # the number of colour components, and those
    return vertices.astype(np.float64), _fans(faces)


def _fans(polygons: Iterable[list[int]]) -> np.ndarray:
    triangles = [
        (corners[0], corners[k], corners[k + 1]) for corners in polygons for k in range(1, len(corners) - 1)
    ]
    return np.array(triangles, dtype=np.int64).reshape(-1, 3)
