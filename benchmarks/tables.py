"""Writes docs/performance.md and the README's table from benchmarks/results/, so that no figure is typed.

A record is what :func:`benchmarks._harness.record` writes. Times stay in the records; the page shows what
was measured side by side: ratios, gaps, agreement, and how far the timings spread. ``runs-*.json``, by
:mod:`benchmarks.runs`, hold accuracies and go to docs/results.md (:mod:`benchmarks.studies`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks import studies
from benchmarks._harness import RESULTS, ROOT, as_markdown, as_text, put_between

PAGE = ROOT / "docs" / "performance.md"
HEAD = """# Performance

Generated from the records in [`benchmarks/results/`](../benchmarks/results) by `python -m benchmarks.tables`;
`make bench` measures again and rewrites this page. Every figure is a ratio of medians measured side by side,
in turns, in one run; *spread* is the distance between the quartiles as a part of the median, the larger of
the two.
"""
README = ROOT / "README.md"


def section(record: Mapping[str, Any], heading: bool = True) -> str:
    """One record as a section of the page; without its heading where it goes on with the one before."""
    machine = record["machine"]
    where = (
        machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads"
    )
    commit = (record["commit"] or "unknown")[:10]
    text = [f"## {record['question']}", ""] if heading else []
    text += [f"{where}; torch {machine['versions'].get('torch')}; commit `{commit}`; {record['date'][:10]}."]
    settings = ", ".join(f"{key}: {as_text(value)}" for key, value in record["notes"].items())
    text += [f"Settings: {settings}.", ""] if settings else [""]
    text += [as_markdown(record["rows"])]
    if record["skipped"]:
        text += ["", "Not measured: " + "; ".join(f"{k} ({v})" for k, v in record["skipped"].items()) + "."]
    return "\n".join(text)


def results() -> str:
    """The README's tables: the demo again and again, and the study of clouds without labels; where there are
    none of these, the study on the CPU. All of them are on the page of results."""
    demo = RESULTS / "runs-demo.json"
    parts = [studies.demo_summary(json.loads(demo.read_text()))] if demo.exists() else []
    for name in ("unlabelled", "cpu"):
        if (RESULTS / name / "study.json").exists() and not (parts and name == "cpu"):
            parts.append(studies.summary(studies.Kept(RESULTS / name)))
    return "\n\n".join(parts) or "There are no records of a study here yet."


def main() -> int:
    """Rewrite the page and the README's results from all records."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if not path.name.startswith("runs-")]
    records = [json.loads(path.read_text()) for path in paths]
    asked = [None, *(record["question"] for record in records)]
    body = [section(record, record["question"] != last) for last, record in zip(asked, records, strict=False)]
    notes = ROOT / "benchmarks" / "notes.md"
    body += [notes.read_text().rstrip()] if notes.exists() else []
    PAGE.write_text("\n\n".join([HEAD.rstrip(), *body]) + "\n")
    put_between(README, "results", results())
    print(f"{PAGE.relative_to(ROOT)} and README.md: {len(records)} benchmarks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
