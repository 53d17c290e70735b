"""Stage I: an image teacher, from views projected from points on the device, or from a folder of images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from torch import Tensor, nn

from pointcmt.checkpoint import names_digest, save_module
from pointcmt.data import Augmentation
from pointcmt.pictures import save_views
from pointcmt.recipes.batches import Batch, batches_of
from pointcmt.recipes.config import plain, write_json
from pointcmt.recipes.engine import (
    LoopOptions,
    MachineOptions,
    check_loop,
    count_parameters,
    fit,
    make_accelerator,
    seed_everything,
)
from pointcmt.recipes.options import DataOptions, Splits, ViewOptions, image_splits, parse_assignments
from pointcmt.recipes.progress import say
from pointcmt.recipes.run import RunFolder
from pointcmt.tasks.classification import classification
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
    """Start from ImageNet's weights: of the installed extra pretrained (--backbone tf_efficientnet_lite0; let
    --channels be near or shaded), else timm's (needs the network)."""
    backbone_weights: Path | None = None
    """File with weights of the backbone to start from, in timm's names: .safetensors or .pth."""
    backbone_lr: float = 1.0
    """Learning rate of the backbone as a part of --lr: 1 for one that starts from scratch, a tenth or less
    for fine-tuning; 0 freezes it, so that only what comes after it is trained."""
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


def check(options: TrainTeacher) -> None:
    """Raise a ValueError for options that make no sense."""
    check_loop(options.loop)
    if not 0 <= options.view_dropout < 1:
        raise ValueError(f"--view-dropout is {options.view_dropout}; expected a part in [0, 1)")
    Augmentation.of(options.augment_scale, options.augment_shift)  # checks them
    if options.feature_dim < 1:
        raise ValueError(f"--feature-dim is {options.feature_dim}; expected at least 1")
    if options.pretrained and options.backbone_weights is not None:
        raise ValueError("--pretrained and --backbone-weights both say where the weights come from: give one")
    if not 0 <= options.backbone_lr <= 1:
        raise ValueError(f"--backbone-lr is {options.backbone_lr}; expected a part of --lr in [0, 1]")
    if options.backbone_lr == 0 and not (options.pretrained or options.backbone_weights):
        raise ValueError(
            "--backbone-lr 0 freezes a backbone of random weights: give --pretrained or --backbone-weights"
        )
    for name in ("dropout", "label_smoothing"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; expected a part in [0, 1)"
            )
    parse_assignments(options.backbone_options, "--backbone-options")
    options.views.spec("z")  # any axis: the others of its arguments are checked


def train_teacher(options: TrainTeacher) -> dict[str, Any]:
    """Train a teacher into a run folder and return its results.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, RuntimeError: with what to do.
    """
    check(options)
    accelerator = make_accelerator(options.machine)
    splits: Splits[Any]
    if options.images is not None:
        channels: int = options.image_channels
        splits = image_splits(options.images, options.data, options.views, channels)
        spec = options.views.spec("z")  # not used
    else:
        splits = options.data.load()
        spec = options.views.spec(splits.train.up)
        channels = spec.num_channels
    inputs = {"data": splits.fingerprint()}
    if options.backbone_weights is not None:
        inputs["backbone"] = hashlib.sha256(options.backbone_weights.read_bytes()).hexdigest()
    run = RunFolder.start(
        accelerator, options.out, options, command="train-teacher", inputs=inputs, resume=options.resume
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
        pretrained=options.backbone_weights or options.pretrained,
        dropout=options.dropout,
        backbone_options=parse_assignments(options.backbone_options, "--backbone-options"),
        view_spec=None if options.images is not None else spec,
        mean=statistics("mean", options, channels),
        std=statistics("std", options, channels),
    )
    if options.backbone_lr == 0:
        teacher.freeze_backbone()
    change = Augmentation.of(options.augment_scale, options.augment_shift, shuffle=False)

    def logits(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.inputs if options.images is not None else spec.project(batch.inputs)).logits

    def changed_logits(model: nn.Module, batch: Batch) -> Tensor:
        views = batch.inputs if options.images is not None else spec.project(change(batch.inputs))
        if options.view_dropout:
            keep = max(1, round(views.shape[1] * (1 - options.view_dropout)))
            views = views[:, torch.randperm(views.shape[1])[:keep].to(views.device)]
        return model(views).logits

    training, tests = batches_of(
        splits.parts(), options.loop.batch_size, options.loop.seed, accelerator, options.machine.workers,
        what="view_points",
    )  # fmt: skip
    task = classification(
        logits,
        {name: part.epoch for name, part in tests.items()},
        *splits.best_by(),
        label_smoothing=options.label_smoothing,
        training=changed_logits,
    )
    # what the recipes and evaluate need of a teacher, so that its file is enough
    about = {
        "command": "train-teacher",
        "config": plain({"data": options.data, "views": options.views, "images": options.images}),
        "classes": list(splits.train.class_names),
        "trained_on": names_digest(splits.train.shape_ids),
    }

    def save(model: Any, path: Path) -> None:
        save_module(path, model, "teacher", model.config, about)

    if accelerator.is_main_process:
        write_json(run.path / "shapes.json", {name: part.shape_ids for name, part in splits.parts().items()})
    rates = {}
    if 0 < options.backbone_lr < 1:
        rates = dict.fromkeys(teacher.backbone.parameters(), options.backbone_lr * options.loop.lr)
    outcome = fit(teacher, task, training, save, options.loop, options.machine, accelerator, run, rates=rates)
    if accelerator.is_main_process:
        save(teacher, run.path / "teacher.safetensors")
        picture(
            splits.test, lambda points: points if options.images is not None else spec.project(points),
            run.path / "views.png",
        )  # fmt: skip
    return run.finish(
        {
            **outcome,
            "parameters": count_parameters(teacher),
            "classes": about["classes"],
            "shapes": {name: len(part) for name, part in splits.parts().items()},
            "views": None if options.images is not None else spec.describe(),
        }
    )


def statistics(name: Literal["mean", "std"], options: TrainTeacher, channels: int) -> Any:
    """What a backbone that starts from weights of photographs was given grey images with: the mean of its
    statistics over the colours, where the views are no colours."""
    starts = options.pretrained or options.backbone_weights is not None
    config = timm.get_pretrained_cfg(options.backbone.split(".")[0]) if starts and channels != 3 else None
    return "auto" if config is None else [float(np.mean(getattr(config, name)))] * channels


def picture(test: Any, to_views: Callable[[Tensor], Tensor], path: Path, shapes: int = 6) -> None:
    """A sheet of views of one test shape from each of several classes."""
    classes = np.unique(test.labels)
    chosen = classes[np.linspace(0, len(classes) - 1, min(shapes, len(classes))).astype(int)]
    rows = [int(np.flatnonzero(test.labels == label)[0]) for label in chosen]
    if hasattr(test, "view_points"):
        inputs = torch.from_numpy(test.view_points[rows])
    else:
        inputs = torch.stack([test[row][0] for row in rows])
    save_views(to_views(inputs).numpy(), [test.class_names[label] for label in chosen], path)
