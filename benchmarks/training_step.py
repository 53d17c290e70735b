"""What does PointCMT add to a training step?

For each reference student, one step (forward, losses, backward, optimizer) is timed plain, with PointCMT on
cached image features, with each of its two objectives alone, and with the teacher running on the views of the
batch. The candidates take turns in one run; every figure is the ratio to the plain step.

    python -m benchmarks.training_step                       # B = 32, N = 1024, the four students
    python -m benchmarks.training_step --students dgcnn --repeats 5
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._harness import RESULTS, interleave, record, show
from pointcmt import students
from pointcmt.data import SyntheticShapes
from pointcmt.generator import PointGenerator
from pointcmt.teacher import ImageTeacher
from pointcmt.training import PointCMT

QUESTION = "What does PointCMT add to a training step?"
STUDENTS = ("pointnet2", "dgcnn", "rscnn", "pointmlp")
FEATURE_DIM, CLASSES = 512, 40


def features_and_generator(clouds: Tensor, device: torch.device) -> tuple[Tensor, PointGenerator]:
    """Image features [B, D] and a generator that makes of them the clouds [B, N, 3] themselves.

    EMD's work depends on its clouds, and those of an untrained generator are not shapes. The weights are the
    least-norm ones that fit, plus a little, as a trained generator would not fit exactly.
    """
    random = torch.Generator().manual_seed(0)
    features = torch.randn(len(clouds), FEATURE_DIM, generator=random).relu()
    generator = PointGenerator(FEATURE_DIM, clouds.shape[1])
    weight = torch.linalg.pinv(features) @ clouds.flatten(1)
    weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=random)
    with torch.no_grad():
        generator.linear.weight.copy_(weight.T)
    return features.to(device), generator.to(device)


def stepper(
    student: nn.Module,
    points: Tensor,
    labels: Tensor,
    extra: Callable[[], Tensor] | None,
) -> Callable[[], None]:
    """One training step as a callable; ``extra`` gives the loss to add."""
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=5e-2)

    def step() -> None:
        loss = F.cross_entropy(student(points), labels, label_smoothing=0.2)
        if extra is not None:
            loss = loss + extra()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    name: str, batch: int, num_points: int, views: int, image_size: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """One row: times and ratios for one student."""
    data = SyntheticShapes("train", num_points, per_class=-(-batch // 8), seed=0)
    points = torch.as_tensor(data.points[:batch]).to(device)
    labels = torch.as_tensor(data.labels[:batch]).to(device)
    torch.manual_seed(0)
    plain = getattr(students, name)(CLASSES).to(device).train()
    teacher = ImageTeacher(CLASSES, in_chans=1, feature_dim=FEATURE_DIM).to(device)
    images = torch.rand(batch, views, 1, image_size, image_size, device=device)
    features, generator = features_and_generator(points.cpu(), device)

    given = {
        "cached": ({"image_features": features}, (30.0, 0.3)),
        "fe only": ({"image_features": features}, (30.0, 0.0)),
        "ce only": ({"image_features": features}, (0.0, 0.3)),
        "on the fly": ({"views": images}, (30.0, 0.3)),
    }
    with ExitStack() as stack:
        candidates = {"plain": stepper(copy.deepcopy(plain), points, labels, None)}
        for label, (arguments, weights) in given.items():
            student = copy.deepcopy(plain)
            cmt = stack.enter_context(PointCMT(teacher, student, generator=generator))
            for objective, weight in zip(cmt.objectives, weights, strict=True):
                objective.weight = weight
            extra = _loss(cmt, arguments)
            candidates[label] = stepper(student, points, labels, extra)
        times = interleave(candidates, repeats, device=device)
    row: dict[str, Any] = {"student": name, "plain": times["plain"]}
    for label in given:
        row[f"{label} / plain"] = times[label].over(times["plain"])
    for label in given:
        row[label] = times[label]
    return row


def _loss(cmt: PointCMT, arguments: dict[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: cmt.loss(**arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", default=STUDENTS, choices=STUDENTS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", default=None, help="the record; benchmarks/results/training_step_<device>.json"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    rows = []
    for name in options.students:
        size = (options.batch, options.points, options.views, options.image_size)
        rows.append(measure(name, *size, options.repeats, device))
        show(rows[-1:])
        gc.collect()
    return record(
        options.out or RESULTS / f"training_step_{device.type}.json",
        QUESTION,
        rows,
        notes={
            "batch": options.batch,
            "points": options.points,
            "views": options.views,
            "image_size": options.image_size,
            "teacher": "resnet18, one channel",
            "target": "cached / plain at most 1.10",
        },
    )


if __name__ == "__main__":
    main()
