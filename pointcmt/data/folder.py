"""PointFolder: one's own clouds and meshes, in folders of classes or by a list."""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from pointcmt.data.array_cache import cached_array
from pointcmt.data.checks import Up
from pointcmt.data.clouds import SUFFIXES, read_cloud
from pointcmt.data.dataset import PointDataset, Split, check_split, class_rows, in_unit_sphere, padded
from pointcmt.data.files import is_junk, name_of, read_text, within
from pointcmt.data.modelnet_off import draws, sample_surface
from pointcmt.data.registry import register_dataset
from pointcmt.data.survey import SPLITS, advice

_LAYOUT = (
    f"one's own files: <split>/<class>/*.{{{','.join(suffix[1:] for suffix in SUFFIXES)}}} with splits "
    "train and test, or a csv list with the columns path,label,split"
)


def _lists(root: Path) -> list[Path]:
    """The csv lists that are ``root`` or lie in it."""
    found = [root] if root.is_file() else sorted(root.glob("*.csv"))
    return [path for path in found if path.suffix.lower() == ".csv" and not is_junk(Path(path.name))]


def _files(root: Path) -> list[tuple[str, str, Path]]:
    """(split, class, file) of ``<split>/<class>/*``, sorted by path."""
    return [
        (path.parts[-3], name_of(path.parts[-2]), path)
        for split in SPLITS
        for path in sorted((root / split).glob("*/*"))
        if path.suffix.lower() in SUFFIXES and not is_junk(path.relative_to(root))
    ]


