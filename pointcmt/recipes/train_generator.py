"""Stage II: the cross-modal point generator, from the frozen teacher's features to clouds (paper §3.2)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pointcmt.generator import PointGenerator
from pointcmt.ops import emd, unit_cube
from pointcmt.pictures import save_clouds
from pointcmt.recipes.batches import Batch, Batches, batches_of
from pointcmt.recipes.engine import (
    LoopOptions,
    MachineOptions,
    check_loop,
    count_parameters,
    fit,
    make_accelerator,
    seed_everything,
)
from pointcmt.recipes.features import features_of
from pointcmt.recipes.options import DataOptions, Splits, load_teacher
from pointcmt.recipes.progress import say
from pointcmt.recipes.run import RunFolder
from pointcmt.tasks import Figure, Task, predict


@dataclass
class TrainGenerator:
    """Stage II: train the generator that turns the teacher's features into clouds."""

    out: Path
    """Run folder to write; the generator is generator.safetensors in it."""
    teacher: Path
    """The teacher: its run folder or its .safetensors file."""
    data: DataOptions = field(default_factory=DataOptions)
    images: Path | None = None
    """Folder of images, for a teacher that was trained on images."""
    features: Path | None = None
    """Folder of the cached features; default: features/ beside the teacher. Built where absent."""
    generator_points: int | None = None
    """Points that the generator makes; default: as many as the clouds have (--num-points)."""
    dropout: float = 0.5
    """Dropout of the generator's input."""
    emd_weight: float = 30.0
    """Factor of the loss (paper: 30)."""
    loop: LoopOptions = field(default_factory=lambda: LoopOptions(optimizer="adam", weight_decay=1e-4))
    machine: MachineOptions = field(default_factory=MachineOptions)
    resume: bool = False
    """Continue the run in --out."""


def check(options: TrainGenerator) -> None:
    """Raise a ValueError for options that make no sense."""
    check_loop(options.loop)
    if (
        not 1
        <= (1 if options.generator_points is None else options.generator_points)
        <= options.data.num_points
    ):
        raise ValueError(
            f"--generator-points {options.generator_points}: expected between 1 and --num-points "
            f"{options.data.num_points}"
        )
    if not 0 <= options.dropout < 1:
        raise ValueError(f"--dropout is {options.dropout}; expected a part in [0, 1)")
    if not options.emd_weight > 0:
        raise ValueError(f"--emd-weight is {options.emd_weight}; expected a positive factor")


def train_generator(options: TrainGenerator) -> dict[str, Any]:
    """Train a generator into a run folder and return its results."""
    check(options)
    accelerator = make_accelerator(options.machine)
    splits = options.data.load()
    teacher, file = load_teacher(options.teacher, splits.train.class_names)
    run = RunFolder.start(
        accelerator,
        options.out,
        options,
        command="train-generator",
        inputs={"data": splits.fingerprint(), "teacher": teacher.fingerprint()},
        resume=options.resume,
    )
    if (done := run.finished()) is not None:
        say(f"{run.path} is finished", accelerator.is_main_process)
        return done
    caches = features_of(
        splits,
        teacher,
        file,
        accelerator,
        options.features,
        options.images,
        workers=options.machine.workers,
        without=("unlabelled",),
    )
    features = {
        name: cache[torch.arange(len(splits.parts()[name]))].to(accelerator.device)
        for name, (_, cache) in caches.items()
    }

    seed_everything(options.loop.seed)
    generator = PointGenerator(
        teacher.feature_dim, options.generator_points or options.data.num_points, options.dropout
    )
    training, tests = batches_of(splits.parts(), options.loop.batch_size, options.loop.seed, accelerator)
    outcome = fit(
        generator, generation(options, splits, features, tests), training, save_generator, options.loop,
        options.machine, accelerator, run,
    )  # fmt: skip
    if accelerator.is_main_process:
        save_generator(generator, run.path / "generator.safetensors")
        picture(generator, features["test"], splits.test, run.path / "generated.png")
    return run.finish(
        {
            **outcome,
            "parameters": count_parameters(generator),
            "shapes": {name: len(part) for name, part in splits.parts().items()},
        }
    )


def generation(
    options: TrainGenerator, splits: Splits[Any], features: dict[str, Tensor], tests: dict[str, Batches]
) -> Task:
    """The task of stage II: clouds from features, judged by the mean EMD of unit cubes."""

    def distance(model: nn.Module, name: str, batch: Batch) -> Tensor:
        generated = model(features[name][batch.index]).float()
        real = batch.inputs[:, : generated.shape[1], :3]
        return emd(unit_cube(generated), unit_cube(real))[0]

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        mean = distance(model, "train", batch).mean()
        return {"loss": options.emd_weight * mean, "emd": mean}

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {
            f"{name}_emd": float(predict(functools.partial(distance, model, name), part.epoch())[0].mean())
            for name, part in tests.items()
        }

    best, _ = splits.best_by()
    part = (
        "held-out part of the training set" if best == "heldout" else "test set: this selects on the test set"
    )
    watch = Figure(f"{best}_emd", "lowest", f"mean EMD on the {part}")
    return Task(step, evaluate, watch, tuple(f"{name}_emd" for name in tests))


@torch.no_grad()
def picture(model: nn.Module, features: Tensor, test: Any, path: Path, shapes: int = 6) -> None:
    """Draw real test clouds above what the generator makes of their images, one per class."""
    classes = np.unique(test.labels)
    chosen = classes[np.linspace(0, len(classes) - 1, min(shapes, len(classes))).astype(int)]
    rows = [int(np.flatnonzero(test.labels == label)[0]) for label in chosen]
    made = unit_cube(model.eval()(features[rows]).float()).cpu().numpy()
    real = unit_cube(torch.from_numpy(test.points[rows][..., :3])).numpy()
    save_clouds(real, made, [test.class_names[label] for label in chosen], path)


def save_generator(model: Any, path: Path) -> None:
    model.save(path)
