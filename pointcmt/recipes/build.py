"""Students and objectives by name, and the user's own modules."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pointcmt import objectives
from pointcmt.adapters import INPUT_LAYOUTS, Adapter, find_adapter
from pointcmt.data import PointDataset
from pointcmt.objectives import Objective
from pointcmt.recipes.options import parse_assignments
from pointcmt.students.registry import list_students

IMPORTED: list[str] = []
"""What was given by --import, for the processes that this one starts."""


@dataclass
class StudentOptions:
    """Which student."""

    student: str = "pointnet2"
    """pointnet2, dgcnn, rscnn, pointmlp, pointnext, one that --import registers; or module:factory for a
    network of your own."""
    width: float | None = None
    """Factor for the widths of all layers but the feature (students of this package only); default: 1."""
    feature_dim: int | None = None
    """Size of the student's feature, for a factory that takes one; default: the teacher's, else the
    factory's own."""
    student_options: tuple[str, ...] = ()
    """Further arguments of the student, as NAME=VALUE, such as variant=msg."""
    adapter: str | None = None
    """Name of the adapter; default: the registered one that matches, else the generic one."""
    layout: str | None = None
    """How the student takes its clouds: BN3, B3N or pos_x; default: as its adapter says, else the first of
    these that it takes."""


def import_module(name: str) -> Any:
    """Import a user's module: ``package.module`` from the current folder or the path, or ``folder/file.py``.

    What it registers (adapters, students, objectives, data sets) is known from then on.

    Raises:
        ValueError: there is no such module, or it ends with an error.
    """
    if os.getcwd() not in sys.path:  # as `python -m` does: the user's own module lies where they are
        sys.path.insert(0, os.getcwd())
    try:
        if not name.endswith(".py"):
            module = importlib.import_module(name)
        else:
            path = Path(name)
            if not path.is_file():
                raise ImportError(f"there is no file {path.resolve()}")
            if path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", "") == str(path):
                return sys.modules[path.stem]
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module  # the code may import itself by name
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"cannot import {name!r}: {type(error).__name__}: {error}; expected a module that Python imports "
            "from the current folder. Install it, or add its folder to PYTHONPATH"
        ) from error
    if name not in IMPORTED:
        IMPORTED.append(name)
    return module


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
        raise ValueError(
            f"student {options.student}({arguments}) could not be made: {error}; expected the arguments that "
            "its factory has. Mend --student-options"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{options.student} made a {type(model).__name__}; expected a torch.nn.Module")
    return model


# of the networks for parts and scenes of this package, which arguments follow from the data
_SEGMENTERS = {
    "pointnet2_part": ("in_channels", "categories"),
    "pointnet2_scene": ("in_channels",),
    "dgcnn_part": ("categories",),
    "dgcnn_scene": ("in_channels",),
    "pointnext_part": ("in_channels", "categories"),
    "pointnext_scene": ("in_channels",),
}


def segmenter_options(options: StudentOptions, data: PointDataset, channels: int) -> StudentOptions:
    """The options with what follows from the data, for a network for parts or scenes of this package: its
    channels and, where the data has categories of parts, their number. Others are given back as they are."""
    made = copy.deepcopy(options)
    wanted = _SEGMENTERS.get(made.student, ())
    given = parse_assignments(made.student_options, "--student-options")
    if made.student == "pointnext_scene" and channels == 3:
        given.setdefault("coordinates", True)
    if "in_channels" in wanted:
        given.setdefault("in_channels", channels)
    if "categories" in wanted and data.category is not None:
        given.setdefault("categories", data.num_classes)
    if wanted:
        made.student_options = tuple(f"{name}={value!r}" for name, value in given.items())
    return made


def check_kind(student: str, parts: bool) -> None:
    """A network for parts of shapes is for data with categories of parts, one for scenes for other.

    Raises:
        ValueError: it is the other way round.
    """
    if student in _SEGMENTERS and student.endswith("_part") != parts:
        raise ValueError(
            f"--student {student} is for {'scenes' if parts else 'parts'}, and the data has "
            f"{'parts of shapes' if parts else 'one set of classes for all clouds'}: give "
            f"{student.rpartition('_')[0]}_{'part' if parts else 'scene'}"
        )


def adapter_of(student: nn.Module, options: StudentOptions, sample: Tensor | None = None) -> Adapter:
    """The student's adapter, with the layout in which the student takes its clouds.

    Args:
        student: the network.
        options: name of the adapter, and layout, where they are given.
        sample: [B, N, 3] clouds on the student's device, to try the layouts on; None takes what is said.

    Raises:
        ValueError: no layout in which the student takes the sample; with what it said of each.
    """
    adapter = find_adapter(student, options.adapter)
    own = adapter.input_layout if options.layout is None else options.layout
    if sample is None or options.layout is not None:
        return dataclasses.replace(adapter, input_layout=own)
    said, was = [], student.training
    student.eval()
    try:
        for layout in dict.fromkeys([own, *INPUT_LAYOUTS]):
            tried = dataclasses.replace(adapter, input_layout=layout)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    tried.logits(student(tried.arrange(sample)))
                return tried
            except Exception as error:
                said.append(f"{layout}: {type(error).__name__}: {str(error).strip().splitlines()[-1]:.200}")
    finally:
        student.train(was)
    raise ValueError(
        f"the student {options.student} takes clouds of {list(sample.shape)} in no known layout. "
        + "; ".join(said)
        + ". Give --layout, or an --adapter that says how it is called (docs/adapters.md)"
    )


def find_factory(name: str) -> Callable[..., Any]:
    """The factory of a student: a registered one, or ``module:factory``.

    Raises:
        ValueError: there is none of that name.
    """
    known = list_students()
    if name in known:
        return known[name]
    module_name, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"unknown student {name!r}; expected one of {', '.join(known)}; the name of one that --import "
            "MODULE registers; or module:factory for your own (module importable from the current folder)"
        )
    try:
        module = import_module(module_name)
    except ValueError as error:
        raise ValueError(f"--student {name}: {error}") from error
    if not callable(getattr(module, attribute, None)):
        near = difflib.get_close_matches(attribute, dir(module)) or ["nothing"]
        raise ValueError(
            f"--student {name}: {module_name} has no function or class {attribute}; near it: "
            f"{', '.join(near)}. Give module:factory"
        )
    return getattr(module, attribute)


