"""The record of what the conformance suite ran, and the tables in docs/adapters.md that are written from it.

``python -m tests.third_party.table`` writes them again; a test holds the page to the record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._harness import put_between

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "third_party" / "classes.json"
IMPORTS = ROOT / "benchmarks" / "results" / "third_party" / "extensions.json"
PAGE = ROOT / "docs" / "adapters.md"


@dataclass(frozen=True)
class Row:
    """One class: where it is from, and what came of the check on one device.

    ``help`` is empty where the class needs none; ``failure`` is empty where the check passed.
    """

    codebase: str
    commit: str
    label: str
    adapter: str
    feature: str
    layout: str
    channels: int
    local: str
    help: str
    failure: str
    parameters: int
    device: str
    redirected: bool

    @property
    def key(self) -> tuple[str, str, str]:
        return self.codebase, self.label, self.device


def read(path: Path = RECORD) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def keep(rows: Iterable[Row], path: Path = RECORD) -> None:
    """Adds rows to the record; each takes the place of an older one of the same class and device."""
    table = {row.key: row for row in read(path)} | {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(table[key]) for key in sorted(table)], indent=1) + "\n")


def classes(rows: list[Row]) -> str:
    """The table of classes, after a line that counts them."""
    free = [row for row in rows if not row.help and not row.failure]
    unknown = [row for row in free if row.adapter == "generic"]
    local = [row for row in rows if row.local]
    codebases = len({row.codebase for row in rows})
    devices = " and ".join(sorted({"a CPU" if row.device == "cpu" else "a GPU" for row in rows}))
    lines = [
        f"{len(rows)} classes of {codebases} codebases, on {devices}: {len(free)} need no help, "
        f"{len(unknown)} of them through the generic adapter; {sum(bool(row.failure) for row in rows)} do "
        f"not pass; {len(local)} have local features.",
        "",
        "| codebase | class | classifier | local features | help needed |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = row.codebase if not row.commit else f"{row.codebase} `{row.commit}`"
        classifier = row.failure or f"`{row.adapter}`: {row.feature}"
        lines.append(f"| {name} | {row.label} | {classifier} | {row.local or '–'} | {row.help or 'none'} |")
    return "\n".join(lines)


def imports(record: Mapping[str, Any]) -> str:
    """The table of extensions that public code imports."""
    lines = [
        f"Of {record['codebases']} codebases so many import each:",
        "",
        "| extension | codebases | stand-in |",
        "|---|---|---|",
    ]
    for name, entry in record["extensions"].items():
        lines.append(f"| `{name}` | {entry['codebases']} | {'yes' if entry['stand_in'] else '–'} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """What stands between each pair of markers of the page."""
    return {"classes": classes(read()), "imports": imports(json.loads(IMPORTS.read_text()))}


def write(path: Path = PAGE) -> None:
    """Writes both tables between the marks of the page."""
    for name, text in tables().items():
        put_between(path, name, text)


if __name__ == "__main__":
    write()
