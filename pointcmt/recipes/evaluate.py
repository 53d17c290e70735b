"""Accuracy of a trained student or teacher: OA, mAcc, per class; one pass or a vote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from pointcmt.adapters import Adapter
from pointcmt.checkpoint import PathLike, check_configuration, kind_of, load_module, read_config
from pointcmt.data import vote_scale
from pointcmt.recipes.batches import Batch, Batches
from pointcmt.recipes.build import StudentOptions, adapter_of, check_named_by_file, make_student
from pointcmt.recipes.config import read_json, restore, write_json
from pointcmt.recipes.engine import MachineOptions, make_accelerator, seed_everything
from pointcmt.recipes.options import (
    DataOptions,
    load_teacher,
    matching_images,
    parse_assignments,
    views_of_teacher,
)
from pointcmt.recipes.progress import say, show_table
from pointcmt.recipes.run import find_checkpoint, run_config_beside
from pointcmt.tasks import predict
from pointcmt.tasks.metrics import class_accuracies, overall_accuracy


@dataclass
class Evaluate:
    """Accuracy of a trained student or teacher on the test shapes."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of train, train-teacher or train-registration; or a student's or teacher's .safetensors file
    alone."""
    checkpoint: Literal["final", "best"] = "final"
    """The weights after the last epoch, or of the best epoch (results.json says best by what)."""
    student: str | None = None
    """module:factory of a network of your own, which a file may not name by itself."""
    data: str | None = None
    """Other data than the run's: a folder, or synthetic."""
    dataset: Literal["auto", "synthetic", "modelnet40", "modelnet40hard", "scanobjectnn"] | None = None
    """What is in the folder; modelnet40hard makes hard scans of the run's own shapes."""
    split: Literal["test", "heldout", "train"] = "test"
    """Which shapes."""
    test_per_class: int | None = None
    """Test shapes per class; default: as in the run."""
    votes: int = 1
    """Passes over clouds stretched by chance by 0.85 … 1.15 along each axis, whose probabilities are
    averaged;
    1: one pass over the clouds as they are."""
    seed: int = 0
    """Of the votes."""
    json: Path | None = None
    """Also write the result to this file."""
    batch_size: int = 32
    """Shapes at once."""
    machine: MachineOptions = field(default_factory=MachineOptions)


def load_student(path: Path, factory: str | None = None) -> tuple[nn.Module, Adapter, dict[str, Any]]:
    """The student in a checkpoint of ``pointcmt train``: in eval mode, with its adapter and its
    configuration.

    Args:
        path: the file, or its run folder.
        factory: ``module:factory`` of a network of one's own, in place of what the file says.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that does not fit the network, or that names
            code which the user did not.
    """
    file = find_checkpoint(path, "student")
    config = read_config(file, "student")
    options: StudentOptions = restore(StudentOptions(), config.get("student") or {}, f"{file}: student")

    def check(_: dict[str, Any], where: PathLike) -> None:
        if factory is None:
            check_named_by_file(options.student, file)
        check_configuration(parse_assignments(options.student_options, f"{file}: student_options"), where)
        sizes = (options.width, options.feature_dim, config.get("num_classes"))
        check_configuration({"student": sizes}, where)

    # a student is built from its options, not from keyword arguments of one class
    def build(**_: Any) -> nn.Module:
        return make_student(options, config["num_classes"])

    build.__name__ = options.student
    if factory is not None:
        options.student = factory
    model = load_module(file, "student", build, check)
    return model, adapter_of(model, options), config


def described(path: Path, checkpoint: str = "final") -> tuple[Path, str, dict[str, Any]]:
    """What a user means by a run folder or a checkpoint: the file, ``student`` or ``teacher``, and the
    configuration that it was trained with.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: something else, or a file of an older version without its run folder.
    """
    kinds = {"train": "student", "train-teacher": "teacher"}
    if path.is_file():
        file, kind = path, kind_of(path)
    elif (path / "config.json").exists():
        command = read_json(path / "config.json").get("command")
        if command not in kinds:
            raise ValueError(f"{path} is a run of {command}: only teachers and students are evaluated")
        kind = kinds[command]
        file = find_checkpoint(path / "best.safetensors" if checkpoint == "best" else path, kind)
    else:
        there = [kind for kind in kinds.values() if (path / f"{kind}.safetensors").is_file()]
        if not there:
            raise FileNotFoundError(
                f"{path} is no run folder (no config.json in it) and no checkpoint: give the --out of "
                "pointcmt train or train-teacher, or a .safetensors file"
            )
        file, kind = path / f"{there[0]}.safetensors", there[0]
    config = run_config_beside(file)
    if kind not in kinds.values():
        raise ValueError(f"{file} holds a {kind}: only teachers and students are evaluated")
    if config is None or not isinstance(config.get("config"), dict):
        raise ValueError(
            f"{file} was written by an older version and does not say what data it is for: keep config.json "
            "of its run beside it"
        )
    return file, kind, config["config"]


