"""Which data sets there are: each registers itself, and is recognised by what its folder holds."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pointcmt.data.checks import Up
from pointcmt.data.dataset import PointDataset
from pointcmt.data.survey import advice

ENTRY_POINT_GROUP = "pointcmt.datasets"


@dataclass(frozen=True)
class DatasetEntry:
    """A registered data set.

    Attributes:
        name: what ``--dataset`` calls it.
        build: makes one split: ``build(root=…, split=…, …) -> PointDataset``. It is given those of the
            options of :class:`~pointcmt.data.DataOptions` that it has parameters for, under the names in
            :data:`ARGUMENTS`.
        matches: ``folder -> bool``, whether a folder holds it; None: it is never taken for it, only named.
        layout: what its folder looks like, in one line, for messages.
        up: the axis that points up, where the set that ``build`` returns does not say; None: not known.
    """

    name: str
    build: Callable[..., PointDataset]
    matches: Callable[[Path], bool] | None
    layout: str
    up: Up | None

    def takes(self, argument: str) -> bool:
        """Whether ``build`` has a parameter of that name."""
        parameters = inspect.signature(self.build).parameters
        return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


# every argument that a data set's `build` may have, and what it means
ARGUMENTS = {
    "root": "Path: the folder",
    "split": "'train' or 'test'",
    "num_points": "int: points per cloud",
    "dense_points": "int or None: points per shape that views are projected from (view_points)",
    "per_class": "int or None: shapes per class; where `build` lacks it, a part of the whole is taken",
    "seed": "int: draws all that is made by chance",
    "normals": "bool: points with their unit normals, [N, 6]",
    "normalize": "bool or None: into the unit sphere; None as is usual for the set",
    "cache_dir": "Path or None: keeps what is slow to make",
    "up": "'x', 'y', 'z' or None: the axis that points up, where the user says it",
    "variant": "str: variant of ScanObjectNN",
    "voxel": "float or None: edge of the cubes that rooms are thinned to",
    "skip_broken": "bool: leave out what cannot be read, and say so",
}

_entries: dict[str, DatasetEntry] = {}
_loaded = False

Build = TypeVar("Build", bound=Callable[..., Any])


def register_dataset(
    name: str,
    *,
    matches: Callable[[Path], bool] | None = None,
    layout: str = "",
    up: Up | None = None,
) -> Callable[[Build], Build]:
    """Make a class or function that builds a set known by ``name``; it is returned as it is.

    The whole of adding a data set is one file: in this folder, in a module that ``--import`` names, or in a
    package with an entry point in the group ``pointcmt.datasets``::

        @register_dataset("blobs", matches=lambda folder: (folder / "blobs.npy").is_file(), up="z")
        def blobs(root, split, num_points):
            points = np.load(root / "blobs.npy")[:, :num_points]
            ...
            return PointDataset(points, labels, class_names, shape_ids)

    Args:
        name, matches, layout, up: see :class:`DatasetEntry`.

    Raises:
        ValueError: the name is taken, or ``auto``.
    """

    def register(build: Build) -> Build:
        known = _entries.get(name)
        if name == "auto" or not name or (known is not None and _origin(known.build) != _origin(build)):
            raise ValueError(f"a data set named {name!r} is there already; give it another name")
        _entries[name] = DatasetEntry(name, build, matches, layout, up)
        return build

    return register


def unregister_dataset(name: str) -> None:
    """Forget a data set; unknown names are ignored."""
    _entries.pop(name, None)


def datasets() -> dict[str, DatasetEntry]:
    """All registered data sets by name, those of other packages included."""
    global _loaded
    if not _loaded:
        _loaded = True
        package = importlib.import_module("pointcmt.data")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"pointcmt.data.{module.name}")
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            try:
                point.load()
            except Exception as error:  # anything may be wrong with somebody else's package
                warnings.warn(
                    f"the data sets of {point.value} cannot be loaded: {error!r}",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return dict(sorted(_entries.items()))


def find_dataset(name: str) -> DatasetEntry:
    """The data set of a name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    known = datasets()
    if name not in known:
        raise ValueError(
            f"there is no data set {name!r}; known: auto, {', '.join(known)}. Others are registered by "
            "@register_dataset in a module that --import names"
        )
    return known[name]


def recognise(root: Path) -> DatasetEntry:
    """The data set that a folder (or file) holds.

    Raises:
        FileNotFoundError: no such folder, or none that any data set knows; the message lists what was tried.
        ValueError: more than one knows it.
    """
    known = {name: entry for name, entry in datasets().items() if entry.matches is not None}
    layouts = "".join(f"\n  {name}: {entry.layout}" for name, entry in known.items() if entry.layout)
    if not root.exists():
        raise FileNotFoundError(
            f"--data {root}: there is no such folder. Give the folder of a data set, or `synthetic` for the "
            f"shapes that come with the package. Known:{layouts}"
        )
    found = [entry for entry in known.values() if entry.matches is not None and entry.matches(root)]
    if len(found) > 1:
        raise ValueError(
            f"--data {root} holds more than one data set: give --dataset "
            f"{' or '.join(entry.name for entry in found)}"
        )
    if not found:
        content = sorted(path.name for path in root.iterdir()) if root.is_dir() else [root.name]
        shown = ", ".join(content[:8]) + (", …" if len(content) > 8 else "") or "nothing"
        raise FileNotFoundError(
            f"--data {root} holds {shown}, and no known data set.{advice(root)} Known:{layouts}"
        )
    return found[0]


def _origin(build: Callable[..., Any]) -> tuple[str, str]:
    return build.__module__, build.__qualname__
