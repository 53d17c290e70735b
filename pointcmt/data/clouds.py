"""Reading one's own clouds: text, NumPy, PLY, PCD, OFF and OBJ files, one shape each."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pointcmt.data.files import read_text
from pointcmt.views.mesh_files import MESH_SUFFIXES, read_mesh

TEXT_SUFFIXES = (".xyz", ".txt", ".pts", ".asc", ".csv")
SUFFIXES = (*MESH_SUFFIXES, ".pcd", *TEXT_SUFFIXES, ".npy", ".npz")

_POINT_KEYS = ("points", "xyz", "pos", "pc", "data")
_PCD_TYPES = {"F": "f", "I": "i", "U": "u"}
_DECIMAL_COMMAS = re.compile(r"(-?\d+,\d+(e[-+]?\d+)?[;\s]+){2,}-?\d+,\d+(e[-+]?\d+)?", re.IGNORECASE)
_EXPANSION, _ALLOWANCE = 64, 64 << 20  # as for HDF5: what an archive may unpack to


class Cloud(NamedTuple):
    """What a file holds.

    Attributes:
        points: float64 [m, 3]; the vertices, where there are faces.
        normals: float64 [m, 3] unit vectors, or None.
        faces: int64 [k, 3], or None: a cloud, and not a surface to draw points on.
        colors: float64 [m, 3] from 0 to 1, of PLY clouds and PCD files that have them; else None.
    """

    points: np.ndarray
    normals: np.ndarray | None = None
    faces: np.ndarray | None = None
    colors: np.ndarray | None = None


def read_cloud(path: Path, finite: bool = True) -> Cloud:
    """The cloud or mesh in a file, by its suffix (:data:`SUFFIXES`).

    Text (``xyz``, ``txt``, ``pts``, ``asc``, ``csv``) has a point a line, x y z and then anything, by blanks
    or commas; where columns 4 to 6 are unit vectors they are normals. Before them may stand a line of names,
    which says what columns x, y, z and maybe nx, ny, nz are, or the number of points. ``npy`` holds such
    rows; ``npz`` an array ``points`` (or xyz, pos, pc, data, or the only one) and maybe ``normals``. Points
    of a ``pcd`` that are NaN are missing measurements and left out, as its library does.

    Args:
        path: the file.
        finite: refuse other files with points that are not finite; False takes them as they are.

    Raises:
        ValueError: another format, or a file that is damaged or empty; the message names file and reason.
        FileNotFoundError: no such file.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} is of no known format; expected one of {', '.join(SUFFIXES)}")
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # broken numbers are said below
            if suffix in MESH_SUFFIXES:
                points, faces = read_mesh(path, finite)
                cloud = Cloud(points, faces=faces)
                if not len(faces) and suffix == ".ply":
                    colors, normals = _ply_columns(path, ("red", "green", "blue"), ("nx", "ny", "nz"))
                    cloud = Cloud(points, normals, faces, None if colors is None else colors / 255)
            elif suffix == ".pcd":
                cloud = _read_pcd(path.read_bytes())
            else:
                cloud = _columns(_rows(path, suffix))
    except Exception as error:  # parsers raise what they trip over
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    points = cloud.points
    if len(points) == 0:
        raise ValueError(f"{path} holds no point; expected at least 1. Delete the file, or leave it out")
    with np.errstate(invalid="ignore"):
        broken = np.flatnonzero(~((np.abs(points) < 1e30) | (not finite and ~np.isfinite(points))).all(1))
    if len(broken):
        raise ValueError(
            f"{path}: point {broken[0]} is {points[broken[0]].tolist()}; expected finite numbers below 1e30"
        )
    return cloud._replace(faces=cloud.faces if cloud.faces is not None and len(cloud.faces) else None)


