"""Students × methods × seeds from one configuration file, with shared teachers, generators and features.

A configuration (YAML)::

    about: |                        # for the page of results: a title, and what the study is
      Few labels on a CPU
      Twenty labelled shapes of each class.
    data: {data: ../shared/data/modelnet40_ply_hdf5_1024, num_points: 512, view_points: 1024, per_class: 20}
    views: {size: 64}
    teachers:                       # one entry trains and shares one teacher and its generator
      few: {teacher: {loop: {epochs: 40}}, generator: {loop: {epochs: 40}}}
      all: {data: {per_class: null}}          # this teacher learns from all labels
    students:                       # options of the student, and of pointcmt train for this student alone
      pointnet2: {student: pointnet2, width: 0.25}
      dgcnn: {student: dgcnn, width: 0.25, train: {loop: {lr: 2e-3}}}
    methods:                        # options of pointcmt train; `none` is trained once, not once per teacher
      none: {method: none}
      FE+CE: {fe_weight: 3, ce_weight: 0.03}
      Hinton: {fe_weight: 0, ce_weight: 0, objectives: ["soft_labels=1"]}
    seeds: [0, 1, 2, 3, 4]
    train: {loop: {epochs: 60}}     # further options of pointcmt train, for every cell
    tests:                          # pointcmt evaluate after training, beside the data's own test shapes
      hard: {dataset: modelnet40hard}
      voted: {votes: 10}
    paper: {pointnet2: {none: 93.4, FE+CE: 94.4}}

In the folder of the study: ``records/CELL.json``, one for each finished cell, and ``records/teachers/``;
these are all that a table needs: a cell that has a record is not done again, whatever else of it is there.
``cells/CELL`` and ``teachers/`` are run folders; ``logs/`` holds the output of cells.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import itertools
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from rich import box
from rich.table import Table

from pointcmt.checkpoint import atomic_write
from pointcmt.recipes.build import StudentOptions
from pointcmt.recipes.engine import MachineOptions, OutOfTime
from pointcmt.recipes.evaluate import Evaluate, evaluate
from pointcmt.recipes.features import CacheFeatures, cache_features
from pointcmt.recipes.options import DataOptions, ViewOptions
from pointcmt.recipes.progress import console, say, warn
from pointcmt.recipes.run import described_environment, read_json, to_json, write_json
from pointcmt.recipes.study_table import markdown, notes, read_records, rows_of, table_of
from pointcmt.recipes.train import MethodOptions, Train, train
from pointcmt.recipes.train_generator import TrainGenerator, train_generator
from pointcmt.recipes.train_teacher import TrainTeacher, train_teacher
from pointcmt.recipes.workers import Job, run_jobs, slots
from pointcmt.report import save_rows

SECTIONS = (
    "about",
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
    data: str | None = None
    """Folder of the data set, in place of the one that the configuration names."""
    only: str | None = None
    """Run the cells whose name contains this, and no others."""
    jobs: int = 1
    """Cells at a time, each in a process of its own: on the CPU, which share its cores, or on each GPU."""
    keep: Literal["student", "all"] = "student"
    """What stays of a finished cell's run folder: all, or student.safetensors with results, metrics and
    configuration but not the training state and other checkpoints."""
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
    student_train: dict[str, dict[str, Any]]
    methods: dict[str, MethodOptions]
    seeds: list[int]
    train: dict[str, Any]
    tests: dict[str, dict[str, Any]]
    paper: dict[str, dict[str, float]]
    baseline: str
    about: str

    def fixed(self) -> dict[str, Any]:
        """What all cells share, but where the files lie."""
        data = dataclasses.asdict(self.data)
        data["synthetic"] = data.pop("data") == "synthetic"
        data.pop("data_cache")
        return to_json({"data": data, "views": self.views, "train": self.train})

    def named(self) -> dict[str, dict[str, Any]]:
        """What a study can be extended by."""
        students = {
            name: dataclasses.asdict(options) | {"train": self.student_train[name]}
            for name, options in self.students.items()
        }
        return to_json(
            {"teachers": self.teachers, "students": students, "methods": self.methods, "tests": self.tests}
        )

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
    students, student_train = {}, {}
    for name, values in raw["students"].items():
        values = dict(values or {})
        student_train[name] = dict(values.pop("train", None) or {})
        students[name] = override(StudentOptions(), values, f"students.{name}")
    study = Study(
        data=override(DataOptions(), raw.get("data"), "data"),
        views=override(ViewOptions(), raw.get("views"), "views"),
        teachers={name: dict(values or {}) for name, values in teachers.items()},
        students=students,
        student_train=student_train,
        methods=methods,
        seeds=[int(seed) for seed in raw["seeds"]],
        train=dict(raw.get("train") or {}),
        tests=dict(raw.get("tests") or {}),
        paper=dict(raw.get("paper") or {}),
        baseline=baseline,
        about=str(raw.get("about") or ""),
    )
    check_options(study)
    return study


def check_options(study: Study) -> None:
    """A mistake in any section is found before anything is trained."""
    for name, values in study.teachers.items():
        override(study.data, values.get("data"), f"teachers.{name}.data")
        override(TrainTeacher(Path()), values.get("teacher"), f"teachers.{name}.teacher")
        override(TrainGenerator(Path(), Path()), values.get("generator"), f"teachers.{name}.generator")
    for name in study.students:
        training(Train(Path()), study, name)
    for name, values in study.tests.items():
        override(Evaluate(Path()), values, f"tests.{name}")
    if study.teachers:
        feature_dim(study)


def training(plan: Train, study: Study, student: str) -> Train:
    """A plan with the study's options of training in it, then the student's own."""
    plan = override(plan, study.train, "train")
    return override(plan, study.student_train[student], f"students.{student}.train")


def ablate(options: Ablate) -> dict[str, Any]:
    """Run the cells that are not finished, then write table and chart; returns the rows.

    Raises:
        RuntimeError: cells failed; the others are finished, and the message names those with their logs.
    """
    study = read_study(options.config)
    if options.data is not None:
        study.data.data = options.data
    out = options.out or Path("runs") / options.config.stem
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if options.table else alone(out):
        return run_study(options, study, out)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder of a study: two commands at once would train the same cells into the same files.

    Raises:
        RuntimeError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise RuntimeError(
                    f"another pointcmt ablate is at work in {out}: wait for it, stop it, or give another "
                    "--out"
                ) from None
            # a file system without locks
        yield  # the lock goes with the file, however the process ends


def run_study(options: Ablate, study: Study, out: Path) -> dict[str, Any]:
    """:func:`ablate` in a folder that no other command is at work in."""
    check_unchanged(out / "study.json", study)
    cells = [cell for cell in study.cells() if options.only is None or options.only in cell.name]
    todo = [cell for cell in cells if not finished(study, cell, out)]
    failures: list[str] = []
    if not options.table and todo:
        failures = run_cells(options, study, out, cells, todo)
    rows = summarise(study, out)
    if failures:
        raise RuntimeError(f"{len(failures)} failed:\n" + "\n".join(failures))
    return rows


def check_unchanged(path: Path, study: Study) -> None:
    """Cells of two configurations in one folder would be compared as if they were of one."""
    # more seeds, students, methods, teachers or tests extend a study; the rest must stay
    fixed, named = study.fixed(), study.named()
    if path.exists():
        before = read_json(path)
        resolved = {
            "data": DataOptions(),
            "views": ViewOptions(),
            "students": StudentOptions(),
            "methods": MethodOptions(),
        }

        def same(section: str, old: Any, new: Any) -> bool:
            if section == "methods" and old["method"] == new["method"] == "none":
                return True  # the plain student has no use for the other options
            if section in resolved:
                # options that came with a newer version of the package were at their defaults then
                default = to_json(resolved[section])
                old = {**{key: default[key] for key in new if key in default}, **old}
                new = {**{key: old[key] for key in old if key not in new}, **new}
            return old == new

        changed = [name for name in fixed if not same(name, before["fixed"].get(name, {}), fixed[name])]
        for section, entries in named.items():
            earlier = before["named"].get(section, {})
            changed += [
                f"{section}.{name}"
                for name in entries.keys() & earlier.keys()
                if not same(section, earlier[name], entries[name])
            ]
            entries |= {name: value for name, value in earlier.items() if name not in entries}
        if changed:
            raise ValueError(
                f"{path.parent} holds cells of a configuration with other {', '.join(changed)}: "
                "give another --out, or put the configuration back"
            )
    described = {
        "about": study.about,
        "baseline": study.baseline,
        "paper": study.paper,
        "fixed": fixed,
        "named": named,
    }
    if not path.exists() or read_json(path) != to_json(described):
        write_json(path, described)


def record_path(out: Path, cell: Cell) -> Path:
    return out / "records" / f"{cell.name}.json"


def finished(study: Study, cell: Cell, out: Path) -> bool:
    """Whether there is nothing to do: it has a record, with all tests where its student is still there."""
    path = record_path(out, cell)
    if not path.exists():
        return False
    lacking = study.tests.keys() - read_json(path)["tests"].keys()
    return not lacking or not (out / "cells" / cell.name / "student.safetensors").exists()


def run_cells(options: Ablate, study: Study, out: Path, cells: list[Cell], todo: list[Cell]) -> list[str]:
    """Run cells, and first what they need; a line for each that ends. Returns what failed, with its log."""
    places = slots(options.machine, options.jobs)
    teachers = list(dict.fromkeys(cell.teacher for cell in todo if cell.teacher is not None))
    jobs = [Job(f"teacher-{name}", prepare, (study, name, out, options.machine)) for name in teachers] + [
        Job(
            cell.name,
            run_cell,
            (study, cell, out, options.machine, options.keep),
            () if cell.teacher is None else (f"teacher-{cell.teacher}",),
        )
        for cell in todo
    ]
    say(
        f"{len(cells)} cells, {len(todo)} to do, {len(places)} at a time with {places[0].threads} threads "
        "each" + (f"; their output is in {out / 'logs'}" if len(places) > 1 else "")
    )
    by_name = {cell.name: cell for cell in todo}
    waiting, done, failures = dict(by_name), len(cells) - len(todo), []
    running = run_jobs(jobs, places, options.machine, out / "logs")
    try:
        with contextlib.closing(running):
            for outcome in running:
                name = outcome.job.name
                waiting.pop(name, None)
                if outcome.failure is not None:
                    log = f" ({outcome.log})" if outcome.log else ""
                    failures.append(f"{name}: {outcome.failure}{log}")
                    warn(f"{name} failed: {outcome.failure}")
                elif name in by_name:
                    done += 1
                    left = time_left(read_records(out), list(waiting.values()), len(places))
                    say(f"[{done}/{len(cells)}] {name}: {told(outcome.result)}; {left}")
                else:
                    say(f"{name}: {outcome.result}")
    except OutOfTime as stop:
        say(f"out of time: {stop}")
    return failures


def told(record: Mapping[str, Any]) -> str:
    """A finished cell in a few words."""
    scores = [f"test {record['last']['test_oa']:.2f}"]
    scores += [f"{name} {values['oa']:.2f}" for name, values in record["tests"].items()]
    return f"{', '.join(scores)}, {record['seconds']:.0f} s"


def time_left(records: list[dict[str, Any]], waiting: list[Cell], places: int) -> str:
    """How long cells will take, by what those of the same student and method took, else the same student."""

    def expected(cell: Cell) -> float:
        for same in (
            [r for r in records if (r["student"], r["method"]) == (cell.student, cell.method)],
            [r for r in records if r["student"] == cell.student],
            records,
        ):
            if same:
                return sum(r["seconds"] for r in same) / len(same)
        return 0.0

    minutes = sum(map(expected, waiting)) / places / 60
    hours, rest = divmod(round(minutes), 60)
    return f"{len(waiting)} left, about " + (f"{hours} h {rest:02d} min" if hours else f"{minutes:.1f} min")


class Cost:
    """Wall and CPU time of a piece of work, over all its parts where it was interrupted.

    What a part took is added up in a file when it ends, unless it is killed outright.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Cost:
        self.began, self.cpu = time.perf_counter(), _cpu_seconds()
        self.before = read_json(self.path) if self.path.exists() else {}
        return self

    def so_far(self) -> dict[str, Any]:
        """``seconds``, ``cpu_seconds`` of all threads and child processes, and in how many parts."""
        return {
            "seconds": round(self.before.get("seconds", 0) + time.perf_counter() - self.began, 1),
            "cpu_seconds": round(self.before.get("cpu_seconds", 0) + _cpu_seconds() - self.cpu, 1),
            "parts": self.before.get("parts", 0) + 1,
        }

    def __exit__(self, *_: object) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.so_far())


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def prepare(study: Study, name: str, out: Path, machine: MachineOptions) -> str:
    """Train the teacher of that name and its generator, and compute its features of the students' shapes,
    where that is not done yet; returns what to say of it."""
    values = study.teachers[name]
    where = f"teachers.{name}"
    data = override(study.data, values.get("data"), f"{where}.data")
    folder = out / "teachers" / name
    made_now = not (folder / "teacher" / "results.json").exists()
    with Cost(out / "costs" / f"teacher-{name}.json") as cost:
        plan = TrainTeacher(folder / "teacher", data=data, views=study.views, machine=machine, resume=True)
        results = train_teacher(override(plan, values.get("teacher"), f"{where}.teacher"))
        generator = None
        if any(method.method != "none" and method.fe_weight for method in study.methods.values()):
            made = TrainGenerator(
                folder / "generator", teacher=folder / "teacher", data=data, machine=machine, resume=True
            )
            made_now |= not (folder / "generator" / "results.json").exists()
            generator = train_generator(override(made, values.get("generator"), f"{where}.generator"))
        # once and before the cells: several at a time would all build them
        plans = [training(Train(Path(), data=study.data), study, student) for student in study.students]
        counts = sorted({0, *(method.draws for method in study.methods.values() if method.method != "none")})
        wanted = [
            CacheFeatures(
                folder / "teacher",
                data=plan.data,
                draws=count,
                augment_scale=plan.augment_scale,
                augment_shift=plan.augment_shift,
                machine=machine,
            )
            for plan in plans
            for count in counts
        ]
        for each in {repr(each): each for each in wanted}.values():
            cache_features(each)
        if made_now:
            record = {
                "teacher": name,
                "last": results["last"],
                "best": results["best"],
                "parameters": results["parameters"],
                "views": results["views"],
                "shapes": results["shapes"],
                "epochs": results["epochs"],
                "generator": None if generator is None else generator["last"],
                "inputs": inputs_of(folder / "teacher"),
                **cost.so_far(),
                "environment": described_environment(machine.device),
            }
            (out / "records/teachers").mkdir(parents=True, exist_ok=True)
            write_json(out / "records/teachers" / f"{name}.json", record)
    return f"test {results['last']['test_oa']:.2f}"


