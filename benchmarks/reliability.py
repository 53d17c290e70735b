"""Writes docs/reliability.md from the records of what was broken on purpose, so that no figure is typed.

``python -m benchmarks.reliability``. A record is what :func:`benchmarks._harness.record` writes; that of
``make fuzz`` is in benchmarks/results/reliability/, that of ``make exhaust`` above it.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks._harness import RESULTS, ROOT
from benchmarks.tables import section

PAGE = ROOT / "docs" / "reliability.md"
RECORDS = (RESULTS / "reliability", RESULTS / "emd-exhaust.json")
HEAD = """# Reliability

Generated from records by `python -m benchmarks.reliability`. `make fuzz MINUTES=10` damages files and reads
them; `make exhaust` compares the EMD with the exact optimum. Both go on where they were, and give a wrong
case's number, by which it is run again alone. `make kill MINUTES=10` kills every recipe, fills its disk and
resumes it; `python -m benchmarks.longrun` trains for long. Short forms of all four are in `make test`.

`make sanitize` runs the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and with `THREAD=1`
with ThreadSanitizer, which must first report a race on purpose; `make test-lowest`,
`make test-python PYTHON=python3.13` and `make test-torch TORCH=2.6.0` run the suite on other versions.
"""


def page() -> str:
    """The page of all records that there are."""
    paths: list[Path] = [*sorted(RECORDS[0].glob("*.json")), RECORDS[1]]
    records = [json.loads(path.read_text()) for path in paths if path.exists()]
    return "\n\n".join([HEAD.rstrip(), *map(section, records)]) + "\n"


def main() -> int:
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
