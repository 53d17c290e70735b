"""Clouds whose points have labels, read from one's own files, and the checks that all such sets share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pointcmt.checkpoint import atomic_write
from pointcmt.data.clouds import SUFFIXES, read_cloud
from pointcmt.data.files import read_text

LABELLED_SUFFIXES = (".ply", ".txt", ".xyz", ".npy", ".npz")
_LABEL_KEYS = (
    "label", "labels", "class", "classification", "semantic", "scalar_label", "scalar_labels",
    "scalar_class", "scalar_classification", "seg", "part",
)  # fmt: skip


class LabelledCloud(NamedTuple):
    """What a file holds of a cloud.

    Attributes:
        points: float32 [m, 3], in the file's unit.
        labels: int64 [m], negative where a point has none; None where the file has none.
        colors: float32 [m, 3] in [0, 1], or None.
        normals: float32 [m, 3] unit vectors, or None.
    """

    points: np.ndarray
    labels: np.ndarray | None = None
    colors: np.ndarray | None = None
    normals: np.ndarray | None = None

    def rows(self, index: Any) -> LabelledCloud:
        """Some of its points, with all that belongs to them."""
        return LabelledCloud._make(None if part is None else part[index] for part in self)


def read_labelled(path: Path, labelled: bool = True) -> LabelledCloud:
    """A cloud with a label for each point.

    Text (``txt``, ``xyz``) and ``npy`` hold a point a row: x y z, then triples that are unit normals or
    colours (0 … 1, or 0 … 255), then the label. ``npz`` has arrays ``points`` and ``labels``, maybe
    ``colors`` and ``normals``. ``ply`` has a vertex property ``label`` (or class, classification, semantic,
    scalar_Label …), and may have red, green, blue and nx, ny, nz.

    Args:
        path: the file.
        labelled: whether labels are needed; False reads files without them, and other formats, too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged or empty, no labels, labels that are no whole numbers or not one for each point,
            coordinates that are not finite; the message names file and point.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if suffix not in (LABELLED_SUFFIXES if labelled else (*SUFFIXES, *LABELLED_SUFFIXES)):
        raise ValueError(
            f"{path}: expected a file with labels ({', '.join(LABELLED_SUFFIXES)}), or another of a cloud"
        )
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            if suffix == ".ply":
                found = _ply(path)
            elif suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    found = _arrays({name: arrays[name] for name in arrays.files})
            elif suffix == ".npy":
                found = _columns(np.array(np.load(path, mmap_mode="r", allow_pickle=False)))
            elif suffix in (".txt", ".xyz"):
                found = _columns(_text(path))
            else:
                cloud = read_cloud(path)
                found = LabelledCloud(cloud.points, None, None, cloud.normals)
    except Exception as error:  # parsers raise what they trip over
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    return _checked(found, path, labelled)


def labelled_rows(rows: np.ndarray, path: Path) -> LabelledCloud:
    """The cloud of an array that was made of ``path``, as :func:`read_labelled` reads one."""
    return _checked(_columns(rows), path, True)


def write_labelled(path: Path, cloud: LabelledCloud) -> Path:
    """Write a cloud as binary PLY, with ``label`` where it has labels and colours as bytes; atomically."""
    columns: list[tuple[str, str, np.ndarray]] = [
        (axis, "<f4", cloud.points[:, k]) for k, axis in enumerate("xyz")
    ]
    if cloud.normals is not None:
        columns += [(f"n{axis}", "<f4", cloud.normals[:, k]) for k, axis in enumerate("xyz")]
    if cloud.colors is not None:
        byte = np.clip(np.rint(255 * cloud.colors), 0, 255)
        columns += [(name, "u1", byte[:, k]) for k, name in enumerate(("red", "green", "blue"))]
    if cloud.labels is not None:
        columns.append(("label", "<i4", cloud.labels))
    rows = np.empty(len(cloud.points), dtype=[(name, kind) for name, kind, _ in columns])
    words = {"<f4": "float", "u1": "uchar", "<i4": "int"}
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    for name, kind, values in columns:
        rows[name] = values
        head.append(f"property {words[kind]} {name}")
    with atomic_write(path) as temporary:
        temporary.write_bytes(("\n".join([*head, "end_header"]) + "\n").encode() + rows.tobytes())
    return path


def check_point_labels(labels: np.ndarray, names: Sequence[str], shape_ids: Sequence[str]) -> None:
    """Labels [n, N] are below the number of names; negative ones mean that a point has none.

    Raises:
        ValueError: one is not; shape and point are named.
    """
    if labels.size and int(labels.max()) >= len(names):
        row, point = (int(place[0]) for place in np.nonzero(labels >= len(names)))
        raise ValueError(
            f"shape {shape_ids[row]!r} (row {row}): point {point} has the label {labels[row, point]}, and "
            f"there are {len(names)} names ({', '.join(names[:4])}{' …' if len(names) > 4 else ''}); "
            f"expected 0 to {len(names) - 1}, or a negative number for a point without a label"
        )


