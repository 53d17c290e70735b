"""What is pre-training by pictures worth? Students × methods × seeds, each measured in several ways.

    python -m benchmarks.pretraining --config benchmarks/configs/pretraining.yaml --out runs/pretraining
    python -m benchmarks.pretraining --config … --out … --methods none Pic@Point --measures probe "5 labels"
    python -m benchmarks.pretraining --config … --out … --keep          # copies the records that there are

Every piece (one pre-training, or one measure of one network) leaves a record when it ends, and one that has a
record is not done again; a piece that was killed goes on where its run folder stands. The row of the
baseline is not pre-trained: random frozen features where features are measured, training from scratch where
training goes on. Nothing is chosen on a test set: C by cross-validation on training shapes, the last epoch.

In the folder: ``plan.json``, the resolved configuration; ``records/STUDENT/METHOD/SEED/MEASURE.json``;
``networks/`` and ``cells/`` are run folders. :func:`section` makes the part of docs/results.md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS
from pointcmt.recipes.build import StudentOptions
from pointcmt.recipes.config import override, plain, read_json, read_yaml, write_json
from pointcmt.recipes.engine import MachineOptions
from pointcmt.recipes.few_shot import FewShot, few_shot
from pointcmt.recipes.options import DataOptions
from pointcmt.recipes.pretrain import Pretrain, pretrain
from pointcmt.recipes.pretrain import check as check_pretrain
from pointcmt.recipes.probe import Probe, probe
from pointcmt.recipes.progress import say
from pointcmt.recipes.run import described_environment, held
from pointcmt.recipes.train import Train, train
from pointcmt.studies.ablate import Cost, forget_training
from pointcmt.studies.tables import excludes_zero, interval_text, markdown, mean_sd, paired_interval

SECTIONS = (
    "about", "data", "students", "pretrain", "methods", "measures", "train", "compare", "seeds",
)  # fmt: skip
KINDS = ("probe", "few-shot", "train")
PRETRAIN = "pretrain"
"""The measure that is no measure: the pre-training itself, whose record says what it took."""


@dataclass(frozen=True)
class Piece:
    """One thing to do, with a record of its own."""

    student: str
    method: str
    seed: int
    measure: str

    @property
    def path(self) -> Path:
        return Path(self.student, self.method, str(self.seed), f"{self.measure}.json")


@dataclass
class Plan:
    """A configuration, checked."""

    about: str
    data: DataOptions
    students: dict[str, StudentOptions]
    pretrain: dict[str, Any]
    methods: dict[str, dict[str, Any] | None]
    measures: dict[str, dict[str, Any]]
    train: dict[str, Any]
    compare: list[list[str]]
    seeds: list[int]

    @property
    def baseline(self) -> str:
        """The method that is no pre-training."""
        return next(name for name, values in self.methods.items() if values is None)

    def pieces(self) -> Iterator[Piece]:
        """All pieces; seed by seed, so that a study that is stopped has paired ones."""
        for seed, student, (method, values) in itertools.product(
            self.seeds, self.students, self.methods.items()
        ):
            for measure in ([] if values is None else [PRETRAIN]) + list(self.measures):
                yield Piece(student, method, seed, measure)

    def pretraining(self, piece: Piece, out: Path) -> Pretrain:
        """The command that pre-trains the network of a piece."""
        options = Pretrain(
            out / "networks" / piece.student / piece.method / str(piece.seed),
            student=copy.deepcopy(self.students[piece.student]),
            data=self.data,
            resume=True,
        )
        options = override(options, self.pretrain, "pretrain")
        options = override(options, self.methods[piece.method], f"methods.{piece.method}")
        options.loop.seed = piece.seed
        return options

    def measuring(self, piece: Piece, out: Path) -> Probe | FewShot | Train:
        """The command that measures the network of a piece."""
        values = dict(self.measures[piece.measure])
        kind, where = values.pop("kind"), f"measures.{piece.measure}"
        pretrained = self.methods[piece.method] is not None
        network = self.pretraining(piece, out).out if pretrained else None
        student, data = copy.deepcopy(self.students[piece.student]), copy.deepcopy(self.data)
        if kind == "train":
            made = Train(out / "cells" / piece.path.with_suffix(""), student=student, data=data, resume=True)
            made.method.method, made.init = "none", network
            made = override(override(made, self.train, "train"), values, where)
            made.loop.seed = piece.seed
            return made
        command = {"probe": Probe, "few-shot": FewShot}[kind]
        return override(
            command(network, student=student, data=data, random=not pretrained, seed=piece.seed),
            values,
            where,
        )


def read_plan(path: Path) -> Plan:
    """Read and check a configuration.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown or missing section, option or value; a comparison of what is not there.
    """
    raw = read_yaml(path)
    if raw.keys() != set(SECTIONS):
        raise ValueError(f"{path} has the sections {', '.join(raw)}; expected {', '.join(SECTIONS)}")
    plan = Plan(
        about=raw["about"],
        data=override(DataOptions(), raw["data"], "data"),
        students={
            name: override(StudentOptions(), values, f"students.{name}")
            for name, values in raw["students"].items()
        },
        pretrain=raw["pretrain"],
        methods=raw["methods"],
        measures=raw["measures"],
        train=raw["train"],
        compare=raw["compare"],
        seeds=raw["seeds"],
    )
    if list(plan.methods.values()).count(None) != 1:
        raise ValueError(f"{path}: methods: expected exactly one that is null, the baseline")
    for name, values in plan.measures.items():
        if values.get("kind") not in KINDS:
            raise ValueError(f"{path}: measures.{name}.kind: expected one of {', '.join(KINDS)}")
    for pair in plan.compare:
        if len(pair) != 2 or not plan.methods.keys() >= set(pair):
            raise ValueError(f"{path}: compare: {pair} are not two of the methods {', '.join(plan.methods)}")
    for piece in plan.pieces():
        if piece.measure == PRETRAIN:
            check_pretrain(plan.pretraining(piece, Path()))
        else:
            plan.measuring(piece, Path())
    return plan


def resolved(plan: Plan) -> dict[str, Any]:
    """A plan as plain JSON, without where its files lie."""
    return {**plain(dataclasses.asdict(plan)), "data": _named(plan.data)}


def _named(data: DataOptions) -> dict[str, Any]:
    return {name: value for name, value in plain(data).items() if name not in ("data", "data_cache")}


# ---- doing it


def run_piece(plan: Plan, piece: Piece, out: Path, machine: MachineOptions) -> dict[str, Any]:
    """Do one piece and write its record."""
    with Cost(out / "costs" / piece.path) as cost:
        found = (
            pretrained(plan, piece, out, machine)
            if piece.measure == PRETRAIN
            else measured(plan, piece, out, machine)
        )
        record = {
            **dataclasses.asdict(piece),
            **found,
            **cost.so_far(),
            "environment": described_environment(machine.device),
        }
    path = out / "records" / piece.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def pretrained(plan: Plan, piece: Piece, out: Path, machine: MachineOptions) -> dict[str, Any]:
    options = plan.pretraining(piece, out)
    options.machine = machine
    results = pretrain(options)
    forget_training(options.out)
    wanted = (
        "last", "steps", "epochs", "encoder", "views", "views_per_step", "losses_at_chance", "parameters",
        "not_trained", "shapes",
    )  # fmt: skip
    return {name: results[name] for name in wanted}


def measured(plan: Plan, piece: Piece, out: Path, machine: MachineOptions) -> dict[str, Any]:
    """``value``, OA in % on test shapes, and what else the command says of it."""
    options = plan.measuring(piece, out)
    options.machine = machine
    if isinstance(options, Train):
        results = train(options)
        forget_training(options.out)
        return {
            "value": results["last"]["test_oa"],
            **{name: results[name] for name in ("last", "initialised", "shapes", "steps", "parameters")},
        }
    found = probe(options) if isinstance(options, Probe) else few_shot(options)
    (row,) = found["rows"].values()
    if isinstance(options, Probe):
        return {"value": row["oa"], "row": row, "protocol": found["protocol"]}
    values = [setting["mean"] for setting in row.values()]
    return {"value": float(np.mean(values)), "row": row, "protocol": found["protocol"]}


def run(plan: Plan, pieces: Sequence[Piece], out: Path, machine: MachineOptions) -> None:
    """Do the pieces that have no record yet.

    Raises:
        ValueError: the folder holds records of another configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    with held(out):
        check_unchanged(out / "plan.json", plan)
        todo = [piece for piece in pieces if not (out / "records" / piece.path).exists()]
        for number, piece in enumerate(todo, 1):
            record = run_piece(plan, piece, out, machine)
            value = f"{record['value']:.2f} %" if "value" in record else str(record["last"])
            say(
                f"[{number}/{len(todo)}] {piece.path.with_suffix('')}: {value}, {record['cpu_seconds']:.0f} s"
            )


