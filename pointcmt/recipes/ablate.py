"""Students × methods × seeds from one configuration file, with shared teachers, generators and features.

A configuration (YAML)::

    data: {data: ../shared/data/modelnet40_ply_hdf5_1024, num_points: 512, view_points: 1024, per_class: 20}
    views: {size: 64}
    teachers:                       # one entry trains and shares one teacher and its generator
      few: {teacher: {loop: {epochs: 40}}, generator: {loop: {epochs: 40}}}
      all: {data: {per_class: null}}          # this teacher learns from all labels
    students:
      pointnet2: {student: pointnet2, width: 0.25}
    methods:                        # options of pointcmt train; `none` is trained once, not once per teacher
      none: {method: none}
      FE+CE: {fe_weight: 3, ce_weight: 0.03}
      Hinton: {fe_weight: 0, ce_weight: 0, objectives: ["soft_labels=1"]}
    seeds: [0, 1, 2, 3, 4]
    train: {loop: {epochs: 60}}     # further options of pointcmt train, for every cell
    tests:                          # evaluated after training, beside the data's own test shapes
      hard: {dataset: modelnet40hard}
    paper: {pointnet2: {none: 93.4, FE+CE: 94.4}}
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich import box
from rich.table import Table
from scipy import stats

from pointcmt.checkpoint import atomic_write
from pointcmt.recipes.build import StudentOptions
from pointcmt.recipes.engine import MachineOptions, OutOfTime, out_of_time
from pointcmt.recipes.evaluate import Evaluate, evaluate
from pointcmt.recipes.options import DataOptions, ViewOptions
from pointcmt.recipes.progress import console, say, warn
from pointcmt.recipes.run import environment, read_json, to_json, write_json
from pointcmt.recipes.train import MethodOptions, Train, train
from pointcmt.recipes.train_generator import TrainGenerator, train_generator
from pointcmt.recipes.train_teacher import TrainTeacher, train_teacher
from pointcmt.report import Row, save_rows

SECTIONS = (
    "data",
    "views",
    "teachers",
    "students",
    "methods",
    "seeds",
    "train",
    "tests",
    "paper",
    "baseline",
)


@dataclass
class Ablate:
    """Students × methods × seeds from one configuration file, a table with intervals, and a chart."""

    config: Path
    """YAML file; the module pointcmt.recipes.ablate shows one."""
    out: Path | None = None
    """Folder; default: runs/ and the name of the file. A study that was killed goes on where it stood."""
    only: str | None = None
    """Run the cells whose name contains this, and no others."""
    table: bool = False
    """Only make table and chart of the cells that are finished."""
    machine: MachineOptions = field(default_factory=MachineOptions)


@dataclass(frozen=True)
class Cell:
    """One training: a student, a method, a seed, and the teacher where the method has one."""

    student: str
    method: str
    seed: int
    teacher: str | None

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.student, self.method, self.teacher, str(self.seed))))


@dataclass
class Study:
    """A configuration, checked."""

    data: DataOptions
    views: ViewOptions
    teachers: dict[str, dict[str, Any]]
    students: dict[str, StudentOptions]
    methods: dict[str, MethodOptions]
    seeds: list[int]
    train: dict[str, Any]
    tests: dict[str, dict[str, Any]]
    paper: dict[str, dict[str, float]]
    baseline: str

    def cells(self) -> list[Cell]:
        """Every cell; seed by seed, so that a study that is stopped has paired cells."""
        made = []
        for seed, student, (name, method) in itertools.product(
            self.seeds, self.students, self.methods.items()
        ):
            teachers: list[str | None] = [None] if method.method == "none" else list(self.teachers)
            made += [Cell(student, name, seed, teacher) for teacher in teachers]
        return made


def override(base: Any, values: Mapping[str, Any] | None, where: str) -> Any:
    """A copy of a dataclass of options with some fields changed, nested ones by nested mappings.

    Raises:
        ValueError: an unknown field, or a value of the wrong kind.
    """
    made = copy.deepcopy(base)
    if values is None:
        return made
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; expected a mapping of options")
    known = {item.name: item for item in dataclasses.fields(made)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}: there is no option {name!r}; expected one of {', '.join(known)}")
        current, kind = getattr(made, name), str(known[name].type)
        if dataclasses.is_dataclass(current):
            value = override(current, value, f"{where}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        elif "Path" in kind and value is not None:
            value = Path(value)
        elif kind.startswith("float") and isinstance(value, str):
            try:
                value = float(value)  # YAML reads 1e-3 as a string
            except ValueError:
                raise ValueError(f"{where}.{name} is {value!r}; expected a number") from None
        setattr(made, name, value)
    return made


def read_study(path: Path) -> Study:
    """Read and check a configuration.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown section or option, or a section missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no configuration at {path}")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a mapping with {', '.join(SECTIONS)}")
    if unknown := sorted(set(raw) - set(SECTIONS)):
        raise ValueError(f"{path}: unknown section {', '.join(unknown)}; expected {', '.join(SECTIONS)}")
    for section in ("students", "methods", "seeds"):
        if not raw.get(section):
            raise ValueError(f"{path}: section {section!r} is missing or empty")
    methods = {
        name: override(MethodOptions(), values, f"methods.{name}") for name, values in raw["methods"].items()
    }
    baseline = raw.get("baseline", "none")
    if baseline not in methods:
        raise ValueError(f"{path}: the baseline {baseline!r} is not among the methods {', '.join(methods)}")
    teachers = dict(raw.get("teachers") or {"teacher": {}})
    for name, values in teachers.items():
        if unknown := sorted(set(values or {}) - {"data", "teacher", "generator"}):
            raise ValueError(
                f"{path}: teachers.{name} has {', '.join(unknown)}; expected data, teacher, generator"
            )
    return Study(
        data=override(DataOptions(), raw.get("data"), "data"),
        views=override(ViewOptions(), raw.get("views"), "views"),
        teachers={name: dict(values or {}) for name, values in teachers.items()},
        students={
            name: override(StudentOptions(), values, f"students.{name}")
            for name, values in raw["students"].items()
        },
        methods=methods,
        seeds=[int(seed) for seed in raw["seeds"]],
        train=dict(raw.get("train") or {}),
        tests=dict(raw.get("tests") or {}),
        paper=dict(raw.get("paper") or {}),
        baseline=baseline,
    )