def never_there(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """The names that no point has."""
    there = np.unique(labels)
    return [name for number, name in enumerate(names) if number not in there]


def _checked(found: LabelledCloud, path: Path, labelled: bool) -> LabelledCloud:
    points = np.asarray(found.points)
    if len(points) == 0:
        raise ValueError(f"{path} holds no point")
    with np.errstate(invalid="ignore"):
        broken = np.flatnonzero(~(np.abs(points) < 1e30).all(1))
    if len(broken):
        raise ValueError(
            f"{path}: point {broken[0]} is {points[broken[0]].tolist()}; expected finite numbers below 1e30. "
            "Mend or leave out that point"
        )
    labels = found.labels
    if labels is None and labelled:
        raise ValueError(
            f"{path} has no labels; expected a last column (x y z [normal] [colour] label), a ply property "
            "`label`, or an array `labels`"
        )
    for name, part in (("labels", labels), ("colors", found.colors), ("normals", found.normals)):
        if part is not None and len(part) != len(points):
            raise ValueError(f"{path} has {len(points)} points and {len(part)} {name}; expected one for each")
    if labels is not None:
        values = np.asarray(labels).reshape(-1)
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int64)
        wrong = np.flatnonzero(whole != values)
        if len(wrong):
            raise ValueError(
                f"{path}: point {wrong[0]} has the label {values[wrong[0]]}; expected whole numbers"
            )
        labels = whole
    return LabelledCloud(
        points.astype(np.float32),
        labels,
        None if found.colors is None else np.asarray(found.colors, dtype=np.float32),
        None if found.normals is None else np.asarray(found.normals, dtype=np.float32),
    )


def _text(path: Path) -> np.ndarray:
    content = read_text(path)
    separator = "," if "," in content[: content.find("\n") + 1 or None] else None
    return np.loadtxt(content.splitlines(), delimiter=separator, dtype=np.float64, ndmin=2)


def _columns(found: np.ndarray) -> LabelledCloud:
    if found.ndim != 2 or found.shape[1] < 3 or found.dtype.kind not in "fiu" or found.shape[1] % 3 == 2:
        raise ValueError(
            f"holds {found.dtype} {list(found.shape)}; expected rows of x y z, then triples (normal, "
            "colour), then maybe the label: 3, 4, 6, 7, 9 or 10 columns"
        )
    labels = found[:, -1] if found.shape[1] % 3 == 1 else None
    colors = normals = None
    for start in range(3, found.shape[1] - 2, 3):
        triple = found[:, start : start + 3]
        lengths = np.linalg.norm(triple.astype(np.float64), axis=1)
        if normals is None and np.allclose(lengths, 1, atol=0.02):
            normals = triple
        elif colors is None:
            colors = _as_colors(triple)
    return LabelledCloud(found[:, :3].astype(np.float64), labels, colors, normals)


def _as_colors(values: np.ndarray) -> np.ndarray:
    """Colours in [0, 1] of numbers in [0, 1] or [0, 255]."""
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"has columns from {low:g} to {high:g}; expected colours (0 … 1 or 0 … 255) or unit normals"
        )
    return values / 255 if high > 1 else values


def _arrays(found: dict[str, np.ndarray]) -> LabelledCloud:
    if set(found) == {"array"}:  # as arrays are cached
        return _columns(found["array"])
    if "points" not in found:
        raise ValueError(f"holds arrays {sorted(found)}; expected points, labels, and maybe colors, normals")
    points, colors = found["points"], found.get("colors")
    if points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"holds points {list(points.shape)}; expected [m, 3]")
    if points.shape[1] > 3:
        return _columns(points)._replace(labels=found.get("labels"))
    return LabelledCloud(
        points.astype(np.float64),
        found.get("labels"),
        None if colors is None else _as_colors(colors),
        found.get("normals"),
    )


def _ply(path: Path) -> LabelledCloud:
    import trimesh

    loaded: Any = trimesh.load(path, process=False, skip_materials=True)  # or it would open textures
    raw = loaded.metadata.get("_ply_raw", {}).get("vertex", {}).get("data", {})
    fields = {name.lower(): name for name in getattr(getattr(raw, "dtype", None), "names", None) or raw}

    def column(*names: str) -> np.ndarray | None:
        if not all(name in fields for name in names):
            return None
        parts = [np.asarray(raw[fields[name]]).reshape(-1) for name in names]
        return np.column_stack(parts) if len(parts) > 1 else parts[0]

    points = column("x", "y", "z")
    if points is None:
        points = np.asarray(loaded.vertices).reshape(-1, 3)
    colors = column("red", "green", "blue")
    if colors is not None:
        colors = colors / 255.0 if colors.dtype.kind in "iu" else _as_colors(colors)
    labels = next((found for key in _LABEL_KEYS if (found := column(key)) is not None), None)
    return LabelledCloud(points.astype(np.float64), labels, colors, column("nx", "ny", "nz"))
