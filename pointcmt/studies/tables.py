"""What the records of a study say: paired differences with their intervals, a table, a chart.

A record is the JSON of one finished cell, as :func:`pointcmt.studies.ablate.run_cell` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pointcmt.recipes.config import read_json
from pointcmt.studies.charts import Row

Record = Mapping[str, Any]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of all finished cells of a study."""
    return [read_json(path) for path in sorted((folder / "records").glob("[!.]*.json"))]


def read_teachers(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a study's teachers, by name."""
    return {path.stem: read_json(path) for path in sorted((folder / "records/teachers").glob("[!.]*.json"))}


def paired_interval(differences: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Mean and half-width of Student's t-interval of paired differences; None for fewer than two."""
    if len(differences) < 2:
        return None
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return float(differences.mean()), float(stats.t.ppf(0.5 + level / 2, len(differences) - 1) * error)


def p_value(differences: np.ndarray) -> float:
    """Of the two-sided t-test of paired differences; 1 for fewer than two, 0 where all are the same but 0."""
    if len(differences) < 2:
        return 1.0
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several tests stand when all are taken together (Holm 1979): of m p-values the smallest is
    compared with ``level``/m, the next with ``level``/(m-1), …, until one fails."""
    stand = [False] * len(values)
    for tried, place in enumerate(np.argsort(values, kind="stable")):
        if values[place] > level / (len(values) - tried):
            break
        stand[place] = True
    return stand


def accuracy(record: Record, test: str) -> float | None:
    """Last-epoch OA in % on a test set (``test`` is the data's own); None where it was not measured."""
    if test == "test":
        return record["last"]["test_oa"]
    return record["tests"].get(test, {}).get("oa")


def test_sets(records: Sequence[Record]) -> list[str]:
    """The test sets that there are figures of, the data's own first."""
    return ["test", *dict.fromkeys(test for record in records for test in record["tests"])]


def rows_of(
    records: Sequence[Record],
    students: Sequence[str],
    methods: Sequence[str],
    teachers: Sequence[str],
    baseline: str = "none",
    paper: Mapping[str, Mapping[str, float]] | None = None,
    tests: Sequence[str] | None = None,
) -> list[Row]:
    """One row per student, method and teacher that there are records of, in the order given, with the paired
    difference to the baseline of the same seeds."""
    rows = []
    for student in students:
        ours = [record for record in records if record["student"] == student]
        plain = {r["seed"]: r for r in ours if r["method"] == baseline}
        for method in methods:
            for teacher in (None, *teachers):
                mine = {r["seed"]: r for r in ours if (r["method"], r["teacher"]) == (method, teacher)}
                if not mine:
                    continue
                ordered = [mine[seed] for seed in sorted(mine)]
                known, difference, p = {}, {}, {}
                for test in test_sets(records) if tests is None else tests:
                    values = {r["seed"]: accuracy(r, test) for r in ordered}
                    found = [value for value in values.values() if value is not None]
                    if found:
                        known[test] = found
                    pairs = [
                        (value, before)
                        for seed, value in values.items()
                        if seed in plain
                        and value is not None
                        and (before := accuracy(plain[seed], test)) is not None
                    ]
                    if method != baseline and pairs:
                        apart = np.array([a - b for a, b in pairs])
                        difference[test], p[test] = paired_interval(apart), p_value(apart)
                rows.append(
                    Row(
                        student,
                        method,
                        teacher,
                        known,
                        [r["best"]["test_oa"] for r in ordered],
                        difference,
                        (paper or {}).get(student, {}).get(method),
                        ordered[0].get("teacher_oa"),
                        p,
                    )
                )
    return rows


def table_of(rows: Sequence[Row], tests: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table, as the terminal and the pages show it."""
    headings = ["student", "method", "teacher", "teacher OA %", "seeds"]
    for test in tests:
        headings += [f"{test} OA %", "difference"]
    headings += ["best epoch OA %", "paper"]
    lines = []
    compared = [(at, test) for at, row in enumerate(rows) for test in tests if row.difference.get(test)]
    stand = dict(zip(compared, holm([rows[at].p.get(test, 1.0) for at, test in compared]), strict=True))
    for at, row in enumerate(rows):
        known = "–" if row.teacher_oa is None else f"{row.teacher_oa:.1f}"
        line = [row.student, row.method, row.teacher or "", known, str(len(row.best))]
        for test in tests:
            values = row.oa.get(test)
            interval = interval_text(row.difference.get(test), stand.get((at, test), False))
            line += [mean_sd(values) if values else "–", interval]
        line += [mean_sd(row.best), "–" if row.paper is None else f"{row.paper:.1f}"]
        lines.append(line)
    dropped = []
    if not any(row.teacher_oa is not None for row in rows):
        dropped.append(3)
    if not any(row.teacher for row in rows):
        dropped.append(2)
    if not any(row.paper is not None for row in rows):
        dropped.append(len(headings) - 1)
    keep = [place for place in range(len(headings)) if place not in dropped]
    return [headings[k] for k in keep], [[line[k] for k in keep] for line in lines]


def interval_text(interval: tuple[float, float] | None, stands: bool = False) -> str:
    """``+1.20 ± 0.40``; bold where the interval excludes zero, † where it ``stands`` among others too."""
    if interval is None:
        return "–"
    text = f"{interval[0]:+.2f} ± {interval[1]:.2f}"
    return f"**{text}**{' †' * stands}" if excludes_zero(interval) else text


def excludes_zero(interval: tuple[float, float]) -> bool:
    """Whether zero is outside mean ± half-width."""
    return abs(interval[0]) > interval[1]


def mean_sd(values: Sequence[float]) -> str:
    """``mean ± standard deviation`` of several values, or the one."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def notes(records: Sequence[Record], baseline: str, paper: bool) -> list[str]:
    """What a reader of the table has to know."""
    said = [
        "Overall accuracy in %, last epoch, mean ± standard deviation over the seeds; difference to "
        f"{baseline}, paired by seed, with the 95 % t-interval (bold: it excludes zero; †: also when all "
        "differences of the table are taken together, by Holm's correction).",
        f"Best epoch: chosen by {records[0]['best']['chosen_by']}.",
    ]
    if paper:
        said.append("Paper: Yan et al. 2022, full data and schedule; not the setting of this study.")
    return said