def ablate(options: Ablate) -> dict[str, Any]:
    """Run the cells that are not finished, then write table and chart; returns the rows."""
    study = read_study(options.config)
    out = options.out or Path("runs") / options.config.stem
    out.mkdir(parents=True, exist_ok=True)
    check_unchanged(out / "study.json", study)
    cells = [cell for cell in study.cells() if options.only is None or options.only in cell.name]
    todo = [cell for cell in cells if not record_path(out, cell).exists()]
    if not options.table and todo:
        say(f"{len(cells)} cells, {len(todo)} to do")
        try:
            for name in {cell.teacher for cell in todo if cell.teacher is not None}:
                prepare(study, name, out, options.machine)
            devices = torch.cuda.device_count() if options.machine.device != "cpu" else 0
            if devices > 1 and len(todo) > 1:
                run_on_devices(options, out, todo, devices)
            else:
                for number, cell in enumerate(todo, 1):
                    if out_of_time(options.machine):
                        raise OutOfTime(
                            f"{len(todo) - number + 1} cells are left; run the same command again"
                        )
                    say(f"[{number}/{len(todo)}] {cell.name}")
                    run_cell(study, cell, out, options.machine)
        except OutOfTime as stop:
            say(f"out of time: {stop}")
    return summarise(study, out)


def check_unchanged(path: Path, study: Study) -> None:
    """Cells of two configurations in one folder would be compared as if they were of one."""
    # more seeds, students, methods, teachers or tests extend a study; the rest must stay
    fixed = to_json({"data": study.data, "views": study.views, "train": study.train})
    named = to_json({"teachers": study.teachers, "students": study.students, "methods": study.methods})
    if path.exists():
        before = read_json(path)
        changed = [name for name, value in fixed.items() if before["fixed"].get(name) != value]
        for section, entries in named.items():
            earlier = before["named"].get(section, {})
            changed += [
                f"{section}.{name}" for name in entries if earlier.get(name, entries[name]) != entries[name]
            ]
            entries |= {name: value for name, value in earlier.items() if name not in entries}
        if changed:
            raise ValueError(
                f"{path.parent} holds cells of a configuration with other {', '.join(changed)}: "
                "give another --out, or put the configuration back"
            )
    write_json(path, {"fixed": fixed, "named": named})


def record_path(out: Path, cell: Cell) -> Path:
    return out / "records" / f"{cell.name}.json"