def _rows(path: Path, suffix: str) -> np.ndarray | dict[str, np.ndarray]:
    if suffix == ".npy":
        # mapped, so that a header that promises too much is an error and no allocation
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    if suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > _EXPANSION * path.stat().st_size + _ALLOWANCE:
            raise ValueError(f"unpacks to {size / 1e6:.0f} MB: refused")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    texts = [line.strip(" \t,;") for line in read_text(path).splitlines()]
    lines = [re.split(r"[,;\s]+", line) for line in texts]
    rows = [line for line in lines if line != [""] and not line[0].startswith(("#", "//"))]
    if _DECIMAL_COMMAS.fullmatch(next((line for line in texts if line[:1].isdigit() or line[:1] == "-"), "")):
        raise ValueError("has commas in its numbers (0,5); expected points: 0.5")
    if len(rows) > 1 and len(rows[0]) == 1:
        del rows[0]  # the number of points
    if not rows or all(map(_is_number, rows[0])):
        return np.array(rows, dtype=np.float64)
    names = [word.strip("\"'").lower() for word in rows[0]]
    if not {"x", "y", "z"} <= set(names):
        raise ValueError(
            f"begins with {' '.join(rows[0])[:60]!r}; expected a point a line, x y z, or a line before them "
            "that names x, y and z"
        )
    table = np.array(rows[1:], dtype=np.float64).reshape(len(rows) - 1, -1)
    if len(table) and table.shape[1] != len(names):
        raise ValueError(f"names {len(names)} columns and has {table.shape[1]}")
    found = {"points": table[:, [names.index(name) for name in "xyz"]]}
    if {"nx", "ny", "nz"} <= set(names):
        found["normals"] = table[:, [names.index(name) for name in ("nx", "ny", "nz")]]
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _columns(found: np.ndarray | dict[str, np.ndarray]) -> Cloud:
    normals = None
    if isinstance(found, dict):
        keys = [key for key in _POINT_KEYS if key in found] or list(found)[: len(found) == 1]
        if not keys:
            raise ValueError(f"holds arrays {sorted(found)}; expected one named points")
        normals = found.get("normals")
        found = found[keys[0]]
    if found.ndim != 2 or found.shape[1] < 3 or found.dtype.kind not in "fiu":
        raise ValueError(f"holds {found.dtype} {list(found.shape)}; expected rows of x y z: [points, ≥ 3]")
    if len(found) in (3, 4, 6) and found.shape[1] > 8:
        raise ValueError(
            f"holds {list(found.shape)}, a row for each coordinate; expected a row for each point: turn it"
        )
    found = found.astype(np.float64)
    points = found[:, :3]
    if normals is None and found.shape[1] >= 6:
        normals = found[:, 3:6]
        if not np.allclose(np.linalg.norm(normals, axis=1), 1, atol=0.02):
            normals = None  # colours, or something else
    if normals is not None and normals.shape != points.shape:
        raise ValueError(f"holds points {list(points.shape)} and normals {list(normals.shape)}")
    return Cloud(points, normals)


def _ply_columns(path: Path, *wanted: tuple[str, str, str]) -> list[np.ndarray | None]:
    """Properties of a PLY cloud's points by threes, which trimesh keeps with the raw elements only."""
    import trimesh

    loaded: Any = trimesh.load(path, process=False, skip_materials=True)  # or it would open textures
    columns = loaded.metadata.get("_ply_raw", {}).get("vertex", {}).get("data", {})

    def three(names: tuple[str, str, str]) -> np.ndarray | None:
        try:
            found = np.column_stack([np.asarray(columns[name]).reshape(-1) for name in names])
            found = found.astype(np.float64)
        except (KeyError, IndexError, TypeError, ValueError):
            return None
        return found if len(found) == len(loaded.vertices) else None

    return [three(names) for names in wanted]


def _unpacked(packed: bytes, size: int) -> bytes:
    """LZF, as its author's liblzf has it: runs of literal bytes, and copies of what came before."""
    made = bytearray()
    at = 0
    while at < len(packed) and len(made) <= size:
        control = packed[at]
        at += 1
        if control < 32:
            made += packed[at : at + control + 1]
            at += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += packed[at]
            at += 1
        start = len(made) - ((control & 31) << 8) - packed[at] - 1
        at += 1
        if start < 0:
            raise ValueError("has packed data that is damaged")
        length += 2
        while length:  # what is copied may reach into what is being made
            part = made[start : start + length]
            made += part
            start, length = start + len(part), length - len(part)
    if len(made) != size:
        raise ValueError(f"unpacks to {len(made)} bytes and promises {size}: damaged")
    return bytes(made)


