"""What does Pic@Point add to a training step?

For each network, one step (forward, loss, backward, optimizer) is timed by itself, the frozen image encoder
on one view of each shape by itself, and Pic@Point's whole step: with the encoder running, and with what it
says of stored views given. The candidates take turns in one run. The time is that of the process on the CPU
(on a GPU the clock's), which other work on a busy machine touches little.

    python -m benchmarks.pretraining_step                     # B = 32, N = 1024, resnet18 on 224 × 224 pixels
    python -m benchmarks.pretraining_step --students dgcnn --repeats 3
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._harness import RESULTS, interleave, record, show
from pointcmt import students
from pointcmt.data import SyntheticShapes
from pointcmt.methods import PicAtPoint
from pointcmt.teacher import ImageTeacher
from pointcmt.types import TeacherOutput, Views
from pointcmt.views import ViewSpec
from pointcmt.views.sampling import draw_cameras, project_chosen

QUESTION = "What does Pic@Point add to a training step?"
STUDENTS: dict[str, dict[str, Any]] = {"pointnet2": {}, "dgcnn": {}, "pointnext": {}, "rscnn": {}}
TARGETS = {"with the encoder": 1.3, "cached": 1.15}
CLASSES = 40


def stepper(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One training step as a callable."""
    optimizer = torch.optim.Adam(list(parameters), 1e-3, weight_decay=1e-6)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    name: str, batch: int, points: int, size: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """One row: times and ratios for one network."""
    data = SyntheticShapes("train", points, per_class=-(-batch // 8), seed=0)
    clouds = torch.as_tensor(data.points[:batch]).to(device)
    labels = torch.as_tensor(data.labels[:batch]).to(device)
    spec = ViewSpec("dodecahedron20", size, splat=1.5, up=data.up or "z")
    torch.manual_seed(0)
    encoder = ImageTeacher(None, in_chans=1, feature_dim=None, view_spec=spec).to(device).eval()
    views = project_chosen(spec, clouds, draw_cameras(batch, spec.num_views))
    plain = getattr(students, name)(CLASSES, **STUDENTS[name]).to(device).train()

    @torch.no_grad()
    def see() -> TeacherOutput:
        return encoder(views.images, per_view=True, maps=True)

    without_images = views._replace(images=views.images.new_empty(*views.images.shape[:3], 0, 0))
    said = see()._replace(views=without_images)
    candidates: dict[str, Callable[[], object]] = {
        "network": stepper(plain.parameters(), lambda: F.cross_entropy(plain(clouds), labels)),
        "encoder": see,
    }
    cases: dict[str, tuple[int | None, dict[str, TeacherOutput | Views]]] = {
        "with the encoder": (64, {"views": views}),
        "cached": (64, {"image_features": said}),
        "cached, all local features": (None, {"image_features": said}),
    }
    with ExitStack() as stack:
        for label, (local_points, given) in cases.items():
            network = copy.deepcopy(plain)
            pre = stack.enter_context(
                PicAtPoint(encoder, network, points=clouds[:4], local_points=local_points)
            )
            # what gets no gradient has no step either
            own = [*network.parameters(), *pre.parameters()]
            candidates[label] = stepper(own, _loss(network, pre, clouds, given))
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        times = interleave(candidates, repeats, device=device, clock=clock)
        features = pre.sizes.local if pre.sizes is not None else None
    row: dict[str, Any] = {"network": name, "size of a local feature": features}
    row["with the encoder / (network + encoder)"] = times["with the encoder"].median / (
        times["network"].median + times["encoder"].median
    )
    row["cached / network"] = times["cached"].over(times["network"])
    row["cached, all local features / network"] = times["cached, all local features"].over(times["network"])
    row["encoder / network"] = times["encoder"].over(times["network"])
    return row | {
        f"{label} alone" if label == "network" else label: timing for label, timing in times.items()
    }


def _loss(network: nn.Module, pre: PicAtPoint, clouds: Tensor, given: dict[str, Any]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        network(clouds)
        return pre.loss(**given)

    return loss


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="the record; benchmarks/results/pretraining_step_<device>.json"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the other networks' rows that the record has"
    )
    parser.add_argument("--machine", default="", help="what else the machine did, for the record")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    path = options.out or RESULTS / f"pretraining_step_{device.type}.json"
    rows = json.loads(path.read_text())["rows"] if options.add and path.exists() else []
    rows = [row for row in rows if row["network"] not in options.students]
    for name in options.students:
        size = (options.batch, options.points, options.image_size)
        rows.append(measure(name, *size, options.repeats, device))
        show(rows[-1:])
        gc.collect()
    return record(
        path,
        QUESTION,
        rows,
        notes={
            "batch": options.batch,
            "points": options.points,
            "image_size": options.image_size,
            "encoder": "resnet18, one channel, frozen, one view of each shape",
            "heads": "512 wide, 64 local features of each cloud",
            "clock": "CPU time of the process" if device.type == "cpu" else "wall time",
            "targets": TARGETS,
            **({"machine": options.machine} if options.machine else {}),
        },
    )


if __name__ == "__main__":
    main()