def check_unchanged(path: Path, plan: Plan) -> None:
    """More students, methods, measures or seeds extend a study; what there is must stay as it was."""
    described = resolved(plan)
    if path.exists():
        before = read_json(path)
        # options that came with a newer version of the package were at their defaults then
        before["data"] = {**_named(DataOptions()), **before["data"]}
        defaults = plain(StudentOptions())
        before["students"] = {name: {**defaults, **made} for name, made in before["students"].items()}
        changed = [name for name in ("data", "pretrain", "train") if before[name] != described[name]]
        for section in ("students", "methods", "measures"):
            both = before[section].keys() & described[section].keys()
            changed += [f"{section}.{n}" for n in both if before[section][n] != described[section][n]]
        if changed:
            raise ValueError(
                f"{path.parent} holds records of a configuration with other {', '.join(changed)}: give "
                "another --out, or put the configuration back"
            )
    write_json(path, described)


# ---- the page


class Measured:
    """A study as its records tell it.

    Args:
        folder: with ``plan.json`` and ``records/``.
    """

    def __init__(self, folder: Path) -> None:
        self.plan = read_json(folder / "plan.json")
        self.records = [read_json(path) for path in sorted((folder / "records").rglob("*.json"))]
        self.baseline = next(name for name, values in self.plan["methods"].items() if values is None)

    def values(self, student: str, method: str, measure: str) -> dict[int, float]:
        """OA in % by seed."""
        return {
            r["seed"]: r["value"]
            for r in self.records
            if (r["student"], r["method"], r["measure"]) == (student, method, measure)
        }

    def difference(self, student: str, method: str, other: str, measure: str) -> np.ndarray:
        """``method`` minus ``other``, of the seeds that both have."""
        ours, theirs = self.values(student, method, measure), self.values(student, other, measure)
        return np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])

    def minutes(self, student: str, method: str) -> list[float]:
        """Core-minutes of each pre-training."""
        return [
            r["cpu_seconds"] / 60
            for r in self.records
            if (r["student"], r["method"], r["measure"]) == (student, method, PRETRAIN)
        ]

    def there(self, names: str, **where: str) -> list[str]:
        """The students, methods or measures, in the plan's order, that have records."""
        found = {
            r[names.rstrip("s")] for r in self.records if all(r[key] == value for key, value in where.items())
        }
        return [name for name in self.plan[names] if name in found]