def inputs_of(run: Path) -> dict[str, str]:
    """The first letters of the fingerprints of what a run started from."""
    return {name: value[:16] for name, value in read_json(run / "config.json")["inputs"].items()}


def run_cell(
    study: Study, cell: Cell, out: Path, machine: MachineOptions, keep: str = "all"
) -> dict[str, Any]:
    """Train and test one cell and write its record; goes on where a kill left it."""
    with Cost(out / "costs" / f"{cell.name}.json") as cost:
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
        plan = training(plan, study, cell.student)
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
        check = dict(results.get("teacher_check") or {})
        check.pop("verdict", None)  # words, and paths
        record = {
            **dataclasses.asdict(cell),
            "last": results["last"],
            "best": results["best"],
            "tests": tests,
            "parameters": results["parameters"],
            "milliseconds_per_cloud": results["milliseconds_per_cloud"],
            "teacher_check": check or None,
            "teacher_oa": read_json(teachers / "teacher" / "results.json")["last"]["test_oa"]
            if taught
            else None,
            "shapes": results["shapes"],
            "epochs": results["epochs"],
            "steps": results["steps"],
            "inputs": inputs_of(folder),
            "training_seconds": results["seconds"],
            **cost.so_far(),
            "environment": described_environment(machine.device),
        }
        (out / "records").mkdir(exist_ok=True)
        write_json(record_path(out, cell), record)
    if keep == "student":
        forget_training(folder)
    return record


