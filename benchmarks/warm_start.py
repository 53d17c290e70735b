"""Does FE's matching save work when it starts from a matching that is known?

A real training run: a student learns ModelNet40 under an image teacher by PointCMT, and the EMD of every step
is solved three times on the same clouds: cold, from the identity (point k of both clouds comes from the same
row of the generator), and from the matching that the same shape had in the last epoch. Bids are counted, the
calls are timed in turns, and the three distances compared.

    python -m benchmarks.warm_start --modelnet40 DIR                          # trains a small teacher first
    python -m benchmarks.warm_start --modelnet40 DIR --teacher RUN --generator RUN     # or takes yours
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import RESULTS, record, show
from pointcmt import PointCMT, students
from pointcmt.data import Augmentation
from pointcmt.objectives import ClassifierEnhancement, FeatureEnhancement
from pointcmt.ops import emd_statistics
from pointcmt.recipes.engine import LoopOptions, MachineOptions, make_accelerator
from pointcmt.recipes.features import features_of
from pointcmt.recipes.options import DataOptions, ViewOptions, load_generator, load_teacher
from pointcmt.recipes.train_generator import TrainGenerator, train_generator
from pointcmt.recipes.train_teacher import TrainTeacher, train_teacher

QUESTION = (
    "What does FE's matching save in a real run when it starts from the identity, or from last epoch's?"
)
STARTS = ("cold", "identity", "last epoch")


def prepare(folder: Path, data: DataOptions, args: argparse.Namespace) -> tuple[Path, Path]:
    """A small teacher and a generator, trained here unless they are given."""
    machine = MachineOptions(device="cpu", tensorboard=False)
    if args.teacher is None:
        args.teacher = folder / "teacher"
        backbone = ("width=0.5", "layers=(1, 1, 1)", "stem_kernel=4", "stem_stride=4")
        loop = LoopOptions(
            epochs=args.teacher_epochs,
            optimizer="adamw",
            lr=3e-3,
            weight_decay=5e-2,
            warmup=1,
            eval_every=args.teacher_epochs,
        )
        train_teacher(
            TrainTeacher(
                args.teacher,
                data=data,
                views=ViewOptions(size=32),
                backbone_options=backbone,
                feature_dim=128,
                loop=loop,
                machine=machine,
            )
        )
    if args.generator is None:
        args.generator = folder / "generator"
        loop = LoopOptions(
            epochs=args.generator_epochs,
            optimizer="adam",
            lr=3e-3,
            weight_decay=1e-4,
            eval_every=args.generator_epochs,
        )
        train_generator(
            TrainGenerator(args.generator, teacher=args.teacher, data=data, loop=loop, machine=machine)
        )
    return args.teacher, args.generator


class Starts:
    """FE's distance, solved from each start; what it took is summed up until :meth:`row` reads it."""

    def __init__(self, shapes: int) -> None:
        self.last: Tensor | None = None  # int32 [shapes, N]: last epoch's matching, -1 where there is none
        self.shapes = shapes
        self.index = torch.empty(0, dtype=torch.int64)  # of the batch at hand
        self.forget()

    def forget(self) -> None:
        self.calls, self.kept, self.apart = 0, 0.0, 0.0
        self.bids = dict.fromkeys(STARTS, 0.0)
        self.seconds = dict.fromkeys(STARTS, 0.0)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        batch, n, _ = x.shape
        if self.last is None:
            self.last = torch.full((self.shapes, n), -1, dtype=torch.int32)
        before = self.last[self.index].long()
        initial = {
            "cold": None,
            "identity": torch.arange(n).expand(batch, -1).contiguous(),
            "last epoch": before if (before >= 0).all() else None,
        }
        order = [STARTS[(k + self.calls) % 3] for k in range(3)]  # none is always the first, with cold caches
        found = {}
        for name in order:
            began = time.perf_counter()
            found[name] = emd_statistics(x, y, initial=initial[name])
            self.seconds[name] += time.perf_counter() - began
            self.bids[name] += found[name][2].bids.double().mean().item()
        self.calls += 1
        distance, assignment, _ = found["cold"]
        self.kept += (assignment == before).double().mean().item()
        for name in STARTS[1:]:
            self.apart = max(self.apart, abs(found[name][0].mean() / distance.mean() - 1).item())
        self.last[self.index] = assignment.int()
        return distance

    def row(self, epoch: int) -> dict[str, Any]:
        """One epoch's line."""
        line: dict[str, Any] = {"epoch": epoch, "bids, cold": self.bids["cold"] / self.calls}
        for name in STARTS[1:]:
            line[f"bids, {name} / cold"] = self.bids[name] / self.bids["cold"]
            line[f"time, {name} / cold"] = self.seconds[name] / self.seconds["cold"]
        line["partners kept since last epoch"] = self.kept / self.calls
        if epoch == 1:  # there was none before
            line |= {key: None for key in line if "last epoch" in key}
        line["losses differ by at most"] = self.apart
        self.forget()
        return line


