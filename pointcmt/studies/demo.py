"""The whole of PointCMT in minutes: teacher, generator, plain and PointCMT student, and a report."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointcmt.recipes.build import StudentOptions
from pointcmt.recipes.config import read_json, write_json
from pointcmt.recipes.engine import LoopOptions, MachineOptions
from pointcmt.recipes.evaluate import load_student
from pointcmt.recipes.options import DataOptions, ViewOptions
from pointcmt.recipes.progress import say, show_table
from pointcmt.recipes.train import MethodOptions, Train, train
from pointcmt.recipes.train_generator import TrainGenerator, train_generator
from pointcmt.recipes.train_teacher import TrainTeacher, train_teacher
from pointcmt.studies.charts import HEADINGS
from pointcmt.studies.report import compare, find_runs, write_report


@dataclass
class Demo:
    """All stages at a size for two cores: teacher, generator, plain and PointCMT student, and the report.

    Images are better labelled than point clouds here: the teacher learns from five times as many shapes as
    the students. FE and CE have weights for this budget; the paper's belong to its hundreds of thousands of
    steps.
    """

    out: Path = Path("runs/demo")
    """Folder of the runs and of the report. A demo that was interrupted goes on where it stood."""
    seeds: int = 4
    """Students of each kind, with different seeds."""
    data: DataOptions = field(
        default_factory=lambda: DataOptions(num_points=256, view_points=1024, per_class=20, test_per_class=40)
    )
    teacher_per_class: int = 100
    """Training shapes per class of the teacher and the generator."""
    views: ViewOptions = field(default_factory=lambda: ViewOptions(size=32))
    backbone_options: tuple[str, ...] = (
        "width=0.5",
        "layers=(1, 1, 1)",
        "stem_kernel=4",
        "stem_stride=4",
    )
    """Arguments of the teacher's backbone (simpleview_resnet), as NAME=VALUE."""
    teacher_epochs: int = 15
    """Epochs of the teacher."""
    generator_epochs: int = 8
    """Epochs of the generator."""
    epochs: int = 50
    """Epochs of each student."""
    student: StudentOptions = field(
        default_factory=lambda: StudentOptions(
            "pointnet2",
            width=0.25,
            feature_dim=128,
            student_options=("dropout=0.1", "npoints=(64,16)", "nsamples=(16,16)", "radii=(0.25,0.5)"),
        )
    )
    method: MethodOptions = field(
        default_factory=lambda: MethodOptions(fe_weight=3.0, ce_weight=0.01, guard="heldout")
    )
    machine: MachineOptions = field(default_factory=MachineOptions)


def demo(options: Demo) -> dict[str, Any]:
    """Run all stages, print the table of teacher, plain and PointCMT student, and return it."""
    began = time.perf_counter()
    if options.seeds < 1:
        raise ValueError(f"--seeds is {options.seeds}; expected at least 1")
    out, machine = options.out, options.machine
    more = replace(options.data, per_class=options.teacher_per_class)
    say(
        f"{options.data.data}: teacher → generator → {options.seeds} plain and {options.seeds} PointCMT "
        "students"
    )
    train_teacher(
        TrainTeacher(
            out / "teacher",
            data=more,
            views=options.views,
            backbone_options=options.backbone_options,
            feature_dim=options.student.feature_dim or 512,
            loop=LoopOptions(
                epochs=options.teacher_epochs,
                optimizer="adamw",
                lr=3e-3,
                weight_decay=5e-2,
                warmup=1,
                eval_every=5,
            ),
            machine=machine,
            resume=True,
        )
    )
    train_generator(
        TrainGenerator(
            out / "generator",
            teacher=out / "teacher",
            data=more,
            loop=LoopOptions(
                epochs=options.generator_epochs, optimizer="adam", weight_decay=1e-4, lr=3e-3, eval_every=5
            ),
            machine=machine,
            resume=True,
        )
    )
    student = replace(options.student, feature_dim=options.student.feature_dim or 512)
    # alternating, so that a demo that is stopped half-way has pairs
    for seed in range(options.seeds):
        for name, method in (("plain", MethodOptions(method="none")), ("pointcmt", options.method)):
            taught = method.method != "none"
            train(
                Train(
                    out / f"{name}-{seed}",
                    student=replace(student),
                    method=method,
                    teacher=out / "teacher" if taught else None,
                    generator=out / "generator" if taught else None,
                    data=options.data,
                    loop=LoopOptions(epochs=options.epochs, lr=5e-3, warmup=1, seed=seed, eval_every=5),
                    machine=machine,
                    resume=True,
                )
            )
    measure_together(sorted(out.glob("plain-*")) + sorted(out.glob("pointcmt-*")))
    entries = compare(find_runs(out))
    page = write_report(out)
    show_table(HEADINGS, [entry.cells() for entry in entries])
    say(paired(out, options.seeds))
    say(f"report: {page}")
    say(f"{time.perf_counter() - began:.0f} seconds")
    return {"entries": entries, "report": page}


def paired(out: Path, seeds: int) -> str:
    """One sentence: the difference between PointCMT and plain students of one seed, with no more said
    than is known."""
    gains = [
        read_json(out / f"pointcmt-{seed}" / "results.json")["last"]["test_oa"]
        - read_json(out / f"plain-{seed}" / "results.json")["last"]["test_oa"]
        for seed in range(seeds)
    ]
    text = f"PointCMT minus plain, last epoch: {np.mean(gains):+.1f} points"
    if seeds > 1:
        text += f" ({', '.join(f'{gain:+.1f}' for gain in gains)} by seed)"
    return (
        text
        + ". At this size a run differs from the next by a point or more: pointcmt ablate measures properly."
    )


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