def prepare(study: Study, name: str, out: Path, machine: MachineOptions) -> None:
    """Train the teacher of that name and its generator, where they are not there yet."""
    values = study.teachers[name]
    where = f"teachers.{name}"
    data = override(study.data, values.get("data"), f"{where}.data")
    folder = out / "teachers" / name
    plan = TrainTeacher(folder / "teacher", data=data, views=study.views, machine=machine, resume=True)
    train_teacher(override(plan, values.get("teacher"), f"{where}.teacher"))
    if any(method.method != "none" and method.fe_weight for method in study.methods.values()):
        made = TrainGenerator(
            folder / "generator", teacher=folder / "teacher", data=data, machine=machine, resume=True
        )
        train_generator(override(made, values.get("generator"), f"{where}.generator"))


def run_cell(study: Study, cell: Cell, out: Path, machine: MachineOptions) -> dict[str, Any]:
    """Train and test one cell and write its record; goes on where a kill left it."""
    began = time.perf_counter()
    taught = cell.teacher is not None
    folder = out / "cells" / cell.name
    teachers = out / "teachers" / str(cell.teacher)
    method = study.methods[cell.method]
    plan = Train(
        folder,
        student=copy.deepcopy(study.students[cell.student]),
        method=method,
        teacher=teachers / "teacher" if taught else None,
        generator=teachers / "generator" if taught and method.fe_weight else None,
        data=study.data,
        machine=machine,
        resume=True,
    )
    plan = override(plan, study.train, "train")
    plan.loop.seed = cell.seed
    if plan.student.feature_dim is None and study.teachers:
        # the plain student is the one that the teachers' students are
        plan.student.feature_dim = feature_dim(study)
    results = train(plan)
    tests = {}
    for name, values in study.tests.items():
        asked = override(Evaluate(folder, machine=machine), values, f"tests.{name}")
        measured = evaluate(asked, quiet=True)
        tests[name] = {key: measured[key] for key in ("oa", "macc", "shapes")}
    record = {
        **dataclasses.asdict(cell),
        "last": results["last"],
        "best": results["best"],
        "tests": tests,
        "parameters": results["parameters"],
        "milliseconds_per_cloud": results["milliseconds_per_cloud"],
        "teacher_check": results.get("teacher_check"),
        "teacher_oa": read_json(teachers / "teacher" / "results.json")["last"]["test_oa"] if taught else None,
        "shapes": results["shapes"],
        "epochs": results["epochs"],
        "training_seconds": results["seconds"],
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment(
            "cuda" if torch.cuda.is_available() and machine.device != "cpu" else "cpu"
        ),
    }
    write_json(record_path(out, cell), record)
    return record


def feature_dim(study: Study) -> int:
    """The teachers' feature size; all must have one, for the students to be the same network."""
    sizes = {
        override(TrainTeacher(Path()), values.get("teacher"), "teacher").feature_dim
        for values in study.teachers.values()
    }
    if len(sizes) > 1:
        raise ValueError(
            f"the teachers' features have different sizes {sorted(sizes)}: give them one feature_dim"
        )
    return sizes.pop()


def run_on_devices(options: Ablate, out: Path, todo: list[Cell], devices: int) -> None:
    """One process per cell, one cell per GPU at a time."""
    waiting: queue.Queue[Cell] = queue.Queue()
    for cell in todo:
        waiting.put(cell)
    failed: list[str] = []

    def work(device: int) -> None:
        while not out_of_time(options.machine):
            try:
                cell = waiting.get_nowait()
            except queue.Empty:
                return
            command = [
                sys.executable, "-m", "pointcmt.recipes.ablate", str(options.config), str(out), cell.name,
                json.dumps(to_json(options.machine)),
            ]  # fmt: skip
            log = out / "logs" / f"{cell.name}.txt"
            log.parent.mkdir(exist_ok=True)
            with log.open("a") as file:
                done = subprocess.run(
                    command, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(device)}, stdout=file, stderr=file
                )
            say(f"GPU {device}: {cell.name} {'done' if done.returncode == 0 else f'failed, see {log}'}")
            if done.returncode:
                failed.append(cell.name)

    threads = [threading.Thread(target=work, args=(device,)) for device in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"{len(failed)} cells failed: {', '.join(failed)}; see {out / 'logs'}")


# what the records say


def read_records(out: Path) -> list[dict[str, Any]]:
    """The records of all finished cells."""
    return [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]


