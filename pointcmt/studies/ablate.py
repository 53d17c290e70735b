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
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pointcmt.checkpoint import atomic_write, naming_file
from pointcmt.recipes.build import IMPORTED
from pointcmt.recipes.config import override, read_json, write_json
from pointcmt.recipes.engine import MachineOptions, OutOfTime
from pointcmt.recipes.evaluate import Evaluate, evaluate
from pointcmt.recipes.features import CacheFeatures, cache_features
from pointcmt.recipes.options import parse_assignments
from pointcmt.recipes.progress import say, show_table, warn
from pointcmt.recipes.run import described_environment, held
from pointcmt.recipes.train import Train, train
from pointcmt.recipes.train_generator import TrainGenerator, train_generator
from pointcmt.recipes.train_teacher import TrainTeacher, train_teacher
from pointcmt.studies.charts import save_rows
from pointcmt.studies.configuration import Cell, Study, check_unchanged, feature_dim, read_study, training
from pointcmt.studies.jobs import Job, run_jobs, serve, slots, submit
from pointcmt.studies.tables import markdown, notes, read_records, rows_of, table_of


@dataclass
class Ablate:
    """Students × methods × seeds from one configuration file, a table with intervals, and a chart."""

    config: Path
    """YAML file; the module pointcmt.studies.ablate shows one."""
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
    cell: str | None = None
    """Do this piece alone: the name of a cell whose teacher is there, or teacher-NAME. It is what --submit
    runs, and what a script of your own may run on any machine that sees the folder."""
    submit: tuple[str, ...] | None = None
    """Hand the cells to SLURM, by submitit, with its parameters as NAME=VALUE: timeout_min=240
    slurm_partition=gpu gpus_per_node=1."""
    machine: MachineOptions = field(default_factory=MachineOptions)


def ablate(options: Ablate) -> dict[str, Any] | int:
    """Run the cells that are not finished, then write table and chart; returns the rows, or of one --cell
    the exit code.

    Raises:
        RuntimeError: cells failed; the others are finished, and the message names those with their logs.
    """
    study = read_study(options.config)
    if options.data is not None:
        study.data.data = options.data
    out = options.out or Path("runs") / options.config.stem
    with naming_file(out):
        out.mkdir(parents=True, exist_ok=True)
    if options.cell is not None:
        names = [*(f"teacher-{name}" for name in study.teachers), *(cell.name for cell in study.cells())]
        if options.cell not in names:
            raise ValueError(f"--cell {options.cell}: expected one of {', '.join(names)}")
        return serve(lambda: run_one(options, study, out))
    with contextlib.nullcontext() if options.table else held(out):
        return run_study(options, study, out)


def run_one(options: Ablate, study: Study, out: Path) -> None:
    """The piece of work that ``--cell`` names."""
    assert options.cell is not None
    cells = {cell.name: cell for cell in study.cells()}
    if options.cell in cells:
        run_cell(study, cells[options.cell], out, options.machine, options.keep)
    else:
        prepare(study, options.cell.removeprefix("teacher-"), out, options.machine)


