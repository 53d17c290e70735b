"""labelled_folder: one's own clouds with a label for each point, shapes with parts or rooms."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pointcmt.data.checks import Up
from pointcmt.data.dataset import PointDataset, Split, check_split, in_unit_sphere, padded
from pointcmt.data.files import is_junk, name_of, read_names
from pointcmt.data.labelled import LABELLED_SUFFIXES, LabelledCloud, check_point_labels, read_labelled
from pointcmt.data.modelnet_off import draws
from pointcmt.data.registry import register_dataset
from pointcmt.data.scenes import SceneDataset, make_room

NAMES_FILE = "labels.txt"
_SUFFIXES = f".{{{','.join(suffix[1:] for suffix in LABELLED_SUFFIXES)}}}"


@register_dataset(
    "labelled_folder",
    matches=lambda root: (root / NAMES_FILE).is_file(),
    layout=f"one's own labelled clouds: {NAMES_FILE} (names in label order) and <split>/<class>/*{_SUFFIXES}",
)
def labelled_folder(
    root: str | Path,
    split: Split,
    num_points: int = 2048,
    *,
    seed: int = 0,
    normalize: bool = True,
    voxel: float = 0.0,
    up: Up | None = None,
) -> PointDataset:
    """One's own clouds with labels: ``root/labels.txt`` and ``root/<split>/<class>/*``.

    ``labels.txt`` names the labels, one a line, from 0. Where the names are ``class/part``, with the classes'
    folders, the clouds are shapes with parts: N points of each by chance, in the unit sphere. Otherwise they
    are rooms, of which training sees crops of N points (:class:`~pointcmt.data.scenes.SceneDataset`) and
    evaluation everything. Files are those of :func:`~pointcmt.data.labelled.read_labelled`; what some of them
    lack (colours, normals) is left out of all.

    Args:
        root: the folder.
        split: ``"train"`` or ``"test"``.
        num_points: N.
        seed: draws points.
        normalize: centre shapes and scale them into the unit sphere; rooms stay in their unit.
        voxel: of rooms, keep a point for each cube of this edge; 0 keeps all.
        up: the axis that points up; of rooms z, where it is not said.

    Raises:
        FileNotFoundError: no names, or nothing of that split.
        ValueError: a file that cannot be read, a label without a name, or a part of another class.
    """
    check_split(split)
    root = Path(root)
    names = read_names(root / NAMES_FILE)
    found = [
        path
        for path in sorted((root / split).glob("*/*"))
        if path.suffix.lower() in LABELLED_SUFFIXES and not is_junk(path.relative_to(root))
    ]
    if not found:
        raise FileNotFoundError(f"{root} has no labelled clouds {split}/<class>/*{_SUFFIXES}")
    folders = (path for part in ("train", "test") for path in (root / part).glob("[!.]*") if path.is_dir())
    classes = sorted({name_of(path.name) for path in folders})
    ids = [f"{split}/{name_of(path.parent.name)}/{name_of(path.stem)}" for path in found]
    if len(set(ids)) < len(ids):
        ids = [f"{split}/{name_of(path.parent.name)}/{name_of(path.name)}" for path in found]
    of_part = [name.rpartition("/")[0] for name in names]
    if not all(of_part):
        rooms = [
            make_room(name, read_labelled(path), voxel, path) for name, path in zip(ids, found, strict=True)
        ]
        return SceneDataset(rooms, names, num_points, seed=seed, up=up or "z")
    if unknown := sorted(set(of_part) - set(classes)):
        raise ValueError(
            f"{root / NAMES_FILE} names parts of {', '.join(unknown)}, and the classes' folders are "
            f"{', '.join(classes)}; expected class/part, or names without / for rooms"
        )
    if num_points < 1:
        raise ValueError(f"num_points is {num_points}; expected at least 1")
    labels = np.array([classes.index(name_of(path.parent.name)) for path in found], dtype=np.int64)
    clouds: list[LabelledCloud] = []
    lengths = np.empty(len(found), dtype=np.int64)
    for row, path in enumerate(found):
        cloud = read_labelled(path)
        assert cloud.labels is not None
        check_point_labels(cloud.labels[None], names, [ids[row]])
        there = {of_part[label] for label in np.unique(cloud.labels[cloud.labels >= 0])}
        if foreign := there - {classes[labels[row]]}:
            raise ValueError(f"{path} has parts of {', '.join(sorted(foreign))}; expected its own class's")
        drawn = draws(seed, path.relative_to(root).as_posix()).permutation(len(cloud.points))
        order, lengths[row] = padded(drawn, num_points)
        clouds.append(cloud.rows(order))
    points = np.stack([cloud.points for cloud in clouds])

    def stacked(name: str) -> np.ndarray | None:
        parts = [getattr(cloud, name) for cloud in clouds]
        return None if any(part is None for part in parts) else np.stack(parts)

    return PointDataset(
        in_unit_sphere(points, None)[0] if normalize else points,
        labels,
        classes,
        ids,
        up=up,
        part_names=names,
        category=labels,
        point_labels=stacked("labels"),
        colors=stacked("colors"),
        normals=stacked("normals"),
        lengths=lengths if (lengths < num_points).any() else None,
    )
