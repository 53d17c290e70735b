"""The table of what the conformance suite ran, in a Markdown file, between two markers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BEGIN = "<!-- conformance: begin (written by the suite, see docs/adapters.md) -->"
END = "<!-- conformance: end -->"


@dataclass(frozen=True)
class Row:
    """One class: where it is from, its adapter, and on which device it passed."""

    codebase: str
    commit: str
    label: str
    adapter: str
    feature: str
    parameters: int
    device: str
    how: str


HEADER = (
    "| codebase | checked | class | adapter | feature | parameters | ran on |",
    "|---|---|---|---|---|---|---|",
)


def cells(row: Row) -> list[str]:
    device = {"cuda": "GPU"}.get(row.device, row.device.upper())
    return [
        row.codebase,
        f"`{row.commit}`",
        row.label,
        f"`{row.adapter}`",
        row.feature,
        f"{row.parameters / 1e6:.2f} M",
        f"{device}{row.how}",
    ]


def merged(before: list[list[str]], rows: list[Row]) -> list[list[str]]:
    """What passed now takes the place of what passed before; a device adds to others of the same commit."""
    table = {(old[0], old[2]): old for old in before}
    for row in rows:
        new = cells(row)
        old = table.get((row.codebase, row.label))
        if old is not None and old[:-1] == new[:-1]:
            devices = [*old[-1].split(", "), new[-1]]
            new[-1] = ", ".join(sorted(set(devices)))
        table[row.codebase, row.label] = new
    return [table[key] for key in sorted(table)]


def write(path: Path, rows: list[Row]) -> None:
    """Puts the rows into the table between the markers of the file, and keeps its other rows.

    Raises:
        ValueError: the file has no markers, or nothing ran.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no line {BEGIN!r} followed by {END!r}")
    if not rows:
        raise ValueError("no conformance test passed, so there is nothing to write")
    start, rest = text.split(BEGIN, 1)
    between, end = rest.split(END, 1)
    lines = [line for line in between.strip().splitlines() if line not in HEADER]
    before = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    body = [f"| {' | '.join(row)} |" for row in merged(before, rows)]
    path.write_text("\n".join([start + BEGIN, *HEADER, *body, END + end]))
