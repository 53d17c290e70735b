"""What every reader of files shares: text as UTF-8, lists of names, and which files are not data at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pointcmt.views.mesh_files import folded, is_junk

__all__ = [
    "folded",
    "is_junk",
    "name_of",
    "read_json",
    "read_lines",
    "read_names",
    "read_text",
    "same_files",
    "within",
]


def same_files(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names whose files would be one on some systems (see :func:`folded`)."""
    first: dict[str, str] = {}
    return [(other, name) for name in names if (other := first.setdefault(folded(name), name)) != name]


def name_of(part: str) -> str:
    """The name of a file or folder as UTF-8, also where the locale made Python read it otherwise."""
    return os.fsencode(part).decode("utf-8", "surrogateescape")


def read_text(path: Path) -> str:
    """A text file as UTF-8, whatever the locale; a byte-order mark is dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def read_json(path: Path) -> Any:
    """A JSON file; damage is a ``ValueError`` that names the file."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download it again") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, text without blanks around it) of every line that is not blank."""
    # not splitlines(): a name may hold what it takes for an end, such as U+2028
    lines = enumerate(re.split(r"\r\n|\r|\n", read_text(path)), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_names(path: Path) -> list[str]:
    """Names, one per line, in label order; a name may hold blanks (``house cat``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name twice, no name at all, or not UTF-8.
    """
    first: dict[str, int] = {}
    for number, name in read_lines(path):
        if name in first:
            raise ValueError(
                f"{path}, line {number}: {name!r} is named again after line {first[name]}, so every later "
                "label would shift; name each class once"
            )
        first[name] = number
    if not first:
        raise ValueError(f"{path} is empty; expected one name per line, in label order")
    return list(first)


def within(root: Path, name: str, listed: str) -> Path:
    """``root / name``, for a ``name`` that some list gives.

    Raises:
        ValueError: the name is absolute or climbs out of ``root``; ``listed`` says where it stands.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{listed} names {name!r}; expected a path inside {root}, without '..'")
    return root / path
