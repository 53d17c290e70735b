"""What lies in a folder that is no data set, in words, and what would make it one."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

from pointcmt.data.clouds import SUFFIXES
from pointcmt.data.files import is_junk

SPLITS = ("train", "test", "val", "valid", "validation")
"""Folders whose classes count; the first two are read."""

_PACKED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_OTHER_NAMES = {"training": "train", "testing": "test", "trainset": "train", "testset": "test"}
_MOST = 100_000  # files that are looked at


def advice(root: Path) -> str:
    """What was found below ``root`` and what to do, where it is not ``<split>/<class>/*``: a sentence for the
    end of a message, '' where nothing is to be said."""
    if not root.is_dir():
        return ""
    groups: Counter[tuple[tuple[str, ...], str]] = Counter()
    examples: dict[tuple[tuple[str, ...], str], Path] = {}
    for path in itertools.islice(root.rglob("*"), _MOST):
        below = path.relative_to(root)
        if is_junk(below) or not path.is_file():
            continue
        kind = tuple(_kind(part) for part in below.parts[:-1])
        suffix = path.suffix.lower()
        group = kind, "cloud" if suffix in SUFFIXES else "packed" if suffix in _PACKED else suffix
        groups[group] += 1
        examples[group] = min(below, examples.get(group, below))
    clouds = {group: count for group, count in groups.items() if group[1] == "cloud"}
    for group in sorted(clouds or groups, key=lambda group: -groups[group]):
        if (words := _what_to_do(*group, examples[group], root)) is not None:
            count = groups[group]
            files = "1 file" if count == 1 else f"{count} files"
            return f" There {'is' if count == 1 else 'are'} {files} such as {examples[group]}: {words}."
    return ""


def _kind(folder: str) -> str:
    name = folder.lower()
    return "split" if (_OTHER_NAMES.get(name, name)) in SPLITS else "folder"


def _what_to_do(kind: tuple[str, ...], what: str, example: Path, root: Path) -> str | None:
    """Of files in folders of these kinds; None where they lie as they should, or say nothing."""
    if what == "packed":
        return "unpack it, and give the folder"
    if what != "cloud":
        in_place = kind == ("split", "folder")
        known = f"expected {', '.join(SUFFIXES)}: convert them"
        return f"{what or 'a file without a suffix'} is of no known format; {known}" if in_place else None
    parts = example.parts
    folder = parts[0] if parts else ""
    if kind == ("split", "folder"):
        name = _OTHER_NAMES.get(folder.lower(), folder.lower())
        return None if folder == name else f"rename the folder {folder} to {name}"
    if kind == ("folder", "split"):
        return (
            f"class before split; expected split before class: move {folder}/{parts[1]} to "
            f"{parts[1]}/{folder}, and so each class"
        )
    if kind[:2] == ("split", "folder"):
        return (
            f"a folder too deep; expected <split>/<class>/*: move the files of {'/'.join(parts[:-1])} to "
            f"{'/'.join(parts[:2])}, and so on, or write a csv list with the columns path,label,split"
        )
    if kind[1:3] == ("split", "folder") or kind[1:3] == ("folder", "split"):
        return f"the data set seems to be {root / folder}: give that folder"
    if kind == ("split",):
        return f"no folders of classes; expected <split>/<class>/*: put each into {folder}/<class>/"
    if kind == ("folder",):
        return (
            f"folders of classes and no splits; expected <split>/<class>/*: put some of each into "
            f"train/{folder}/ and the others into test/{folder}/, or write a csv list with the columns "
            "path,label,split"
        )
    if not kind:
        return (
            "no folders; expected <split>/<class>/*, or a csv list with the columns path,label,split, which "
            "says the class of each file"
        )
    return "expected <split>/<class>/*, or a csv list with the columns path,label,split"
