"""Writes docs/results.md from the records of studies: ``python -m benchmarks.studies``. No figure is typed.

A study is a folder of ``benchmarks/results`` as ``pointcmt ablate --out`` leaves it: ``study.json``,
``records/`` and, by ``pointcmt robustness --out``, ``robustness.json``. :func:`keep` copies these from where
a study was run: ``python -m benchmarks.studies --keep runs/cpu``. Charts are drawn beside the page; the page
is the same byte for byte whenever the records are.

``benchmarks/results/in-short.md`` stands at the top of the page, and
``benchmarks/results/notes.md`` says what was tried, in words. Their figures are placeholders, filled in from
records; a decimal or a per cent in its own words is an error:

    {{difference STUDY student=S method=M teacher=T test=X}}    paired difference, with interval
    {{pooled STUDY method=M teacher=T test=X}}              the same, the mean over all students
    {{oa STUDY student=S method=M teacher=T test=X}}            mean ± standard deviation
    {{heldout STUDY student=S method=M teacher=T}}              the same on the held-out shapes
    {{teacher STUDY NAME}}                                      the teacher's test accuracy
    {{table STUDY}}                                             the whole table of a study
    {{rows NAME}}                                               the rows of explore/NAME.json as a table
    {{value NAME COLUMN KEY=VALUE …}}                           one cell of it: of the row with these values
    {{demo mean}}, {{demo sure}}                                the repeated demo's gain; how sure it is

STUDY is a folder below ``benchmarks/results``; explorations lie in ``explore/``, where ``NAME.json`` is what
:func:`benchmarks._harness.record` writes.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pretraining
from benchmarks._harness import RESULTS, ROOT, as_markdown, as_text
from pointcmt.studies.charts import Row, save_robustness, save_rows
from pointcmt.studies.robustness import curves
from pointcmt.studies.tables import (
    accuracy,
    excludes_zero,
    holm,
    interval_text,
    markdown,
    mean_sd,
    notes,
    p_value,
    paired_interval,
    read_records,
    read_teachers,
    rows_of,
    table_of,
    test_sets,
)

PAGE = ROOT / "docs" / "results.md"
HEAD = """# Results

Generated from the records in [`benchmarks/results/`](../benchmarks/results) by
`python -m benchmarks.studies`. Accuracy is that after the last epoch, in one pass, unless a column says
otherwise; differences are paired by seed.
"""


class Kept:
    """A study as its records tell it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        described = json.loads((folder / "study.json").read_text())
        self.about = str(described.get("about") or "")
        self.fixed, self.named = described["fixed"], described["named"]
        self.baseline, self.paper = described["baseline"], described["paper"]
        self.records, self.teachers = read_records(folder), read_teachers(folder)
        if not self.records:
            raise ValueError(f"{folder} has a study.json and no record of a cell")
        self.tests = test_sets(self.records)
        self.students = [s for s in self.named["students"] if any(r["student"] == s for r in self.records)]
        self.methods = list(self.named["methods"])
        self.taught_by = [t for t in self.named["teachers"] if any(r["teacher"] == t for r in self.records)]

    def rows(self, student: str | None = None) -> list[Row]:
        students = self.students if student is None else [student]
        return rows_of(
            self.records, students, self.methods, self.taught_by, self.baseline, self.paper, self.tests
        )

    def row(self, student: str, method: str, teacher: str | None) -> Row:
        for row in self.rows(student):
            if (row.method, row.teacher) == (method, teacher):
                return row
        raise ValueError(
            f"{self.name} has no record of student {student}, method {method}, teacher {teacher}"
        )


