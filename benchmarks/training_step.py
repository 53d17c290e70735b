"""What does PointCMT add to a training step?

For each reference student, one step (forward, losses, backward, optimizer) is timed plain, with PointCMT on
cached image features, and with the teacher running on the views of the batch. The candidates take turns in
one run; every figure is the ratio to the plain step. The parts are timed by themselves, forward and backward,
on features as the student has them, and given as parts of the plain step too: they say where time goes even
where whole steps of many seconds scatter more than what is added to them.

    python -m benchmarks.training_step                       # B = 32, N = 1024, the four students
    python -m benchmarks.training_step --students DGCNN --repeats 5
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
from pointcmt.methods import PointCMT
from pointcmt.objectives import FeatureEnhancement
from pointcmt.ops import emd, unit_cube
from pointcmt.teacher import ImageTeacher
from pointcmt.types import StudentState, TeacherOutput

QUESTION = "What does PointCMT add to a training step?"
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "PointNet++ SSG": ("pointnet2", {}),
    "DGCNN": ("dgcnn", {}),
    "RS-CNN": ("rscnn", {}),
    "PointMLP-Elite": ("pointmlp", {"variant": "elite"}),
    "PointMLP": ("pointmlp", {}),
}
FEATURE_DIM, CLASSES = 512, 40
SECONDS = 45.0  # per student, once two rounds are done


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
    extra: Callable[[int | None], Tensor] | None,
) -> Callable[..., None]:
    """One training step as a callable, on the first ``few`` clouds or all; ``extra`` gives a loss to add."""
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=5e-2)

    def step(few: int | None = None) -> None:
        loss = F.cross_entropy(student(points[:few]), labels[:few], label_smoothing=0.2)
        if extra is not None:
            loss = loss + extra(few)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def parts(
    cmt: PointCMT, state: StudentState, image: TeacherOutput, images: Tensor
) -> dict[str, Callable[[], Any]]:
    """What PointCMT adds, piece by piece: forward, and backward into the student's feature and logits."""
    enhancement, classification = cmt.objectives
    assert isinstance(enhancement, FeatureEnhancement) and enhancement.generator is not None
    with torch.no_grad():
        x, y = (unit_cube(enhancement.generator(feature)) for feature in (state.feature, image.feature))

    def both(objective: nn.Module) -> None:
        leaves = StudentState(
            state.feature.clone().requires_grad_(), state.logits.clone().requires_grad_(), cmt.classify
        )
        objective(leaves, image).backward()

    @torch.no_grad()
    def teach() -> None:
        cmt.teacher(images)

    return {
        "FE": lambda: both(enhancement),
        "of it EMD": lambda: emd(x, y),
        "CE": lambda: both(classification),
        "teacher": teach,
    }


def measure(
    name: str, batch: int, num_points: int, views: int, image_size: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """One row: times and ratios for one student."""
    data = SyntheticShapes("train", num_points, per_class=-(-batch // 8), seed=0)
    points = torch.as_tensor(data.points[:batch]).to(device)
    labels = torch.as_tensor(data.labels[:batch]).to(device)
    torch.manual_seed(0)
    factory, arguments = STUDENTS[name]
    plain = getattr(students, factory)(CLASSES, **arguments).to(device).train()
    teacher = ImageTeacher(CLASSES, in_chans=1, feature_dim=FEATURE_DIM).to(device)
    images = torch.rand(batch, views, 1, image_size, image_size, device=device)
    features, generator = features_and_generator(points.cpu(), device)

    given = {"cached": {"image_features": features}, "on the fly": {"views": images}}
    with ExitStack() as stack:
        candidates = {"plain": stepper(copy.deepcopy(plain), points, labels, None)}
        contexts = {}
        for label, source in given.items():
            student = copy.deepcopy(plain)
            contexts[label] = stack.enter_context(PointCMT(teacher, student, generator=generator))
            candidates[label] = stepper(student, points, labels, _loss(contexts[label], source))
        for step in candidates.values():  # the first step also proves the adapter: a few clouds do
            step(min(4, batch))
        interleave({"plain": candidates["plain"]}, 1, warmup=0, device=device)
        times = interleave(candidates, repeats, warmup=0, device=device, seconds=SECONDS, at_least=2)
        cmt = contexts["cached"]
        logits = cmt.student(points)
        state = StudentState(cmt.feature.detach(), logits.detach(), cmt.classify)
        with torch.no_grad():
            image = TeacherOutput(features, teacher.classify(features))
        pieces = interleave(parts(cmt, state, image, images), max(repeats, 5), device=device, seconds=SECONDS)
    row: dict[str, Any] = {"student": name}
    row["cached / plain"] = times["cached"].over(times["plain"])
    row["on the fly / plain"] = times["on the fly"].over(times["plain"])
    for label, timing in pieces.items():
        row[f"{label}, part of plain"] = timing.over(times["plain"])
    return row | times | {f"{label} alone": timing for label, timing in pieces.items()}


def _loss(cmt: PointCMT, source: dict[str, Tensor]) -> Callable[[int | None], Tensor]:
    return lambda few: cmt.loss(**{name: tensor[:few] for name, tensor in source.items()})


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
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