def run(args: argparse.Namespace, folder: Path, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Trains, and gives the settings; ``report`` gets one row per epoch."""
    data = DataOptions(
        data=args.modelnet40, num_points=args.points, per_class=args.per_class, test_per_class=2
    )
    splits = data.load()
    teacher_run, generator_run = prepare(folder, data, args)
    teacher, file = load_teacher(teacher_run, splits.train.class_names)
    generator, _ = load_generator(generator_run, teacher.feature_dim)
    accelerator = make_accelerator(MachineOptions(device="cpu"))
    caches = features_of(splits, teacher, file, accelerator, args.features or folder / "features", None)
    features = caches["train"][1][torch.arange(len(splits.train))]
    points = torch.from_numpy(splits.train.points).float()
    labels = torch.as_tensor(splits.train.labels)

    torch.manual_seed(0)
    student = students.pointnet2(
        splits.train.num_classes, width=0.25, feature_dim=teacher.feature_dim
    ).train()
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3, weight_decay=5e-2)
    steps = args.epochs * -(-len(points) // args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    augment = Augmentation((2 / 3, 1.5), 0.2)
    starts = Starts(len(points))
    objectives = [FeatureEnhancement(distance=starts), ClassifierEnhancement()]
    with PointCMT(teacher, student, generator=generator, objectives=objectives) as cmt:
        for epoch in range(1, args.epochs + 1):
            for index in torch.randperm(len(points)).split(args.batch):
                starts.index = index
                logits = student(augment(points[index, : args.student_points]))
                loss = F.cross_entropy(logits, labels[index], label_smoothing=0.2)
                (loss + cmt.loss(image_features=features[index])).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            report(starts.row(epoch))
    return {
        "student": f"PointNet++ SSG of width 0.25 on {args.student_points} points",
        "generated points": generator.num_points,
        "shapes": len(points),
        "batch": args.batch,
        "epochs": args.epochs,
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modelnet40", default=os.environ.get("POINTCMT_MODELNET40"))
    parser.add_argument("--teacher", type=Path, help="run folder of `pointcmt train-teacher`")
    parser.add_argument("--generator", type=Path, help="run folder of `pointcmt train-generator`")
    parser.add_argument("--features", type=Path, help="folder of the teacher's cached features")
    parser.add_argument("--points", type=int, default=1024, help="per shape, and of the generator")
    parser.add_argument("--student-points", type=int, default=256, help="that the student sees")
    parser.add_argument("--per-class", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--generator-epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / "warm_start-cpu.json")
    args = parser.parse_args(argv)
    if args.modelnet40 is None:
        print("not measured: give --modelnet40, or set POINTCMT_MODELNET40")
        return 0
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        show(rows[-1:])

    with tempfile.TemporaryDirectory() as folder:
        notes = run(args, Path(folder), report)
    chosen = sorted({1, 2, 5, 10, args.epochs} & set(range(1, args.epochs + 1)))
    record(args.out, QUESTION, [rows[epoch - 1] for epoch in chosen], notes=notes)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