def paired_interval(differences: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Mean and half-width of Student's t-interval of paired differences; None for fewer than two."""
    if len(differences) < 2:
        return None
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return float(differences.mean()), float(stats.t.ppf(0.5 + level / 2, len(differences) - 1) * error)


def rows_of(study: Study, records: list[dict[str, Any]]) -> list[Row]:
    """One row per student, method and teacher, with the paired difference to the baseline of the same
    seeds."""
    tests = ["test", *study.tests]

    def value(record: Mapping[str, Any], test: str) -> float:
        return record["last"]["test_oa"] if test == "test" else record["tests"][test]["oa"]

    rows = []
    for student in study.students:
        plain = {r["seed"]: r for r in records if r["student"] == student and r["method"] == study.baseline}
        for method, method_options in study.methods.items():
            for teacher in [None] if method_options.method == "none" else list(study.teachers):
                mine = {
                    r["seed"]: r
                    for r in records
                    if (r["student"], r["method"], r["teacher"]) == (student, method, teacher)
                }
                if not mine:
                    continue
                both = sorted(set(mine) & set(plain)) if method != study.baseline else []
                ordered = sorted(mine)
                known = {
                    test: [s for s in ordered if test == "test" or test in mine[s]["tests"]] for test in tests
                }
                rows.append(
                    Row(
                        student,
                        method,
                        teacher if len(study.teachers) > 1 else None,
                        {
                            test: [value(mine[s], test) for s in seeds]
                            for test, seeds in known.items()
                            if seeds
                        },
                        [mine[s]["best"]["test_oa"] for s in ordered],
                        {
                            test: paired_interval(
                                np.array([value(mine[s], test) - value(plain[s], test) for s in both])
                            )
                            for test in tests
                            if both and all(test == "test" or test in plain[s]["tests"] for s in both)
                        },
                        study.paper.get(student, {}).get(method),
                    )
                )
    return rows


def summarise(study: Study, out: Path) -> dict[str, Any]:
    """Table on the terminal; table.md, summary.json and chart.png in the folder."""
    records = read_records(out)
    if not records:
        warn("no cell is finished yet")
        return {"rows": []}
    rows = rows_of(study, records)
    headings, lines = table_of(rows, ["test", *study.tests])
    table = Table(*headings, box=box.SIMPLE, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    console.print(table)
    chosen = records[0]["best"]["chosen_by"]
    notes = [
        f"Overall accuracy in %, last epoch, mean ± standard deviation over the seeds; difference to "
        f"{study.baseline}, "
        "paired by seed, with the 95 % t-interval.",
        f"Best epoch: chosen by {chosen}.",
    ]
    if study.paper:
        notes.append("Paper: Yan et al. 2022, full data and schedule; not the setting of this study.")
    text = markdown(headings, lines) + "\n" + "\n".join(f"{note}\n" for note in notes)
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(text)
    write_json(out / "summary.json", {"rows": rows, "cells": len(records)})
    save_rows(rows, out / "chart.png")
    say(f"{out / 'table.md'}, {out / 'chart.png'}")
    return {"rows": rows}


def table_of(rows: list[Row], tests: list[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table, as the terminal and table.md show it."""
    headings = ["student", "method", "teacher", "seeds"]
    for test in tests:
        headings += [f"{test} OA %", "difference"]
    headings += ["best epoch OA %", "paper"]
    lines = []
    for row in rows:
        line = [row.student, row.method, row.teacher or "", str(len(row.best))]
        for test in tests:
            values = row.oa.get(test)
            line.append(mean_sd(values) if values else "–")
            interval = row.difference.get(test)
            line.append(f"{interval[0]:+.2f} ± {interval[1]:.2f}" if interval else "–")
        line += [mean_sd(row.best), "–" if row.paper is None else f"{row.paper:.1f}"]
        lines.append(line)
    if not any(row.teacher for row in rows):
        headings.pop(2)
        for line in lines:
            line.pop(2)
    return headings, lines


def mean_sd(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(arguments: list[str]) -> None:
    """One cell in a process of its own, for ``run_on_devices``: CONFIG OUT CELL MACHINE."""
    config, out, name, machine = arguments
    study = read_study(Path(config))
    [cell] = [cell for cell in study.cells() if cell.name == name]
    run_cell(study, cell, Path(out), MachineOptions(**json.loads(machine)))


if __name__ == "__main__":
    main(sys.argv[1:])
