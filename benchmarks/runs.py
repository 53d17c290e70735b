"""Keeps what finished runs measured: ``python -m benchmarks.runs runs/mine --command "pointcmt train …"``.

``python -m benchmarks.studies`` writes these records (``runs-*.json``) into docs/results.md. That of the
demo is by :mod:`benchmarks.demo`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks._harness import RESULTS, record
from pointcmt.studies.charts import HEADINGS
from pointcmt.studies.demo import measure_together
from pointcmt.studies.report import compare, find_runs


def main(argv: list[str] | None = None) -> int:
    """Write the record of the runs below a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runs", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="a folder of run folders: teacher, plain and taught students"
    )
    parser.add_argument("--command", required=True, help="what reproduces the runs")
    parser.add_argument("--what", help="one sentence on the runs; default: the command")
    parser.add_argument("--out", type=Path, help="the record; default: benchmarks/results/runs-<folder>.json")
    options = parser.parse_args(argv)
    # each run timed its own student, at another minute of the machine: time them in turns
    measure_together([run.path for run in find_runs(options.folder) if run.command == "train"])
    entries = compare(find_runs(options.folder))
    rows = [
        dict(zip(HEADINGS, entry.cells(), strict=True)) | {"seeds": len(entry.oa), "OA by seed": entry.oa}
        for entry in entries
    ]
    out = options.out or RESULTS / f"runs-{options.folder.name}.json"
    record(out, options.what or options.command, rows, notes={"command": options.command})
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