def _registration(options: Evaluate, quiet: bool) -> dict[str, Any]:
    """Figures of a run of train-registration, whose task is another."""
    from pointcmt.recipes.train_registration import evaluate_run

    figures = evaluate_run(
        options.run,
        options.machine,
        options.split,
        options.checkpoint,
        options.batch_size,
        quiet,
    )
    if options.json is not None:
        write_json(options.json, figures)
    return figures


def evaluate(options: Evaluate, quiet: bool = False) -> dict[str, Any]:
    """Measure, print a table per class (unless ``quiet``), and return ``oa``, ``macc``, ``classes``,
    ``votes`` and ``shapes``."""
    if options.votes < 1:
        raise ValueError(f"--votes is {options.votes}; expected at least 1")
    recorded = options.run / "config.json"
    command = read_json(recorded).get("command") if recorded.is_file() else None
    if command == "train-registration":
        return _registration(options, quiet)
    if command == "segment":
        raise ValueError(f"{options.run} gives each point a class: pointcmt segment --run {options.run}")
    file, kind, config = described(options.run, options.checkpoint)
    accelerator = make_accelerator(options.machine)
    data: DataOptions = restore(DataOptions(), config.get("data") or {}, f"{file}: data")
    if options.data is not None:
        data.data, data.dataset = options.data, "auto"
    if options.dataset is not None:
        data.dataset = options.dataset
    if options.test_per_class is not None:
        data.test_per_class = options.test_per_class
    if kind == "student" or data.named() == "modelnet40hard":
        data.view_points = None  # students see no views, and those of hard scans are of the scans themselves
    part = data.part(options.split)
    if part is None:
        raise ValueError(
            f"--split {options.split}: the run has no such shapes (it was trained with --holdout 0)"
        )

    shapes: Any = part
    forward: Callable[[Tensor], Tensor]
    if kind == "student":
        model, adapter, about = load_student(file, options.student)
        if about["classes"] != list(part.class_names):
            raise ValueError(
                f"the student knows {len(about['classes'])} classes ({', '.join(about['classes'][:4])} …), "
                f"the data has {len(part.class_names)} ({', '.join(part.class_names[:4])} …): give data of "
                "the same classes"
            )
        model.to(accelerator.device)

        def forward(points: Tensor) -> Tensor:
            return adapter.logits(model(adapter.arrange(points)))
    else:
        teacher, file = load_teacher(file, part.class_names)
        teacher.to(accelerator.device)
        images = config.get("images")
        if images is not None:
            if options.votes > 1:
                raise ValueError("--votes stretches clouds; a teacher of images has none: use --votes 1")
            split: Any = "test" if options.split == "test" else "train"
            views = config["views"]
            shapes = matching_images(
                Path(images), part, split, views["size"], teacher.in_chans, white=views.get("white")
            )

            def forward(points: Tensor) -> Tensor:
                return teacher(points).logits
        else:
            spec = views_of_teacher(file)

            def forward(points: Tensor) -> Tensor:
                return teacher(spec.project(points)).logits

    batches = Batches(
        shapes,
        options.batch_size,
        accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=options.machine.workers,
        what="points" if kind == "student" else "view_points",
    )
    seed_everything(options.seed, accelerator.process_index)

    def vote(batch: Batch) -> Tensor:
        if options.votes == 1:
            return forward(batch.inputs).float()
        passes = [forward(vote_scale(batch.inputs)).float().softmax(1) for _ in range(options.votes)]
        return torch.stack(passes).mean(0)

    outputs, labels = predict(vote, batches.epoch())
    predicted = outputs.argmax(1)
    accuracies = class_accuracies(predicted, labels, part.num_classes)
    result = {
        "run": str(options.run),
        "checkpoint": options.checkpoint,
        "dataset": data.named(),
        "split": options.split,
        "votes": options.votes,
        "shapes": len(labels),
        "oa": overall_accuracy(predicted, labels),
        "macc": float(np.nanmean(accuracies)),
        "classes": {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(part.class_names, accuracies, strict=True)
        },
    }
    if accelerator.is_main_process and options.json is not None:
        write_json(options.json, result)
    if accelerator.is_main_process and not quiet:
        counts = np.bincount(labels, minlength=part.num_classes)
        lines = [
            [name, str(count), "–" if np.isnan(value) else f"{value:.1f}"]
            for name, count, value in zip(part.class_names, counts, accuracies, strict=True)
        ]
        title = f"{options.run} on {len(labels)} {options.split} shapes"
        show_table(("class", "shapes", "accuracy %"), lines, title)
        say(f"OA {result['oa']:.2f} %   mAcc {result['macc']:.2f} %   ({options.votes} pass(es))")
    return result
