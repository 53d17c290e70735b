"""Students and objectives by name."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pointcmt import objectives, students
from pointcmt.objectives import Objective
from pointcmt.recipes.options import parse_assignments

STUDENTS = ("pointnet2", "dgcnn", "rscnn", "pointmlp")


@dataclass
class StudentOptions:
    """Which student."""

    student: str = "pointnet2"
    """pointnet2, dgcnn, rscnn or pointmlp; or module:factory for a network of your own."""
    width: float | None = None
    """Factor for the widths of all layers but the feature (students of this package only); default: 1."""
    feature_dim: int | None = None
    """Size of the student's feature, for a factory that takes one; default: the teacher's, else the
    factory's own."""
    student_options: tuple[str, ...] = ()
    """Further arguments of the student, as NAME=VALUE, such as variant=msg."""
    adapter: str | None = None
    """Name of the adapter; default: the registered one that matches, else the generic one."""


def make_student(options: StudentOptions, num_classes: int) -> nn.Module:
    """Build the student.

    Args:
        options: its name and arguments; ``feature_dim`` is given to the factory where it takes one.
        num_classes: K, given to the factory as ``num_classes``.

    Raises:
        ValueError: an unknown name, or a factory that does not make a module.
    """
    arguments = parse_assignments(options.student_options, "--student-options")
    factory = find_factory(options.student)
    if options.width is not None:
        arguments["width"] = options.width
    accepted = inspect.signature(factory).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if options.feature_dim is not None and "feature_dim" in accepted:
        arguments.setdefault("feature_dim", options.feature_dim)
    unknown = [name for name in arguments if name not in accepted and not takes_all]
    if unknown:
        raise ValueError(
            f"student {options.student} does not take {', '.join(unknown)}; it takes {', '.join(accepted)}"
        )
    if "num_classes" in accepted or takes_all:
        arguments.setdefault("num_classes", num_classes)
    try:
        model = factory(**arguments)
    except TypeError as error:
        raise ValueError(f"student {options.student}({arguments}) could not be made: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{options.student} made a {type(model).__name__}; expected a torch.nn.Module")
    return model


def find_factory(name: str) -> Callable[..., Any]:
    """The factory of a student: one of this package's, or ``module:factory``.

    Raises:
        ValueError: there is none of that name.
    """
    if name in STUDENTS:
        return getattr(students, name)
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"unknown student {name!r}; expected one of {', '.join(STUDENTS)}, or module:factory for your "
            f"own "
            "(module importable from the current folder)"
        )
    if os.getcwd() not in sys.path:  # as `python -m` does: the user's own module lies where they are
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"--student {name}: cannot import {module_name}: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"--student {name}: {module_name} has no {attribute}")
    return getattr(module, attribute)


def split_weights(pairs: Sequence[str]) -> dict[str, float]:
    """``("soft_labels=1", "nst=50")`` as weights by name."""
    weights = parse_assignments(pairs, "--objectives")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"--objectives {name}={weight}: expected a number as weight")
    return {name: float(weight) for name, weight in weights.items()}


def objective_classes() -> dict[str, type[Objective]]:
    """Every objective of the package by its name."""
    found = [value for value in vars(objectives).values() if inspect.isclass(value)]
    return {
        cls.default_name: cls for cls in found if issubclass(cls, Objective) and not inspect.isabstract(cls)
    }


def make_objectives(
    fe_weight: float, ce_weight: float, further: Sequence[str] = (), fe_distance: str = "emd"
) -> list[Objective]:
    """FE and CE where they have a weight, and further objectives as NAME=WEIGHT.

    Raises:
        ValueError: an unknown name, or a weight that is no number.
    """
    known = objective_classes()
    made: list[Objective] = []
    if fe_weight:
        made.append(objectives.FeatureEnhancement(fe_weight, distance=fe_distance))
    if ce_weight:
        made.append(objectives.ClassifierEnhancement(ce_weight))
    for name, weight in split_weights(further).items():
        if name not in known:
            raise ValueError(f"--objectives {name}: expected one of {', '.join(sorted(known))}")
        made.append(known[name](weight=weight))
    return made