def _read_pcd(content: bytes) -> Cloud:
    """The point cloud library's format, in text or binary (its documentation: The PCD file format)."""
    head: dict[str, list[str]] = {}
    at = 0
    while "DATA" not in head:
        end = content.find(b"\n", at)
        if end < 0:
            raise ValueError("has no DATA line: truncated?")
        words = content[at:end].decode("ascii", "replace").split("#")[0].split()
        at = end + 1
        if words:
            head[words[0].upper()] = words[1:]
    names, sizes, types = head["FIELDS"], head["SIZE"], head["TYPE"]
    counts = [int(count) for count in head.get("COUNT", ["1"] * len(names))]
    if not {"x", "y", "z"} <= set(names) or not len(names) == len(sizes) == len(types) == len(counts):
        raise ValueError(f"has fields {names}; expected x, y and z, with SIZE, TYPE and COUNT of each")
    number = int(head["POINTS"][0]) if "POINTS" in head else int(head["WIDTH"][0]) * int(head["HEIGHT"][0])
    starts = np.concatenate([[0], np.cumsum(counts)])
    how = head["DATA"][0].lower() if head["DATA"] else ""
    if how == "ascii":
        rows = [line.split() for line in content[at:].decode("ascii", "replace").splitlines() if line.strip()]
        table = np.array(rows[:number], dtype=np.float64).reshape(len(rows[:number]), -1)
        columns = {name: table[:, starts[names.index(name)]] for name in names}
    elif how in ("binary", "binary_compressed"):
        body = content[at:]
        if how == "binary_compressed":
            size, full = (int(number) for number in np.frombuffer(body, "<u4", 2))
            if full > _EXPANSION * len(body) + _ALLOWANCE or size > len(body) - 8:
                raise ValueError(f"promises {size} packed bytes of {full}, has {len(body)}: truncated?")
            body = _unpacked(body[8 : 8 + size], full)
        kinds = [
            (f"{name}{k}", f"<{_PCD_TYPES[kind]}{size}", (count,))
            for k, (name, kind, size, count) in enumerate(zip(names, types, sizes, counts, strict=True))
        ]
        if number * np.dtype(kinds).itemsize > len(body):
            raise ValueError(f"promises {number} points and ends before: truncated?")
        if how == "binary":
            packed = np.frombuffer(body, kinds, number)
            columns = {name: packed[f"{name}{k}"][:, 0] for k, name in enumerate(names)}
        else:  # field by field
            start, columns = 0, {}
            for name, kind, size, count in zip(names, types, map(int, sizes), counts, strict=True):
                values = np.frombuffer(body, f"<{_PCD_TYPES[kind]}{size}", number * count, start)
                columns[name] = values[::count]
                start += number * count * size
    else:
        raise ValueError(
            f"is stored as {how!r}; expected ascii, binary or binary_compressed. Convert it: "
            "pcl_convert_pcd_ascii_binary IN OUT 1, or open3d.io.write_point_cloud"
        )
    if len(columns["x"]) < number:
        raise ValueError(f"promises {number} points, has {len(columns['x'])}: truncated?")
    points = np.column_stack([columns[name] for name in "xyz"]).astype(np.float64)
    measured = ~np.isnan(points).any(1)
    normals = None
    if {"normal_x", "normal_y", "normal_z"} <= set(names):
        normals = np.column_stack([columns[f"normal_{name}"] for name in "xyz"]).astype(np.float64)[measured]
    colors = None
    if "rgb" in names:  # three bytes in a number of four
        packed = columns["rgb"][measured]
        whole = packed.astype("<f4").view("<u4") if types[names.index("rgb")] == "F" else packed.astype("<u4")
        colors = np.column_stack([whole >> shift & 255 for shift in (16, 8, 0)]) / 255
    return Cloud(points[measured], normals, colors=colors)
