"""Accuracy of a trained student or teacher: OA, mAcc, per class; one pass or a vote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.table import Table
from torch import Tensor, nn

from pointcmt.adapters import Adapter, find_adapter
from pointcmt.checkpoint import load_module, read_config
from pointcmt.data import vote_scale
from pointcmt.recipes.build import StudentOptions, make_student
from pointcmt.recipes.engine import Batch, Batches, MachineOptions, make_accelerator, predict, seed_everything
from pointcmt.recipes.metrics import class_accuracies, overall_accuracy
from pointcmt.recipes.options import DataOptions, load_teacher, matching_images, views_of_teacher
from pointcmt.recipes.progress import console
from pointcmt.recipes.run import find_checkpoint, read_json, write_json


@dataclass
class Evaluate:
    """Accuracy of a trained student or teacher on the test shapes."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of train or train-teacher."""
    checkpoint: Literal["final", "best"] = "final"
    """The weights after the last epoch, or of the best epoch (results.json says best by what)."""
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


def restore(cls: type[Any], values: dict[str, Any]) -> Any:
    """A dataclass of options from its JSON in config.json."""
    known = {item.name: item for item in fields(cls)}
    made = {}
    for name, value in values.items():
        if name not in known:
            continue
        if isinstance(value, list):
            value = tuple(value)
        elif value is not None and "Path" in str(known[name].type):
            value = Path(value)
        made[name] = value
    return cls(**made)


def load_student(path: Path) -> tuple[nn.Module, Adapter, dict[str, Any]]:
    """The student in a checkpoint of ``pointcmt train``: in eval mode, with its adapter and its
    configuration.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that does not fit the network.
    """
    file = find_checkpoint(path, "student")
    config = read_config(file, "student")
    options = restore(StudentOptions, config["student"])

    # a student is built from its options, not from keyword arguments of one class
    def build(**_: Any) -> nn.Module:
        return make_student(options, config["num_classes"])

    build.__name__ = options.student
    model = load_module(file, "student", build)  # type: ignore[arg-type]
    return model, find_adapter(model, options.adapter), config


def evaluate(options: Evaluate, quiet: bool = False) -> dict[str, Any]:
    """Measure, print a table per class (unless ``quiet``), and return ``oa``, ``macc``, ``classes``,
    ``votes`` and ``shapes``."""
    if options.votes < 1:
        raise ValueError(f"--votes is {options.votes}; expected at least 1")
    if not (options.run / "config.json").exists():
        raise FileNotFoundError(
            f"{options.run} is no run folder (no config.json in it): give the --out of pointcmt train or "
            f"train-teacher"
        )
    accelerator = make_accelerator(options.machine)
    described = read_json(options.run / "config.json")
    if described["command"] not in ("train", "train-teacher"):
        raise ValueError(
            f"{options.run} is a run of {described['command']}: only teachers and students are evaluated"
        )
    data: DataOptions = restore(DataOptions, described["config"]["data"])
    if options.data is not None:
        data.data, data.dataset = options.data, "auto"
    if options.dataset is not None:
        data.dataset = options.dataset
    if options.test_per_class is not None:
        data.test_per_class = options.test_per_class
    if described["command"] == "train" or data.named() == "modelnet40hard":
        data.view_points = None  # students see no views, and those of hard scans are of the scans themselves
    part = data.part(options.split)
    if part is None:
        raise ValueError(
            f"--split {options.split}: the run has no such shapes (it was trained with --holdout 0)"
        )
    file = options.run / "best.safetensors" if options.checkpoint == "best" else options.run

    shapes: Any = part
    forward: Callable[[Tensor], Tensor]
    if described["command"] == "train":
        model, adapter, config = load_student(file)
        if config["classes"] != list(part.class_names):
            raise ValueError(
                f"the student knows {len(config['classes'])} classes ({', '.join(config['classes'][:4])} "
                f"…), the data has "
                f"{len(part.class_names)} ({', '.join(part.class_names[:4])} …): give data of the same "
                f"classes"
            )
        model.to(accelerator.device)

        def forward(points: Tensor) -> Tensor:
            return adapter.logits(model(adapter.arrange(points)))
    else:
        teacher, file = load_teacher(file, part.class_names)
        teacher.to(accelerator.device)
        images = described["config"]["images"]
        if images is not None:
            if options.votes > 1:
                raise ValueError("--votes stretches clouds; a teacher of images has none: use --votes 1")
            size = described["config"]["views"]["size"]
            split: Any = "test" if options.split == "test" else "train"
            shapes = matching_images(Path(images), part, split, size, teacher.in_chans)

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
        what="points" if described["command"] == "train" else "view_points",
    )
    seed_everything(options.seed, accelerator.process_index)

    def vote(batch: Batch) -> Tensor:
        if options.votes == 1:
            return forward(batch.inputs).float()
        passes = [forward(vote_scale(batch.inputs)).float().softmax(1) for _ in range(options.votes)]
        return torch.stack(passes).mean(0)

    outputs, labels = predict(vote, batches, accelerator)
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
        table = Table(
            "class", "shapes", "accuracy %", title=f"{options.run} on {len(labels)} {options.split} shapes"
        )
        table.columns[1].justify = table.columns[2].justify = "right"
        for name, count, value in zip(part.class_names, counts, accuracies, strict=True):
            table.add_row(name, str(count), "–" if np.isnan(value) else f"{value:.1f}")
        console.print(table)
        console.print(f"OA {result['oa']:.2f} %   mAcc {result['macc']:.2f} %   ({options.votes} pass(es))")
    return result