def summary(study: Kept) -> str:
    """One study for the README: for each method, what it adds to every student on the data's own test set."""
    title, _, text = study.about.strip().partition("\n")
    plain = [study.row(student, study.baseline, None) for student in study.students]
    several = len(study.students) > 1
    pairs = [(m, t) for m in study.methods for t in study.taught_by]
    tested = {(r.student, r.method, r.teacher): r.p["test"] for r in study.rows() if "test" in r.p}
    if several:
        tested |= {("", m, t): p_value(gains) for m, t in pairs if len(gains := pooled(study, m, t, "test"))}
    stand = dict(zip(tested, holm(list(tested.values())), strict=True))
    lines = [[study.baseline, ""] + [mean_sd(row.oa["test"]) for row in plain] + [""] * several]
    for method in study.methods:
        for teacher in study.taught_by:
            line = [method, f"{teacher}, {study.teachers[teacher]['last']['test_oa']:.1f}"]
            for student in study.students:
                found = [r for r in study.rows(student) if (r.method, r.teacher) == (method, teacher)]
                stands = stand.get((student, method, teacher), False)
                line.append(interval_text(found[0].difference.get("test"), stands) if found else "–")
            if several:
                interval = paired_interval(pooled(study, method, teacher, "test"))
                line.append(interval_text(interval, stand.get(("", method, teacher), False)))
            if any(piece != "–" for piece in line[2:]):
                lines.append(line)
    seeds = [len(row.best) for row in plain]
    headings = ["method", "teacher, its OA %", *study.students] + ["mean of these"] * several
    count = f"{min(seeds)}" if len(set(seeds)) == 1 else f"{min(seeds)} to {max(seeds)}"
    return (
        f"{title}. {' '.join(text.split())} `pointcmt ablate --config benchmarks/configs/{study.name}.yaml`; "
        f"{count} seeds. First line: OA in % of the plain student; below: what a method adds to it, in "
        f"points, paired by seed, with the 95 % interval; bold where that excludes zero, † where it does so "
        f"among all {len(tested)} differences of the table (Holm). All of it: "
        "[docs/results.md](docs/results.md).\n\n" + markdown(headings, lines).rstrip()
    )


def demo_summary(record: Mapping[str, Any]) -> str:
    """The demo, repeated with other seeds and shapes (:mod:`benchmarks.demo`), for the README."""
    rows, notes_ = record["rows"], record["notes"]
    seeds = [row["OA by seed"] for row in rows]
    means = {key: mean_sd([v for row in seeds for v in row[key]]) for key in ("plain", "taught", "teacher")}
    few, rest = notes_["labelled shapes"], notes_["shapes without labels"]
    return (
        f"`make demo`: {few} labelled synthetic shapes, {rest} without labels; the teacher learns from "
        f"images of the same {few}, made of the points. {len(rows)} repetitions, each with other shapes, "
        f"another teacher and {notes_['students of each kind']} seeds (`python -m benchmarks.demo`). "
        f"OA in %: plain student {means['plain']}, student that the images taught {means['taught']}, "
        f"image teacher {means['teacher']}. {demo_verdict(record)}"
    )


def demo_gains(rows: Sequence[Mapping[str, Any]]) -> tuple[list[np.ndarray], int]:
    """Taught minus plain by seed, for each repetition; and of how many the interval is above zero."""
    gains = [np.array(row["OA by seed"]["taught"]) - np.array(row["OA by seed"]["plain"]) for row in rows]
    intervals = [paired_interval(gain) for gain in gains]
    return gains, sum(one is not None and one[0] > one[1] for one in intervals)


def demo_verdict(record: Mapping[str, Any]) -> str:
    """How sure the demo's gain is, in two sentences."""
    gains, above = demo_gains(record["rows"])
    means = [float(gain.mean()) for gain in gains]
    smallest = interval_text(paired_interval(gains[int(np.argmin(means))])).replace("*", "")
    return (
        f"Taught minus plain: {np.mean(means):+.1f} points on average over the repetitions, from "
        f"{min(means):+.1f} to {max(means):+.1f}. The 95 % interval over the seeds of one repetition is "
        f"above zero in {above} of {len(gains)} (that of the smallest gain: {smallest})."
    )


def demo_cell(which: str) -> str:
    """The mean gain of the repeated demo with its interval over the repetitions, or how sure each is."""
    rows = json.loads((RESULTS / "runs-demo.json").read_text())["rows"]
    gains, above = demo_gains(rows)
    found = {
        "mean": interval_text(paired_interval(np.array([gain.mean() for gain in gains]))),
        "sure": f"above zero in {above} of {len(rows)} repetitions of {len(gains[0])} seeds each",
    }
    return found[which]


