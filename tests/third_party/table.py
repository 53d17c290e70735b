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
    "| codebase | checked | class | adapter | feature | parameters | CPU | GPU |",
    "|---|---|---|---|---|---|---|---|",
)
DEVICES = ("cpu", "cuda")  # one column each, the last ones
NOT_RUN = "not yet"


def cells(row: Row) -> list[str]:
    ran = f"passed{row.how}"
    return [
        row.codebase,
        f"`{row.commit}`",
        row.label,
        f"`{row.adapter}`",
        row.feature,
        f"{row.parameters / 1e6:.2f} M",
        *(ran if row.device == device else NOT_RUN for device in DEVICES),
    ]


def merged(before: list[list[str]], rows: list[Row]) -> list[list[str]]:
    """What passed now takes the place of what passed before; a device adds to others of the same commit."""
    n = len(DEVICES)
    table = {(old[0], old[2]): old for old in before}
    for row in rows:
        new = cells(row)
        old = table.get((row.codebase, row.label))
        if old is not None and old[:-n] == new[:-n]:
            new[-n:] = [b if b != NOT_RUN else a for a, b in zip(old[-n:], new[-n:], strict=True)]
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