def section(folder: Path) -> str:
    """The part of docs/results.md."""
    study = Measured(folder)
    title, _, text = study.plan["about"].strip().partition("\n")
    seeds = sorted({r["seed"] for r in study.records})
    environment = study.records[0]["environment"]
    total = sum(r["cpu_seconds"] for r in study.records) / 60
    steps = sorted({r["steps"] for r in study.records if r["measure"] == PRETRAIN})
    parts = [
        f"## {title}",
        text.strip(),
        f"Seeds {', '.join(map(str, seeds))}; {len(study.records)} records, {total:.0f} core-minutes on "
        f"{environment['cores']} shared cores of {environment['processor']}; pre-training of "
        f"{' or '.join(map(str, steps))} steps.\n\n```\npython -m benchmarks.pretraining --config "
        "benchmarks/configs/pretraining.yaml --out runs/pretraining\n```",
    ]
    for student in study.there("students"):
        measures = study.there("measures", student=student)
        parts += [f"### {student}, pre-trained", markdown(*table(study, student, measures)).rstrip()]
        lines = comparisons(study, student, measures)
        if lines:
            parts += [
                "Does a part help? The first minus the second, paired by seed:",
                markdown(["", "", *measures], lines).rstrip(),
            ]
        parts += ["\n".join(f"- {line}" for line in verdicts(study, student, measures))]
    parts += [
        "OA in % on test shapes, mean ± standard deviation over the seeds, and the difference to "
        f"`{study.baseline}`, paired by seed, with the 95 % t-interval (bold: it excludes zero). "
        "Cost: core-minutes of one pre-training."
    ]
    fewest = min(
        len(study.minutes(student, method))
        for student in study.there("students")
        for method in study.there("methods", student=student)
        if method != study.baseline
    )
    if fewest < len(study.plan["seeds"]):
        parts += [
            f"The study is not finished: a row has as few as {fewest} of {len(study.plan['seeds'])} seeds, "
            "and a figure of one seed has no interval and shows no difference. The command above goes on "
            "with it."
        ]
    return "\n\n".join(part for part in parts if part)