def section(study: Kept) -> str:
    """One study as a part of the page."""
    title, _, text = study.about.strip().partition("\n")
    parts = [f"## {title or study.name}", text.strip(), setting(study), cost(study)]
    parts += [teacher_table(study)] if study.teachers else []
    for student in study.students:
        headings, lines = table_of(study.rows(student), study.tests)
        parts += [f"### {student}", markdown(headings[1:], [line[1:] for line in lines]).rstrip()]
        compared = sum(
            line[at] != "–" for line in lines for at, h in enumerate(headings) if h == "difference"
        )
        parts += [f"{compared} differences in this table."]
        parts += ["\n".join(f"- {sentence}" for sentence in verdicts(study, student))]
    if len(study.students) > 1:
        parts += ["### Over all students", over_students(study)]
    parts += [
        "\n".join(f"{note}  " for note in notes(study.records, study.baseline, bool(study.paper))).rstrip()
    ]
    parts += [f"![Accuracy of every student under every method](images/results-{study.name}.png)"]
    if (study.folder / "robustness.json").exists():
        parts += ["### Robustness", robustness_text(study)]
    return "\n\n".join(part for part in parts if part)


def setting(study: Kept) -> str:
    """What was trained on what, and by which command."""
    data = study.fixed["data"]
    names = dict.fromkeys(name for record in study.records for name in record["shapes"])
    shapes = {n: one([r["shapes"][n] for r in study.records if n in r["shapes"]]) for n in names}
    config = ROOT / "benchmarks" / "configs" / f"{study.name}.yaml"
    counts = ", ".join(
        f"{shapes[name]} {words}"
        for name, words in (
            ("train", "training shapes"),
            ("unlabelled", "more without labels for the methods that use them"),
            ("heldout", "held out of training"),
            ("test", "test shapes"),
        )
        if name in shapes
    )
    seeds = sorted({record["seed"] for record in study.records})
    text = (
        f"{data['num_points']} points; {counts}; {len(study.students)} "
        f"student{'s' * (len(study.students) > 1)}; {len(study.records)} cells over {len(seeds)} seeds "
        f"({', '.join(map(str, seeds))})."
    )
    if config.exists():
        text += f"\n\n```\npointcmt ablate --config benchmarks/configs/{study.name}.yaml\n```"
    return text


def one(values: Sequence[Any]) -> Any:
    """The value that all share.

    Raises:
        ValueError: they differ.
    """
    if any(value != values[0] for value in values):
        raise ValueError(f"expected one value in all records, found {values[0]} and others")
    return values[0]


def cost(study: Kept) -> str:
    """Where it ran and what it took."""
    everything = [*study.records, *study.teachers.values()]
    places = []
    for gpu in (False, True):
        some = [r for r in everything if bool(r["environment"]["gpu"]) == gpu]
        if not some:
            continue
        machines = sorted(
            {
                r["environment"]["gpu"]
                or f"{r['environment']['processor']}, {r['environment']['cores']} cores"
                for r in some
            }
        )
        cells, teachers = (
            sum(r["seconds" if gpu else "cpu_seconds"] for r in some if ("method" in r) == taught) / 60
            for taught in (True, False)
        )
        unit = "device-minutes" if gpu else "core-minutes"
        versions = sorted({str(r["environment"]["versions"]["torch"]) for r in some})
        commits = sorted({str(r["environment"]["commit"])[:10] for r in some})
        places.append(
            f"On {' and '.join(machines)}; torch {', '.join(versions)}; "
            f"commit{'s' * (len(commits) > 1)} {', '.join(f'`{c}`' for c in commits)}. "
            f"Cost: {cells + teachers:.0f} {unit}, of which the teachers and generators {teachers:.0f}."
        )
    resumed = sum(record["parts"] > 1 for record in everything)
    if resumed:
        places.append(f"Runs that were stopped and resumed, or given a further test set later: {resumed}.")
    per_student = []
    for student in study.students:
        mine = [r for r in study.records if r["student"] == student]
        gpu = bool(mine[0]["environment"]["gpu"])
        minutes = np.mean([r["seconds" if gpu else "cpu_seconds"] for r in mine]) / 60
        per_student.append(f"{student} {minutes:.1f}")
    unit = "device-minutes" if study.records[0]["environment"]["gpu"] else "core-minutes"
    places.append(f"Mean cost of a cell in {unit}: {', '.join(per_student)}.")
    return "\n".join(places)


