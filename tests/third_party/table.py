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


def markdown(rows: list[Row]) -> str:
    lines = [
        "| codebase | checked | class | adapter | feature | parameters | ran on |",
        "|---|---|---|---|---|---|---|",
    ]
    merged: dict[tuple[str, str], Row] = {}
    devices: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        key = (row.codebase, row.label)
        merged[key] = row
        devices.setdefault(key, []).append(f"{row.device.upper().replace('CUDA', 'GPU')}{row.how}")
    for key, row in merged.items():
        lines.append(
            f"| {row.codebase} | `{row.commit}` | {row.label} | `{row.adapter}` | {row.feature} | "
            f"{row.parameters / 1e6:.2f} M | {', '.join(devices[key])} |"
        )
    return "\n".join(lines)


def write(path: Path, rows: list[Row]) -> None:
    """Replaces what is between the markers in the file.

    Raises:
        ValueError: the file has no markers, or nothing ran.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no line {BEGIN!r} followed by {END!r}")
    if not rows:
        raise ValueError("no conformance test passed, so there is nothing to write")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.write_text(f"{before}{BEGIN}\n{markdown(rows)}\n{END}{after}")