def check_named_by_file(student: str, file: Path) -> None:
    """A file may name registered students only: it is data, and code comes from the command line.

    Raises:
        ValueError: ``module:factory`` of a module that was not imported by the user.
    """
    module, colon, _ = student.rpartition(":")
    if student in list_students() or (colon and module in IMPORTED):
        return
    if colon:
        raise ValueError(
            f"{file} names the student {student!r}, which is code of a module that you did not name: a file "
            f"imports nothing. If you trust that module, add --import {module}, or to evaluate and "
            f"robustness --student {student}"
        )
    raise ValueError(
        f"{file} names the student {student!r}, which is not known here; expected one of "
        f"{', '.join(list_students())}. Give the module that registers it with --import"
    )


def split_weights(pairs: Sequence[str], option: str = "--objectives") -> dict[str, float]:
    """``("soft_labels=1,temperature=2", "nst=50")`` as weights by name."""
    return {name: weight for name, (weight, _) in split_objectives(pairs, option).items()}


def split_objectives(
    pairs: Sequence[str], option: str = "--objectives"
) -> dict[str, tuple[float, dict[str, Any]]]:
    """``("soft_labels=1,temperature=2", "nst=50")`` as weight and further arguments by name.

    Raises:
        ValueError: a weight that is no number, or a name that stands twice.
    """
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    for pair in pairs:
        first, *rest = pair.split(",")
        ((name, weight),) = parse_assignments([first], option).items()
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < 1e30:
            raise ValueError(f"{option} {name}={weight}: expected a finite number as weight")
        if name in found:
            raise ValueError(f"{option} names {name} twice; give each objective once")
        found[name] = float(weight), parse_assignments(rest, option)
    return found


def objective_classes() -> dict[str, type[Objective]]:
    """Every objective that was imported, this package's and anybody's, by its ``default_name``.

    Raises:
        ValueError: two of one name.
    """
    found: dict[str, type[Objective]] = {}
    waiting = list(Objective.__subclasses__())
    while waiting:
        one = waiting.pop()
        waiting += one.__subclasses__()
        name = vars(one).get("default_name")  # its own: a subclass that has none is a variant, by its class
        if not isinstance(name, str) or inspect.isabstract(one):
            continue
        if name in found and found[name].__qualname__ != one.__qualname__:
            raise ValueError(
                f"two objectives are called {name!r}: {found[name].__module__}.{found[name].__qualname__} "
                f"and {one.__module__}.{one.__qualname__}; give one of them another default_name"
            )
        found[name] = one
    return dict(sorted(found.items()))


def make_objectives(
    fe_weight: float,
    ce_weight: float,
    further: Sequence[str] = (),
    fe_distance: str = "emd",
    option: str = "--objectives",
) -> list[Objective]:
    """FE and CE where they have a weight, and further objectives as NAME=WEIGHT[,ARGUMENT=VALUE …].

    Raises:
        ValueError: an unknown name or argument, or a weight that is no number.
    """
    known = objective_classes()
    made: list[Objective] = []
    if fe_weight:
        made.append(objectives.FeatureEnhancement(fe_weight, distance=fe_distance))
    if ce_weight:
        made.append(objectives.ClassifierEnhancement(ce_weight))
    for name, (weight, arguments) in split_objectives(further, option).items():
        if name not in known:
            raise ValueError(f"{option} {name}: expected one of {', '.join(known)}")
        accepted = set(inspect.signature(known[name]).parameters) - {"weight"}
        if unknown := sorted(arguments.keys() - accepted):
            raise ValueError(
                f"{option} {name} does not take {', '.join(unknown)}; it takes {', '.join(sorted(accepted))}"
            )
        made.append(known[name](weight=weight, **arguments))
    return made