def teacher_table(study: Kept) -> str:
    """The teachers and what they know."""
    lines = []
    for name in study.named["teachers"]:
        if name not in study.teachers:
            continue
        record = study.teachers[name]
        views = record["views"] or {}
        generator = record["generator"] or {}
        lines.append(
            [
                name,
                str(record["shapes"]["train"]),
                str(views.get("rig", "images")),
                str(views.get("size", "")),
                f"{record['last']['test_oa']:.1f}",
                f"{record['best']['test_oa']:.1f}",
                f"{generator['test_emd']:.4f}" if "test_emd" in generator else "–",
            ]
        )
    headings = [
        "teacher",
        "labelled shapes",
        "views",
        "size",
        "test OA %",
        "best epoch OA %",
        "generator's test EMD",
    ]
    return "\n\n".join([markdown(headings, lines).rstrip(), *trained_again(study)])


def trained_again(study: Kept) -> list[str]:
    """A sentence for each teacher that was trained more than once, from the fingerprints in the records."""
    sentences = []
    for name in study.taught_by:
        copies: dict[str, dict[str, None]] = {}  # students by fingerprint, in order
        scores = {}
        for student in study.students:
            for record in study.records:
                if (record["student"], record["teacher"]) == (student, name):
                    copy = record["inputs"]["teacher"]
                    copies.setdefault(copy, {})[student] = None
                    scores[copy] = record["teacher_oa"]
        if len(copies) > 1:
            each = "; ".join(
                f"{', '.join(who)} by one with {scores[copy]:.1f}" for copy, who in copies.items()
            )
            sentences.append(f"`{name}` was trained {len(copies)} times by this recipe: taught were {each}.")
    return sentences


def verdicts(study: Kept, student: str) -> list[str]:
    """For each teacher and test set, whether FE+CE (else every method) differs from the baseline."""
    rows = [row for row in study.rows(student) if row.difference]
    both = [row for row in rows if row.method == "FE+CE"]
    return [
        sentence(row, test, interval, study.baseline)
        for row in both or rows
        for test, interval in row.difference.items()
        if interval is not None
    ]


def sentence(row: Row, test: str, interval: tuple[float, float], baseline: str) -> str:
    """Whether an interval excludes zero, and which way."""
    if not excludes_zero(interval):
        what = "includes zero: no difference is shown"
    elif interval[0] > 0:
        what = f"excludes zero: {row.method} is better"
    else:
        what = f"excludes zero: {row.method} is worse"
    by = f", taught by `{row.teacher}`" if row.teacher else ""
    return (
        f"{row.method} minus {baseline}{by}, on {test}: {interval[0]:+.2f} ± {interval[1]:.2f}. "
        f"The interval {what}."
    )


def over_students(study: Kept) -> str:
    """Differences to the baseline averaged over the students, seed by seed."""
    lines, said = [], []
    tested = {
        (method, teacher, test): p_value(gains)
        for method in study.methods
        for teacher in (None, *study.taught_by)
        for test in study.tests
        if len(gains := pooled(study, method, teacher, test)) > 1
    }
    stand = dict(zip(tested, holm(list(tested.values())), strict=True))
    for method in study.methods:
        for teacher in (None, *study.taught_by):
            line = [method, teacher or ""]
            for test in study.tests:
                gains = pooled(study, method, teacher, test)
                interval = paired_interval(gains)
                line += [str(len(gains)), interval_text(interval, stand.get((method, teacher, test), False))]
                if interval is not None and method == "FE+CE":
                    said.append(
                        "- " + sentence(Row("", method, teacher, {}, [], {}), test, interval, study.baseline)
                    )
            if any(text not in ("0", "–") for text in line[2:]):
                lines.append(line)
    headings = ["method", "teacher"]
    for test in study.tests:
        headings += ["seeds", f"{test}: difference"]
    return (
        "Mean difference to the baseline over all students, for the seeds that all of them have; the "
        "interval is over seeds.\n\n" + markdown(headings, lines) + "\n" + "\n".join(said)
    ).rstrip()