def table(study: Measured, student: str, measures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: a row for each method."""
    lines = []
    for method in study.there("methods", student=student):
        minutes = study.minutes(student, method)
        line = [method, f"{np.mean(minutes):.1f}" if minutes else "–"]
        for measure in measures:
            values = list(study.values(student, method, measure).values())
            text = mean_sd(values) if values else "–"
            gains = study.difference(student, method, study.baseline, measure)
            if method != study.baseline and len(gains) > 1:
                text += f" ({interval_text(paired_interval(gains))})"
            line.append(text)
        lines.append(line)
    return ["method", "cost", *measures], lines


def comparisons(study: Measured, student: str, measures: Sequence[str]) -> list[list[str]]:
    """A line for each comparison of the plan that there are two seeds of."""
    lines = []
    for ours, theirs in study.plan["compare"]:
        cells = [
            interval_text(paired_interval(study.difference(student, ours, theirs, measure)))
            for measure in measures
        ]
        if any(cell != "–" for cell in cells):
            lines.append([ours, theirs, *cells])
    return lines


def verdicts(study: Measured, student: str, measures: Sequence[str]) -> list[str]:
    """For each measure, the best method on the mean and whether it is clearly above the baseline."""
    said = []
    for measure in measures:
        gains = {
            method: study.difference(student, method, study.baseline, measure)
            for method in study.there("methods", student=student)
            if method != study.baseline
        }
        gains = {method: values for method, values in gains.items() if len(values) > 1}
        if not gains:
            continue
        best = max(gains, key=lambda method: float(gains[method].mean()))
        interval = paired_interval(gains[best])
        assert interval is not None
        clear = "excludes" if excludes_zero(interval) else "includes"
        said.append(
            f"{measure}: {best} is the highest, {interval[0]:+.2f} ± {interval[1]:.2f} over "
            f"`{study.baseline}`; the interval {clear} zero. It is the highest of {len(gains)}, so that the "
            "interval flatters it."
            if len(gains) > 1
            else f"{measure}: {best}, {interval[0]:+.2f} ± {interval[1]:.2f} over `{study.baseline}`; the "
            f"interval {clear} zero."
        )
    return said


def keep(run_folder: Path, name: str = "pretraining") -> Path:
    """Copy what the page needs into ``benchmarks/results``; returns where."""
    target = RESULTS / name
    for source in [run_folder / "plan.json", *sorted((run_folder / "records").rglob("*.json"))]:
        copied = target / source.relative_to(run_folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copied)
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretraining", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    for part in ("students", "methods", "measures"):
        parser.add_argument(f"--{part}", nargs="+", help=f"these {part} alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds alone")
    parser.add_argument("--keep", action="store_true", help="run nothing, copy records for docs/results.md")
    options = parser.parse_args(argv)
    if options.keep:
        print(keep(options.out))
        return 0
    plan = read_plan(options.config)
    wanted: Mapping[str, Sequence[Any] | None] = {
        "student": options.students,
        "method": options.methods,
        "measure": options.measures and [PRETRAIN, *options.measures],
        "seed": options.seeds,
    }
    for name, values in wanted.items():
        known = {getattr(piece, name) for piece in plan.pieces()} | {PRETRAIN}
        if unknown := [value for value in values or [] if value not in known]:
            parser.error(f"{name} {unknown[0]!r} is not in {options.config}")
    pieces = [
        piece
        for piece in plan.pieces()
        if all(values is None or getattr(piece, name) in values for name, values in wanted.items())
    ]
    run(plan, pieces, options.out, MachineOptions(device="cpu", progress=False, tensorboard=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
