"""The configuration of a study: read, and checked to the last value before anything is trained."""

from __future__ import annotations

import dataclasses
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointcmt.data.files import folded, same_files
from pointcmt.recipes import train as stage3
from pointcmt.recipes import train_generator as stage2
from pointcmt.recipes import train_teacher as stage1
from pointcmt.recipes.build import StudentOptions, check_named_by_file
from pointcmt.recipes.config import override, plain, read_json, read_yaml, structure, write_json
from pointcmt.recipes.evaluate import Evaluate
from pointcmt.recipes.options import DataOptions, ViewOptions
from pointcmt.recipes.train import MethodOptions, Train
from pointcmt.recipes.train_generator import TrainGenerator
from pointcmt.recipes.train_teacher import TrainTeacher

SECTIONS = (
    "about", "data", "views", "teachers", "students", "methods", "seeds", "train", "tests", "paper",
    "baseline",
)  # fmt: skip


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
        return plain({"data": data, "views": self.views, "train": self.train})

    def named(self) -> dict[str, dict[str, Any]]:
        """What a study can be extended by."""
        students = {
            name: dataclasses.asdict(options) | {"train": self.student_train[name]}
            for name, options in self.students.items()
        }
        return plain(
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


def read_study(path: Path) -> Study:
    """Read and check a configuration.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML; an unknown section, option, value or choice; a section that is missing; a name
            that stands twice or is no name of a file; what, where, and what is expected.
    """
    try:
        return _study(read_yaml(path), path)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _study(raw: dict[str, Any], path: Path) -> Study:
    if unknown := sorted(map(str, raw.keys() - set(SECTIONS))):
        raise ValueError(f"unknown section {', '.join(unknown)}; expected {', '.join(SECTIONS)}")
    for section in ("students", "methods", "seeds"):
        if not raw.get(section):
            raise ValueError(f"section {section!r} is missing or empty")
    seeds = structure(raw["seeds"], tuple[int, ...], "seeds")
    if twice := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise ValueError(f"seeds: {twice[0]} stands twice; each cell is trained once")
    if min(seeds) < 0:
        raise ValueError(f"seeds has {min(seeds)}; expected 0 or more")
    methods = {
        name: override(MethodOptions(), values, f"methods.{name}")
        for name, values in _entries(raw, "methods").items()
    }
    baseline = structure(raw.get("baseline", "none"), str, "baseline")
    if baseline not in methods:
        raise ValueError(f"the baseline {baseline!r} is not among the methods {', '.join(methods)}")
    teachers = _entries(raw, "teachers") if raw.get("teachers") else {"teacher": {}}
    for name, values in teachers.items():
        if unknown := sorted(map(str, values.keys() - {"data", "teacher", "generator"})):
            raise ValueError(f"teachers.{name} has {', '.join(unknown)}; expected data, teacher, generator")
    students, student_train = {}, {}
    for name, values in _entries(raw, "students").items():
        student_train[name] = _mapping(values.pop("train", None), f"students.{name}.train")
        students[name] = override(StudentOptions(), values, f"students.{name}")
        check_named_by_file(students[name].student, path)
    paper = structure(raw.get("paper") or {}, dict[str, dict[str, float]], "paper")
    for name, figures in paper.items():
        if name not in students or figures.keys() - methods.keys():
            wrong = name if name not in students else f"{name}.{min(figures.keys() - methods.keys())}"
            raise ValueError(f"paper.{wrong}: there is no such student or method")
    study = Study(
        data=override(DataOptions(), raw.get("data"), "data"),
        views=override(ViewOptions(), raw.get("views"), "views"),
        teachers=teachers,
        students=students,
        student_train=student_train,
        methods=methods,
        seeds=list(seeds),
        train=_mapping(raw.get("train"), "train"),
        tests=_entries(raw, "tests"),
        paper=paper,
        baseline=baseline,
        about=structure(raw.get("about") or "", str, "about"),
    )
    check(study)
    return study


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r:.60}; expected a mapping")
    return dict(value)


def _entries(raw: Mapping[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """A section of named entries; names become names of files."""
    entries = {}
    for name, values in _mapping(raw.get(section), section).items():
        # an accent may be stored as a character of its own
        one = unicodedata.normalize("NFC", name) if isinstance(name, str) else ""
        if not re.fullmatch(r"\w[\w .+=()-]*", one):
            raise ValueError(
                f"{section}: {name!r} is no name; expected letters, digits and . + = ( ) - _ and spaces, the "
                "first a letter or a digit: it becomes the name of a file (a word such as yes or 1 is a name "
                "in quotes)"
            )
        entries[name] = _mapping(values, f"{section}.{name}")
    for pair in same_files(entries):
        raise ValueError(f"{section}: {_SAME_FILES.format(*pair)}")
    return entries


_SAME_FILES = (
    "{!a} and {!a} differ in nothing but capitals or how an accent is stored, and on some systems name one "
    "file: give them names that differ"
)


def check(study: Study) -> None:
    """A mistake in any section is found before anything is trained.

    Raises:
        ValueError: what, and where.
    """
    names = Counter([folded(cell.name) for cell in study.cells()])
    names.update(folded(f"teacher-{name}") for name in study.teachers)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"two cells are called {twice[0]}, by other names of student, method and teacher: the records of "
            "one would be taken for the other's. Give them names that differ"
        )
    if "test" in study.tests:
        raise ValueError(
            "tests.test: test is the name of the data's own test shapes, which are always measured; give it "
            "another"
        )
    study.views.spec("z")  # any axis: the others of its arguments are checked
    for name, values in study.teachers.items():
        where = f"teachers.{name}"
        data = override(study.data, values.get("data"), f"{where}.data")
        teacher = TrainTeacher(Path(), data=data, views=study.views)
        _inside(
            f"{where}.teacher", stage1.check, override(teacher, values.get("teacher"), f"{where}.teacher")
        )
        generator = TrainGenerator(Path(), Path(), data=data)
        generator = override(generator, values.get("generator"), f"{where}.generator")
        _inside(f"{where}.generator", stage2.check, generator)
    for name in study.students:
        plan = training(Train(Path(), data=study.data), study, name)
        for method_name, method in study.methods.items():
            _inside(
                f"students.{name} under methods.{method_name}",
                stage3.check_options,
                dataclasses.replace(plan, method=method, student=study.students[name]),
            )
    for name, values in study.tests.items():
        override(Evaluate(Path()), values, f"tests.{name}")
    if study.teachers:
        feature_dim(study)


def _inside(where: str, check: Any, options: Any) -> None:
    try:
        check(options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def training(plan: Train, study: Study, student: str) -> Train:
    """A plan with the study's options of training in it, then the student's own."""
    plan = override(plan, study.train, "train")
    return override(plan, study.student_train[student], f"students.{student}.train")


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
                default = plain(resolved[section])
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
            for pair in same_files(entries):  # the names that are there, and those that are new
                raise ValueError(f"{path.parent} holds {section}: {_SAME_FILES.format(*pair)}")
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
    if not path.exists() or read_json(path) != plain(described):
        write_json(path, described)