def pooled(study: Kept, method: str, teacher: str | None, test: str) -> np.ndarray:
    """The mean difference over the students, one for each seed that every student has."""
    if method == study.baseline:
        return np.zeros(0)
    found = {(r["student"], r["seed"], r["method"], r["teacher"]): accuracy(r, test) for r in study.records}
    gains = []
    for seed in sorted({r["seed"] for r in study.records}):
        pairs = [
            (found.get((s, seed, method, teacher)), found.get((s, seed, study.baseline, None)))
            for s in study.students
        ]
        if all(a is not None and b is not None for a, b in pairs):
            gains.append(np.mean([a - b for a, b in pairs]))  # type: ignore[operator]
    return np.array(gains)


def robustness_text(study: Kept) -> str:
    """The plot, and the mean accuracy at the hardest level of each corruption."""
    content = json.loads((study.folder / "robustness.json").read_text())
    lines = []
    for curve in curves(content):
        lines.append(
            [curve.student, curve.name]
            + [f"{curve.mean[k][-1]:.1f}" if k in curve.mean else "–" for k in content["severities"]]
        )
    headings = ["student", "method", *(f"{k} {v[-1]:g}" for k, v in content["severities"].items())]
    shapes = one([run["shapes"] for run in content["runs"]])
    counted: dict[tuple[Any, ...], int] = {}
    for run in content["runs"]:
        key = (run["student"], run["method"], run["teacher"])
        counted[key] = counted.get(key, 0) + 1
    least, most = min(counted.values()), max(counted.values())
    seeds = f"{most}" if least == most else f"{least} to {most}"
    return (
        f"{shapes} test shapes, {seeds} seeds of each; "
        f"corruptions drawn by seed {content['settings']['seed']}, the same for all. `pointcmt robustness` "
        "with the folder of the study. OA in % at the hardest level of each corruption:\n\n"
        + markdown(headings, lines)
        + f"\n![Accuracy under corruption](images/robustness-{study.name}.png)"
    )


# placeholders of the notes


def fill(text: str) -> str:
    """Notes with their placeholders filled in.

    Raises:
        ValueError: an unknown placeholder, one whose records are not there, or a figure typed by hand.
    """
    typed = re.sub(r"\{\{.*?\}\}|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    if found := re.search(r"\d+\.\d|\d\s*%|±", typed):
        line = typed[: found.start()].count("\n") + 1
        raise ValueError(
            f"notes.md, line {line}: {found.group()!r} is typed by hand; a figure is a placeholder, a "
            "setting is in `code`"
        )
    return re.sub(r"\{\{(.*?)\}\}", lambda match: placeholder(match.group(1)), text, flags=re.S)


def placeholder(text: str) -> str:
    """The value of one placeholder."""
    kind, name, *rest = shlex.split(text)
    given = dict(word.split("=", 1) for word in rest if "=" in word)
    bare = [word for word in rest if "=" not in word]
    kinds: dict[str, Callable[[], str]] = {
        "difference": lambda: interval_text(wanted(name, given).difference.get(given.get("test", "test"))),
        "pooled": lambda: mean_gain(name, given),
        "oa": lambda: mean_sd(wanted(name, given).oa[given.get("test", "test")]),
        "heldout": lambda: held_out(name, given),
        "teacher": lambda: f"{Kept(RESULTS / name).teachers[bare[0]]['last']['test_oa']:.1f}",
        "table": lambda: study_table(Kept(RESULTS / name)),
        "rows": lambda: as_markdown(exploration(name)),
        "demo": lambda: demo_cell(name),
        "value": lambda: value(name, bare[0], given),
    }
    if kind not in kinds:
        raise ValueError(f"notes.md: {{{{{text}}}}}: expected one of {', '.join(kinds)}")
    try:
        return kinds[kind]()
    except (KeyError, IndexError, FileNotFoundError) as error:
        raise ValueError(f"notes.md: {{{{{text}}}}} cannot be filled in: {error!r}") from error


def wanted(name: str, given: Mapping[str, str]) -> Row:
    return Kept(RESULTS / name).row(given["student"], given["method"], given.get("teacher"))


def held_out(name: str, given: Mapping[str, str]) -> str:
    """Accuracy on the shapes that were held out of training, by which alone is chosen."""
    key = given["student"], given["method"], given.get("teacher")
    found = [
        record["last"]["heldout_oa"]
        for record in Kept(RESULTS / name).records
        if (record["student"], record["method"], record["teacher"]) == key
    ]
    if not found:
        raise ValueError(f"notes.md: {name} has no record of {dict(given)}")
    return mean_sd(found)


def mean_gain(name: str, given: Mapping[str, str]) -> str:
    """The mean difference over all students."""
    teacher, test = given.get("teacher"), given.get("test", "test")
    interval = paired_interval(pooled(Kept(RESULTS / name), given["method"], teacher, test))
    if interval is None:
        raise ValueError(f"notes.md: {name} has not two seeds of {dict(given)} for every student")
    return interval_text(interval)


def study_table(study: Kept) -> str:
    return markdown(*table_of(study.rows(), study.tests)).rstrip()


def exploration(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / "explore" / f"{name}.json").read_text())["rows"]


