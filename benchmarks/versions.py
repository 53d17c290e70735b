"""Keeps what the suite came to in an environment of other versions, for docs/reliability.md.

``make test-torch``, ``make test-lowest`` and ``make test-python`` call it when pytest has ended, in their
environment, with pytest's own report. A line with the same environment and the same tests is replaced.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from xml.etree import ElementTree

from benchmarks._harness import commit, record

QUESTION = "Which versions does the suite pass with?"


def counts(report: Path) -> dict[str, int]:
    """How many tests passed, were skipped, and failed, of a JUnit report."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped")}
    failed = sum(int(suite.get(name, 0)) for suite in suites for name in ("failures", "errors"))
    return {
        "passed": total["tests"] - total["skipped"] - failed,
        "skipped": total["skipped"],
        "failed": failed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="the environment: lowest, torch-2.6.0, python3.13")
    parser.add_argument("--report", type=Path, required=True, help="what pytest --junitxml wrote")
    parser.add_argument("--tests", default="", help="the part of the suite that was run; default: all of it")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "timm")}
    row = {
        "environment": options.name,
        "python": platform.python_version(),
        **versions,
        "tests": re.sub(r"\btests/", "", options.tests) or "all",
        **counts(options.report),
        "commit": (commit() or "unknown")[:10],
    }
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    same = ("environment", "tests")
    rows = [old for old in rows if any(old[key] != row[key] for key in same)] + [row]
    rows.sort(key=lambda row: [row[key] for key in same])
    commands = "make test-lowest, make test-python PYTHON=python3.13, make test-torch TORCH=2.6.0"
    record(options.out, QUESTION, rows, notes={"commands": commands})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