def forget_training(folder: Path) -> None:
    """Delete what only resuming and looking back need; student.safetensors and the JSON files stay."""
    for name in ("state.pt", "last.safetensors", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def feature_dim(study: Study) -> int:
    """The teachers' feature size; all must have one, for the students to be the same network."""
    sizes = {
        override(TrainTeacher(Path()), values.get("teacher"), f"teachers.{name}.teacher").feature_dim
        for name, values in study.teachers.items()
    }
    if len(sizes) > 1:
        raise ValueError(
            f"the teachers' features have different sizes {sorted(sizes)}: give them one feature_dim"
        )
    return sizes.pop()


def summarise(study: Study, out: Path) -> dict[str, Any]:
    """Table on the terminal; table.md, summary.json and chart.png in the folder."""
    records = read_records(out)
    if not records:
        warn("no cell is finished yet")
        return {"rows": []}
    tests = ["test", *study.tests]
    rows = rows_of(
        records, list(study.students), list(study.methods), list(study.teachers), study.baseline,
        study.paper, tests,
    )  # fmt: skip
    headings, lines = table_of(rows, tests)
    table = Table(*headings, box=box.SIMPLE, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*(text.replace("**", "") for text in line))
    # a file has no width: no heading need be cut short
    console.print(table, width=None if console.is_terminal else 200, crop=False)
    text = markdown(headings, lines) + "\n"
    text += "\n".join(f"{note}\n" for note in notes(records, study.baseline, bool(study.paper)))
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(text)
    write_json(out / "summary.json", {"rows": rows, "cells": len(records)})
    save_rows(rows, out / "chart.png")
    say(f"{out / 'table.md'}, {out / 'chart.png'}")
    return {"rows": rows}