def value(name: str, column: str, where: Mapping[str, str]) -> str:
    """One cell of an exploration: of the only row that has these values."""
    rows = [row for row in exploration(name) if all(str(row.get(k)) == v for k, v in where.items())]
    if len(rows) != 1:
        raise ValueError(
            f"notes.md: {len(rows)} rows of explore/{name}.json have {dict(where)}; expected one"
        )
    return as_text(rows[0][column])


def studies() -> list[Kept]:
    """The studies that the page shows, the ones with a configuration in the repository first."""
    order = {"cpu": 0, "gpu": 1}
    folders = sorted(RESULTS.glob("*/study.json"), key=lambda path: (order.get(path.parent.name, 2), path))
    return [Kept(path.parent) for path in folders]


def page() -> str:
    """docs/results.md."""
    kept = studies()
    short = RESULTS / "in-short.md"
    parts = [HEAD.rstrip(), *([fill(short.read_text()).strip()] if short.exists() else [])]
    parts += [section(study) for study in kept]
    if not kept:
        parts.append("There are no records of a study here yet.")
    if (RESULTS / "pretraining" / "plan.json").exists():
        parts.append(pretraining.section(RESULTS / "pretraining"))
    parts += runs_of_commands()
    text = RESULTS / "notes.md"
    parts += [fill(text.read_text()).strip()] if text.exists() else []
    return "\n\n".join(parts) + "\n"


def runs_of_commands() -> list[str]:
    """What single commands gave, record by record."""
    parts = []
    for path in sorted(RESULTS.glob("runs-*.json")):
        record = json.loads(path.read_text())
        machine = record["machine"]
        where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
        rows = [{k: v for k, v in row.items() if k != "OA by seed"} for row in record["rows"]]
        text = f"{record['question']} `{record['notes']['command']}`, on {where}, {record['date'][:10]}:"
        parts.append(f"{text}\n\n{as_markdown(rows)}")
        if path.stem == "runs-demo":
            parts.append(demo_verdict(record))
    return ["## Single commands", *parts] if parts else []


def keep(run: Path, name: str | None = None) -> Path:
    """Copy what the page needs of a study that was run into ``benchmarks/results``; returns where."""
    folder = RESULTS / (name or run.resolve().name)
    if not (run / "study.json").exists():
        raise FileNotFoundError(f"{run} is not the folder of a study: it has no study.json")
    for source in [run / "study.json", *sorted((run / "records").rglob("*.json")), run / "robustness.json"]:
        if source.exists():
            target = folder / source.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the page and its pictures from all records."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--keep", type=Path, nargs="*", default=[], help="folders of studies to copy records of"
    )
    parser.add_argument("--name", help="of the copy, where it is not the folder's name; one --keep alone")
    options = parser.parse_args(argv)
    for run in options.keep:
        print(keep(run, options.name))
    text = page()
    images = PAGE.parent / "images"
    for study in studies():
        save_rows(study.rows(), images / f"results-{study.name}.png")
        if (study.folder / "robustness.json").exists():
            content = json.loads((study.folder / "robustness.json").read_text())
            save_robustness(curves(content), content["severities"], images / f"robustness-{study.name}.png")
    PAGE.write_text(text)
    print(f"{PAGE}: {len(studies())} studies")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
