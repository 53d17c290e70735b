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
from pointcmt.recipes.features import features_of
from pointcmt.recipes.options import DataOptions, load_teacher
from pointcmt.recipes.progress import say
from pointcmt.recipes.run import RunFolder
from pointcmt.report import save_clouds


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


def train_generator(options: TrainGenerator) -> dict[str, Any]:
    """Train a generator into a run folder and return its results."""
    accelerator = make_accelerator(options.machine)
    splits = options.data.load()
    if not 1 <= (options.generator_points or 1) <= options.data.num_points:
        raise ValueError(
            f"--generator-points {options.generator_points}: expected between 1 and --num-points "
            f"{options.data.num_points}"
        )
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
        splits, teacher, file, accelerator, options.features, options.images, workers=options.machine.workers
    )
    features = {
        name: cache[torch.arange(len(splits.parts()[name]))].to(accelerator.device)
        for name, (_, cache) in caches.items()
    }

    seed_everything(options.loop.seed)
    generator = PointGenerator(
        teacher.feature_dim, options.generator_points or options.data.num_points, options.dropout
    )

    def batches(name: str, seed: int | None = None) -> Batches:
        return Batches(
            splits.parts()[name],
            options.loop.batch_size,
            accelerator.device,
            seed,
            accelerator.process_index,
            accelerator.num_processes,
        )

    def distance(model: nn.Module, name: str, batch: Batch) -> Tensor:
        generated = model(features[name][batch.index]).float()
        real = batch.inputs[:, : generated.shape[1], :3]
        return emd(unit_cube(generated), unit_cube(real))[0]

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        mean = distance(model, "train", batch).mean()
        return {"loss": options.emd_weight * mean, "emd": mean}

    tests = {name: batches(name) for name in splits.parts() if name != "train"}

    def evaluate(model: nn.Module) -> dict[str, float]:
        result = {}
        for name, part in tests.items():
            distances, _ = predict(functools.partial(distance, model, name), part, accelerator)
            result[f"{name}_emd"] = float(distances.mean())
        return result

    best, _ = splits.best_by()
    part = (
        "held-out part of the training set" if best == "heldout" else "test set: this selects on the test set"
    )
    task = Task(
        model=generator,
        batches=batches("train", options.loop.seed),
        step=step,
        evaluate=evaluate,
        save=save_generator,
        watch=f"{best}_emd",
        watch_means=f"mean EMD on the {part}",
        higher_is_better=False,
        headline=tuple(f"{name}_emd" for name in tests),
    )
    outcome = fit(task, options.loop, options.machine, accelerator, run)
    if accelerator.is_main_process:
        save_generator(task.model, run.path / "generator.safetensors")
        picture(task.model, features["test"], splits.test, run.path / "generated.png")
    return run.finish(
        {
            **outcome,
            "parameters": count_parameters(task.model),
            "shapes": {name: len(part) for name, part in splits.parts().items()},
        }
    )


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