def run_study(options: Ablate, study: Study, out: Path) -> dict[str, Any]:
    """:func:`ablate` in a folder that no other command is at work in."""
    check_unchanged(out / "study.json", study)
    cells = [cell for cell in study.cells() if options.only is None or options.only in cell.name]
    if not cells:
        names = ", ".join(cell.name for cell in study.cells())
        raise ValueError(f"--only {options.only}: no cell's name contains it; there are {names}")
    todo = [cell for cell in cells if not finished(study, cell, out)]
    failures: list[str] = []
    if not options.table and todo:
        failures = run_cells(options, study, out, cells, todo)
    rows = summarise(study, out)
    if failures:
        raise RuntimeError(f"{len(failures)} failed:\n" + "\n".join(failures))
    return rows


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

    def job(name: str, call: Callable[[], object], needs: tuple[str, ...] = ()) -> Job:
        return Job(name, call, command_of(options, out, name), needs)

    def trained(cell: Cell) -> Callable[[], object]:
        return partial(run_cell, study, cell, out, options.machine, options.keep)

    teachers = dict.fromkeys(cell.teacher for cell in todo if cell.teacher is not None)
    jobs = [job(f"teacher-{name}", partial(prepare, study, name, out, options.machine)) for name in teachers]
    jobs += [
        job(cell.name, trained(cell), () if cell.teacher is None else (f"teacher-{cell.teacher}",))
        for cell in todo
    ]
    if options.submit is not None:
        handed = submit(jobs, out / "logs", parse_assignments(options.submit, "--submit"))
        say(
            "".join(f"{number}  {name}\n" for name, number in handed.items())
            + f"their output is in {out / 'logs'}"
        )
        return []
    places = slots(options.machine, options.jobs)
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
                    record = read_json(record_path(out, by_name[name]))
                    say(f"[{done}/{len(cells)}] {name}: {in_words(record)}; {left}")
                else:
                    results = read_json(
                        out / "teachers" / name.removeprefix("teacher-") / "teacher/results.json"
                    )
                    say(f"{name}: test {results['last']['test_oa']:.2f}")
    except OutOfTime as stop:
        say(f"out of time: {stop}")
    return failures


def command_of(options: Ablate, out: Path, name: str) -> list[str]:
    """Arguments of ``python`` that do one piece of the study in a process of its own."""
    words: list[object] = [
        "-m",
        "pointcmt",
        "ablate",
        "--config",
        options.config,
        "--out",
        out,
        "--cell",
        name,
    ]
    words += ["--keep", options.keep] + (["--data", options.data] if options.data is not None else [])
    for item in dataclasses.fields(options.machine):
        value, option = getattr(options.machine, item.name), item.name.replace("_", "-")
        words += (
            [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", value]
        )
    for module in IMPORTED:
        words += ["--import", module]
    return [str(word) for word in words]


def in_words(record: Mapping[str, Any]) -> str:
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


def prepare(study: Study, name: str, out: Path, machine: MachineOptions) -> None:
    """Train the teacher of that name and its generator, and compute its features of the students' shapes,
    where that is not done yet."""
    values = study.teachers[name]
    where = f"teachers.{name}"
    data = override(study.data, values.get("data"), f"{where}.data")
    folder = out / "teachers" / name
    path = out / "records/teachers" / f"{name}.json"
    # absent too where a kill came between the last of the training and the record
    made_now = not path.exists() or not (folder / "teacher" / "results.json").exists()
    with Cost(out / "costs" / f"teacher-{name}.json") as cost:
        plan = TrainTeacher(folder / "teacher", data=data, views=study.views, machine=machine, resume=True)
        results = train_teacher(override(plan, values.get("teacher"), f"{where}.teacher"))
        generator = None
        if any(method.needs_generator() for method in study.methods.values()):
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
                images=plan.images,
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
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record)


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
            generator=teachers / "generator" if method.needs_generator() else None,
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
        # before the record: a cell that has one is not looked at again
        if keep == "student":
            forget_training(folder)
        (out / "records").mkdir(exist_ok=True)
        write_json(record_path(out, cell), record)
    return record


def forget_training(folder: Path) -> None:
    """Delete what only resuming and looking back need; student.safetensors and the JSON files stay."""
    for name in ("state.pt", "last.safetensors", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


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
    show_table(headings, [[text.replace("**", "") for text in line] for line in lines], keys=2)
    text = markdown(headings, lines) + "\n"
    text += "\n".join(f"{note}\n" for note in notes(records, study.baseline, bool(study.paper)))
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(text)
    write_json(out / "summary.json", {"rows": rows, "cells": len(records)})
    save_rows(rows, out / "chart.png")
    say(f"{out / 'table.md'}, {out / 'chart.png'}")
    return {"rows": rows}
