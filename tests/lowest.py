"""Prints the lowest version of every dependency that a pyproject.toml allows, as constraints for pip."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def lowest(pyproject: Path) -> list[str]:
    """``name==version`` (with its marker) of all requirements but those for development alone.

    Raises:
        ValueError: a requirement has no lower bound, so that any version ever published would be allowed.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(r for name in extras if name not in ("dev", "test") for r in extras[name]),
    ]
    for requirement in wanted:
        if requirement.partition(";")[0].count(">=") != 1:
            raise ValueError(f"{pyproject}: {requirement!r} has no lower bound; write it as NAME>=VERSION")
    return [requirement.replace(">=", "==") for requirement in wanted]


if __name__ == "__main__":
    print("\n".join(lowest(Path(sys.argv[1]))))
