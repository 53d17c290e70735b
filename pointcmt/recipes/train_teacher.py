"""Stage I: an image teacher, from views projected from points on the device, or from a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.data import Augmentation
from pointcmt.recipes.engine import (
    Batch,
    Batches,
    LoopOptions,
    MachineOptions,
    Task,
    count_parameters,
    fit,
    make_accelerator,
    predict,
    seed_everything,
)
from pointcmt.recipes.metrics import scores
from pointcmt.recipes.options import DataOptions, Splits, ViewOptions, image_splits, parse_assignments
from pointcmt.recipes.progress import say
from pointcmt.recipes.run import RunFolder, write_json
from pointcmt.report import save_views
from pointcmt.teacher import ImageTeacher


@dataclass
class TrainTeacher:
    """Stage I: train the image teacher.

    The defaults are the recipe that was found best from scratch on projected points, one setting at a time
    (docs/results.md). The paper's, for a pretrained backbone on rendered images: adam, lr 1e-3, weight decay
    1e-4, four steps accumulated, 50 epochs.
    """

    out: Path
    """Run folder to write; the teacher is teacher.safetensors in it."""
    data: DataOptions = field(default_factory=DataOptions)
    views: ViewOptions = field(default_factory=lambda: ViewOptions(channels=("depth", "normal")))
    images: Path | None = None
    """Train on a folder of images (CLASS/{train,test}/airplane_0627_001.png) in place of projected points."""
    image_channels: Literal[1, 3] = 3
    """Grey or colour, for --images."""
    backbone: str = "simpleview_resnet"
    """Any timm model, such as resnet18; simpleview_resnet is small and made for projected points."""
    backbone_options: tuple[str, ...] = ()
    """Arguments for timm.create_model, as NAME=VALUE."""
    pretrained: bool = False
    """Start from timm's pretrained weights (needs the network)."""
    feature_dim: int = 512
    """Size D of the feature; the student's must be the same."""
    view_pool: Literal["max", "mean"] = "max"
    """How the features of the views become one."""
    dropout: float = 0.0
    """Dropout before the classifier."""
    label_smoothing: float = 0.2
    """Of the cross-entropy."""
    augment_scale: float = 1.25
    """Clouds are stretched along each axis by a factor between 1/this and this before they are projected;
    1: not."""
    augment_shift: float = 0.1
    """Clouds are moved by up to this along each axis before they are projected."""
    view_dropout: float = 0.0
    """Part of the views that is left out of each training step, drawn by chance; also saves their time."""
    loop: LoopOptions = field(
        default_factory=lambda: LoopOptions(epochs=80, optimizer="adamw", lr=4e-3, warmup=1)
    )
    machine: MachineOptions = field(default_factory=MachineOptions)
    resume: bool = False
    """Continue the run in --out."""


def train_teacher(options: TrainTeacher) -> dict[str, Any]:
    """Train a teacher into a run folder and return its results.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, RuntimeError: with what to do.
    """
    accelerator = make_accelerator(options.machine)
    if not 0 <= options.view_dropout < 1:
        raise ValueError(f"--view-dropout is {options.view_dropout}; expected a part in [0, 1)")
    if options.augment_scale < 1:
        raise ValueError(f"--augment-scale is {options.augment_scale}; expected 1 or more")
    splits: Splits[Any]
    if options.images is not None:
        channels: int = options.image_channels
        splits = image_splits(options.images, options.data, options.views.size, channels)
        spec = options.views.spec("z")  # not used
    else:
        splits = options.data.load()
        spec = options.views.spec(splits.train.up)
        channels = spec.num_channels
    run = RunFolder.start(
        accelerator,
        options.out,
        options,
        command="train-teacher",
        inputs={"data": splits.fingerprint()},
        resume=options.resume,
    )
    if (done := run.finished()) is not None:
        say(f"{run.path} is finished", accelerator.is_main_process)
        return done

    seed_everything(options.loop.seed)
    teacher = ImageTeacher(
        num_classes=splits.train.num_classes,
        backbone=options.backbone,
        in_chans=channels,
        feature_dim=options.feature_dim,
        view_pool=options.view_pool,
        pretrained=options.pretrained,
        dropout=options.dropout,
        backbone_options=parse_assignments(options.backbone_options, "--backbone-options"),
        view_spec=None if options.images is not None else spec,
    )
    change = Augmentation.of(options.augment_scale, options.augment_shift, shuffle=False)

    def to_views(batch: Batch, training: bool) -> Tensor:
        if options.images is not None:
            return batch.inputs
        return spec.project(change(batch.inputs) if training else batch.inputs)

    def batches(name: str, seed: int | None = None) -> Batches:
        return Batches(
            splits.parts()[name],
            options.loop.batch_size,
            accelerator.device,
            seed,
            accelerator.process_index,
            accelerator.num_processes,
            options.machine.workers,
            what="view_points",
        )

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        views = to_views(batch, training=True)
        if options.view_dropout:
            keep = max(1, round(views.shape[1] * (1 - options.view_dropout)))
            views = views[:, torch.randperm(views.shape[1])[:keep].to(views.device)]
        logits = model(views).logits
        return {"loss": F.cross_entropy(logits, batch.labels, label_smoothing=options.label_smoothing)}

    tests = {name: batches(name) for name in splits.parts() if name != "train"}

    def evaluate(model: nn.Module) -> dict[str, float]:
        result: dict[str, float] = {}
        for name, part in tests.items():
            result |= scores(
                *predict(lambda batch: model(to_views(batch, False)).logits, part, accelerator), name
            )
        return result

    best, means = splits.best_by()
    task = Task(
        model=teacher,
        batches=batches("train", options.loop.seed),
        step=step,
        evaluate=evaluate,
        save=save_teacher,
        watch=f"{best}_oa",
        watch_means=means,
        headline=tuple(f"{name}_oa" for name in tests),
    )
    if accelerator.is_main_process:
        write_json(run.path / "shapes.json", {name: part.shape_ids for name, part in splits.parts().items()})
    outcome = fit(task, options.loop, options.machine, accelerator, run)
    if accelerator.is_main_process:
        save_teacher(task.model, run.path / "teacher.safetensors")
        picture(splits.test, lambda part: to_views(part, False), run.path / "views.png")
    return run.finish(
        {
            **outcome,
            "parameters": count_parameters(task.model),
            "classes": list(splits.train.class_names),
            "shapes": {name: len(part) for name, part in splits.parts().items()},
            "views": None if options.images is not None else spec.describe(),
        }
    )


def picture(test: Any, to_views: Callable[[Batch], Tensor], path: Path, shapes: int = 6) -> None:
    """A sheet of views of one test shape from each of several classes."""
    classes = np.unique(test.labels)
    chosen = classes[np.linspace(0, len(classes) - 1, min(shapes, len(classes))).astype(int)]
    rows = [int(np.flatnonzero(test.labels == label)[0]) for label in chosen]
    if hasattr(test, "view_points"):
        inputs = torch.from_numpy(test.view_points[rows])
    else:
        inputs = torch.stack([test[row][0] for row in rows])
    index = torch.tensor(rows)
    views = to_views(Batch(inputs, index, index)).numpy()
    save_views(views, [test.class_names[label] for label in chosen], path)


def save_teacher(model: Any, path: Path) -> None:
    model.save(path)
