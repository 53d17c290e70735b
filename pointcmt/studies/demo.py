"""Few labels, many clouds without: teacher, plain students, students that images taught, and a report."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointcmt.data.config import shared_shapes
from pointcmt.recipes.build import StudentOptions
from pointcmt.recipes.config import read_json, write_json
from pointcmt.recipes.engine import LoopOptions, MachineOptions
from pointcmt.recipes.evaluate import load_student
from pointcmt.recipes.options import DataOptions, ViewOptions
from pointcmt.recipes.progress import say, show_table
from pointcmt.recipes.run import held
from pointcmt.recipes.train import MethodOptions, Train, train
from pointcmt.recipes.train_teacher import TrainTeacher, train_teacher
from pointcmt.studies.charts import HEADINGS
from pointcmt.studies.report import compare, find_runs, write_report
from pointcmt.studies.tables import paired_interval


@dataclass
class Demo:
    """Few labels, many clouds without, at a size for two cores: teacher, students, and the report.

    The teacher learns from images of the same few labelled shapes as the students, projected from the points.
    Then it teaches the students, on the labelled clouds and on those without labels.
    """

    out: Path = Path("runs/demo")
    """Folder of the runs and of the report. A demo that was interrupted goes on where it stood."""
    seeds: int = 4
    """Students of each kind, with different seeds."""
    first_seed: int = 0
    """Seed of the first students and of the teacher; the others count on from it."""
    data: DataOptions = field(
        default_factory=lambda: DataOptions(
            num_points=256, view_points=1024, per_class=60, labels_per_class=5, test_per_class=50
        )
    )
    views: ViewOptions = field(default_factory=lambda: ViewOptions(size=32, channels=("depth", "normal")))
    backbone_options: tuple[str, ...] = (
        "width=0.5",
        "layers=(1, 1, 1)",
        "stem_kernel=4",
        "stem_stride=4",
    )
    """Arguments of the teacher's backbone (simpleview_resnet), as NAME=VALUE."""
    teacher_epochs: int = 60
    """Epochs of the teacher."""
    epochs: int = 150
    """Epochs of each student."""
    batch_size: int = 16
    """Labelled shapes in a step."""
    student: StudentOptions = field(
        default_factory=lambda: StudentOptions(
            "pointnet2",
            width=0.25,
            feature_dim=128,
            student_options=("dropout=0.1", "npoints=(64,16)", "nsamples=(16,16)", "radii=(0.25,0.5)"),
        )
    )
    method: MethodOptions = field(
        default_factory=lambda: MethodOptions(
            fe_weight=0,
            ce_weight=0,
            objectives=("soft_labels=1",),
            unlabelled_objectives=("soft_labels=3",),
            guard="none",
        )
    )
    machine: MachineOptions = field(default_factory=MachineOptions)


def demo(options: Demo) -> dict[str, Any]:
    """Run all stages, print the table of teacher, plain and taught students, and return it.

    Raises:
        RuntimeError: another process is at work in the folder.
    """
    if options.seeds < 1:
        raise ValueError(f"--seeds is {options.seeds}; expected at least 1")
    with held(options.out):
        return run_demo(options)


def run_demo(options: Demo) -> dict[str, Any]:
    """:func:`demo` in a folder that no other command is at work in."""
    began = time.perf_counter()
    out, machine = options.out, options.machine
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    student = replace(options.student, feature_dim=options.student.feature_dim or 512)
    with shared_shapes():
        shapes = options.data.load()
        without = 0 if shapes.unlabelled is None else len(shapes.unlabelled)
        say(
            f"{options.data.data}: {len(shapes.train)} labelled shapes of {shapes.train.num_classes} "
            f"classes, {without} without labels. Teacher → {options.seeds} plain students and "
            f"{options.seeds} that its images teach"
        )
        train_teacher(
            TrainTeacher(
                out / "teacher",
                data=options.data,
                views=options.views,
                backbone_options=options.backbone_options,
                feature_dim=student.feature_dim or 512,
                loop=LoopOptions(
                    epochs=options.teacher_epochs,
                    batch_size=options.batch_size,
                    optimizer="adamw",
                    lr=3e-3,
                    warmup=1,
                    eval_every=60,
                    seed=options.first_seed,
                ),
                machine=machine,
                resume=True,
            )
        )
        # alternating, so that a demo that is stopped half-way has pairs
        for seed in seeds:
            for name, method in (("plain", MethodOptions(method="none")), ("taught", options.method)):
                train(
                    Train(
                        out / f"{name}-{seed}",
                        student=replace(student),
                        method=method,
                        teacher=out / "teacher" if method.method != "none" else None,
                        data=options.data,
                        loop=LoopOptions(
                            epochs=options.epochs,
                            batch_size=options.batch_size,
                            lr=5e-3,
                            warmup=1,
                            seed=seed,
                            eval_every=75,
                        ),
                        machine=machine,
                        resume=True,
                    )
                )
    measure_together(sorted(out.glob("plain-*")) + sorted(out.glob("taught-*")))
    entries = compare(find_runs(out))
    page = write_report(out)
    show_table(HEADINGS, [entry.cells() for entry in entries])
    gained = gains(out)
    say(in_words(gained))
    say(f"report: {page}")
    say(f"{time.perf_counter() - began:.0f} seconds")
    return {"entries": entries, "report": page, "gains": gained}


def gains(out: Path) -> list[float]:
    """Taught minus plain in points of accuracy on the test shapes, last epoch, seed by seed."""
    pairs = [
        (folder, folder.with_name(folder.name.replace("taught-", "plain-")))
        for folder in sorted(out.glob("taught-*"), key=lambda folder: int(folder.name.split("-")[1]))
    ]
    return [
        read_json(taught / "results.json")["last"]["test_oa"]
        - read_json(plain / "results.json")["last"]["test_oa"]
        for taught, plain in pairs
    ]


def in_words(gained: list[float]) -> str:
    """The gain in one sentence, with no more said than is known."""
    text = f"taught minus plain, last epoch: {np.mean(gained):+.1f}"
    interval = paired_interval(np.array(gained))
    if interval is not None:
        text += f" ± {interval[1]:.1f} points (95 % interval over {len(gained)} seeds; "
        text += f"{', '.join(f'{gain:+.1f}' for gain in gained)})"
    else:
        text += " points, of one seed: more of them would give an interval"
    return text


@torch.no_grad()
def measure_together(folders: list[Path], batch: int = 16, rounds: int = 9) -> None:
    """Time all students in turns, round by round, so that what else the machine does strikes all alike.

    Writes ``milliseconds_per_cloud`` (median; batches of ``batch``) into each results.json.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = []
    for folder in folders:
        model, adapter, config = load_student(folder)
        points = (
            torch.rand(batch, config["num_points"], 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
        )
        loaded.append((model.to(device), adapter.arrange(points.to(device))))
    times: list[list[float]] = [[] for _ in folders]
    for _ in range(rounds + 1):
        for (model, points), spent in zip(loaded, times, strict=True):
            began = time.perf_counter()
            model(points)
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - began)
    for folder, spent in zip(folders, times, strict=True):
        results = read_json(folder / "results.json")
        results["milliseconds_per_cloud"] = round(1000 * float(np.median(spent[1:])) / batch, 3)
        write_json(folder / "results.json", results)