@register_dataset(
    "folder",
    # with labels.txt the points have labels: labelled_folder
    matches=lambda root: not (root / "labels.txt").is_file() and bool(_lists(root) or _files(root)),
    layout=_LAYOUT,
)
class PointFolder(PointDataset):
    """One's own clouds: ``root/<split>/<class>/*.{off,obj,ply,pcd,xyz,txt,pts,asc,csv,npy,npz}``, or a list.

    The class names are those of the folders of *all* splits together, sorted: a class that is absent from a
    split keeps its number. A list is ``root`` itself, or the one csv file in it: lines ``path,label,split``
    under a header of those names; paths are relative to the list and stay in its folder.

    A mesh gives N points drawn uniformly on its surface; a cloud N of its points by chance, or, where it has
    fewer, all of them and then some again (``lengths`` says how many are its own). The draw depends on
    ``seed`` and the file's path below the root alone. What operating systems leave behind, and hidden files,
    are skipped.

    Args:
        root: the folder, or the list.
        split: ``"train"`` or ``"test"``.
        num_points: N.
        per_class: keep this many shapes of each class, drawn by ``seed``; None keeps all.
        seed: draws points and shapes.
        normals: items are [N, 6] with unit normals, which every cloud must have (meshes have them).
        normalize: centre each cloud and scale it into the unit sphere; False leaves the files' units.
        dense_points: also keep this many points of each shape as ``view_points``.
        cache_dir: where clouds are kept once read, so that only the first use is slow; None keeps nothing.
        skip_broken: leave out files that cannot be read; a warning says which and how many.
        up: the axis that points up, if it is known.

    Attributes:
        paths: the n files.
        broken: what was left out, a message for each file.
        Further attributes are those of :class:`PointDataset`.

    Raises:
        FileNotFoundError: nothing of that split, or a listed file that is missing.
        ValueError: a file that cannot be read, or a list that is not one; the message names file and line.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        num_points: int = 1024,
        *,
        per_class: int | None = None,
        seed: int = 0,
        normals: bool = False,
        normalize: bool = True,
        dense_points: int | None = None,
        cache_dir: str | Path | None = None,
        skip_broken: bool = False,
        up: Up | None = None,
    ) -> None:
        check_split(split)
        if num_points < 1:
            raise ValueError(f"num_points is {num_points}; expected at least 1")
        root = Path(root)
        lists = _lists(root)
        if len(lists) > 1:
            raise ValueError(f"{root} holds {len(lists)} csv lists; give the one that is meant as the root")
        base = lists[0].parent if lists else root
        found = _listed(lists[0]) if lists else _files(root)
        names = sorted({label for _, label, _ in found})
        chosen = [(names.index(label), path) for part, label, path in found if part == split]
        if not chosen:
            raise FileNotFoundError(
                _no_split(root, split, Counter(part for part, _, _ in found), bool(lists))
            )
        labels = np.array([label for label, _ in chosen])
        rows = np.arange(len(chosen)) if per_class is None else class_rows(labels, per_class, seed)
        paths = [chosen[row][1] for row in rows]
        labels = labels[rows]
        self.broken: list[str] = []
        wanted, columns = max(num_points, dense_points or 0), 6 if normals else 3

        def read() -> np.ndarray:
            """Clouds [n, wanted, C], and below each how many points are its own (0: it is broken)."""
            clouds = np.zeros((len(paths), wanted + 1, columns), dtype=np.float32)
            for cloud, path in zip(clouds, paths, strict=True):
                try:
                    generator = draws(seed, path.relative_to(base).as_posix())
                    cloud[:wanted], cloud[wanted, 0] = draw_points(path, wanted, normals, generator)
                except (ValueError, OSError) as error:
                    if not skip_broken:
                        raise
                    self.broken.append(str(error))
            return clouds

        if skip_broken:
            missing = [path for path in paths if not path.is_file()]
            self.broken += [f"{path} does not exist, though the list names it" for path in missing]
            there = np.array([path.is_file() for path in paths])
            paths, labels = [path for path in paths if path.is_file()], labels[there]
        clouds = cached_array(cache_dir, f"folder1-{wanted}-{columns}-{seed}", paths, read)
        lengths = clouds[:, wanted, 0].astype(np.int64)
        clouds, whole = clouds[:, :wanted], lengths > 0
        if not whole.all() and not self.broken:  # kept from an earlier use
            self.broken = [f"{paths[row]} cannot be read" for row in np.flatnonzero(~whole)]
        if self.broken:
            if not skip_broken:
                raise ValueError(f"{self.broken[0]} (--skip-broken leaves such files out)")
            warnings.warn(
                f"{root}: {len(self.broken)} of {len(rows)} {split} files are left out (--skip-broken): "
                + "; ".join(self.broken[:3]) + (" …" if len(self.broken) > 3 else ""),
                stacklevel=2,
            )  # fmt: skip
        if not whole.any():
            raise ValueError(f"{root}: none of the {len(rows)} {split} files can be read")
        clouds, labels, lengths = clouds[whole], labels[whole], lengths[whole]
        kept = [path for path, good in zip(paths, whole, strict=True) if good]
        dense = clouds[..., :3][:, :dense_points] if dense_points else None
        clouds = clouds[:, :num_points]
        if normalize:
            clouds, dense = in_unit_sphere(clouds, dense)
        # images are matched by names without suffix; files of one name differ by it, or by folder
        stems = Counter((label, path.stem) for label, path in zip(labels.tolist(), kept, strict=True))
        whole_names = Counter((label, path.name) for label, path in zip(labels.tolist(), kept, strict=True))

        def own_name(label: int, path: Path) -> str:
            if stems[label, path.stem] == 1:
                return path.stem
            if whole_names[label, path.name] == 1:
                return path.name
            return path.relative_to(base).as_posix().replace("/", "-")

        ids = [
            f"{split}/{names[label]}/{name_of(own_name(label, path))}"
            for label, path in zip(labels.tolist(), kept, strict=True)
        ]
        short = lengths < num_points
        super().__init__(
            clouds, labels, names, ids, dense, up=up,
            lengths=np.minimum(lengths, num_points) if short.any() else None,
        )  # fmt: skip
        self.root, self.split, self.paths = root, split, kept


def draw_points(
    path: Path, count: int, normals: bool, generator: np.random.Generator
) -> tuple[np.ndarray, int]:
    """``count`` points of a file, [count, 3 or 6], and how many of them are its own."""
    cloud = read_cloud(path)
    if cloud.faces is not None:
        return sample_surface(cloud.points, cloud.faces, count, generator, path)[
            :, : 6 if normals else 3
        ], count
    points = cloud.points
    if normals:
        if cloud.normals is None:
            raise ValueError(f"{path} has no normals; use normals=False, or files that have them")
        points = np.concatenate([points, cloud.normals], axis=1)
    order, own = padded(generator.permutation(len(points)), count)
    return points[order], own


def _listed(path: Path) -> list[tuple[str, str, Path]]:
    """(split, class, file) of every line of a csv list; without a column ``split`` all is for training."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    if not {"path", "label"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{path} has the columns {reader.fieldnames}; expected path,label and maybe split")
    found = []
    seen: dict[Path, int] = {}
    for line in reader:
        name, label, split = ((line.get(key) or "").strip() for key in ("path", "label", "split"))
        where = f"{path}, line {reader.line_num}"
        if not name or not label or "/" in label:
            raise ValueError(f"{where}: path {name!r} and label {label!r}; expected a file and a class name")
        split = split or "train"
        if split not in SPLITS:
            raise ValueError(f"{where}: split {split!r}; expected one of {', '.join(SPLITS)}")
        file = within(path.parent, name, where)
        if seen.setdefault(file, reader.line_num) != reader.line_num:
            raise ValueError(f"{where}: {name!r} is listed again after line {seen[file]}")
        if not is_junk(Path(name)):
            found.append((split, label, file))
    return found


def _no_split(root: Path, split: Split, there: Counter[str], by_list: bool) -> str:
    held = ", ".join(f"{name} ({count} files)" for name, count in there.items()) or "nothing"
    other = next((name for name in SPLITS[2:] if there[name]), None)
    way = f"write {split} in its column split" if by_list else f"put shapes into {split}/<class>/"
    return (
        f"{root} has no shapes of the split {split!r}; it holds {held}. For {split} shapes {way}"
        + (f", or rename {other} to {split}" if other and split == "test" else "")
        + (
            ". A test set is needed, to say how good a network is on shapes that it never saw"
            if split == "test"
            else ""
        )
        + ("" if by_list or there else "." + advice(root))
    )
