"""Do memory, open files and compiled graphs stay as they are over ten thousand steps?

``python -m benchmarks.longrun --steps 10000``. PointCMT (as it is, and with its student under
``torch.compile``), pre-training (Pic@Point) and registration take training steps with tiny networks on tiny
clouds, each in a process of its own, new clouds in each step. Fifty times in a run are noted: the resident
memory, the open files, the tensors that are alive, and the graphs that were compiled. What the record has
of as many steps is not done again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._harness import RESULTS, process_memory, record
from benchmarks.kill import Tiny
from pointcmt import ImageTeacher, PointCMT
from pointcmt.adapters import Adapter, Tap
from pointcmt.generator import PointGenerator
from pointcmt.methods import PicAtPoint
from pointcmt.registration import CMIGNet, registration_loss
from pointcmt.views import ViewSpec
from pointcmt.views.sampling import draw_cameras, project_chosen

QUESTION = "Do memory, open files and compiled graphs stay as they are over a long training?"
RECORD = RESULTS / "reliability" / "longrun.json"
SAMPLES = 50
BATCH, POINTS, CLASSES = 4, 32, 5
WARM = 0.1  # of the steps: what libraries allocate once is there by then

Step = Callable[[], None]


def _clouds() -> Tensor:
    """[B, N, 3] inside the unit sphere."""
    made = torch.randn(BATCH, POINTS, 3)
    return made / made.norm(dim=-1).amax(1)[:, None, None]


def _encoder(classes: int | None, feature_dim: int | None) -> ImageTeacher:
    options = {"width": 0.0625, "layers": [1]}
    return ImageTeacher(
        classes, "simpleview_resnet", in_chans=1, feature_dim=feature_dim, backbone_options=options,
        view_spec=ViewSpec("simpleview", size=16),
    )  # fmt: skip


def _optimize(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@contextmanager
def pointcmt(compiled: bool = False) -> Iterator[Step]:
    """Training steps of PointCMT."""
    teacher, student = _encoder(CLASSES, 16), Tiny(CLASSES)
    optimizer = torch.optim.AdamW(student.parameters())
    with PointCMT(teacher, student, generator=PointGenerator(16, POINTS)) as cmt:
        call: Callable[[Tensor], Tensor] = (
            torch.compile(student, backend="aot_eager") if compiled else student
        )

        def step() -> None:
            points, labels = _clouds(), torch.randint(CLASSES, (BATCH,))
            loss = F.cross_entropy(call(points), labels)
            _optimize(optimizer, loss + cmt.loss(views=teacher.project(points)))

        yield step


@contextmanager
def pretraining() -> Iterator[Step]:
    """Training steps of Pic@Point."""
    student, encoder = Tiny(CLASSES), _encoder(None, None).eval()
    adapter = Adapter(
        name="tiny",
        matches=lambda module: isinstance(module, Tiny),
        feature_module="head",
        feature_from="input",
        classify=lambda module, feature: module.head(feature),
        local=Tap("points", "output", lambda module, tapped, inputs: (tapped, inputs[0])),
    )
    spec = encoder.view_spec
    assert spec is not None
    with PicAtPoint(encoder, student, points=_clouds(), adapter=adapter, hidden=32, out_features=16) as pre:
        trained: list[nn.Parameter] = [*student.parameters(), *pre.parameters()]
        optimizer = torch.optim.AdamW(trained)

        def step() -> None:
            points = _clouds()
            student(points)
            views = project_chosen(spec, points, draw_cameras(BATCH, spec.num_views))
            _optimize(optimizer, pre.loss(views=views))

        yield step


@contextmanager
def registration() -> Iterator[Step]:
    """Training steps of CMIGNet."""
    model = CMIGNet(views=1, keypoints=8, iterations=1, width=0.02, size=8, k=6, points=POINTS).train()
    optimizer = torch.optim.AdamW(model.parameters())
    turn = torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]).expand(BATCH, 3, 3)
    move = torch.tensor([0.1, -0.2, 0.3]).expand(BATCH, 3)

    def step() -> None:
        source = _clouds()
        target = source @ turn.mT + move[:, None]
        losses = registration_loss(model(source, target, None, (turn, move)), source, target, (turn, move))
        _optimize(optimizer, losses["loss"])

    yield step


CASES: dict[str, Callable[[], Any]] = {
    "PointCMT": pointcmt,
    "PointCMT, torch.compile": lambda: pointcmt(compiled=True),
    "pre-training (Pic@Point)": pretraining,
    "registration (CMIGNet)": registration,
}


def sample() -> dict[str, float]:
    """What must not grow, now."""
    from torch._dynamo.utils import counters

    gc.collect()
    return {
        "memory": process_memory("VmRSS") / 1e6,
        "files": len(os.listdir("/proc/self/fd")),
        "tensors": sum(issubclass(type(one), Tensor) for one in gc.get_objects()),
        "graphs": counters["stats"]["unique_graphs"],
    }


def follow(name: str, steps: int, samples: int = SAMPLES) -> list[dict[str, float]]:
    """Takes the steps in this process: samples along them, each with the step's number."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    every = max(1, steps // samples)
    with CASES[name]() as step:
        for number in range(1, steps + 1):
            step()
            if number % every == 0:
                found.append({"step": number, **sample()})
    return found


def summary(name: str, found: list[dict[str, float]]) -> dict[str, Any]:
    """A row: where each figure was after a tenth of the steps, and by how much it then grew to the end."""
    tenth = max(1, round(WARM * len(found)))
    early, late = found[tenth : 2 * tenth], found[-tenth:]

    def grew(what: str) -> float:
        return mean(one[what] for one in late) - mean(one[what] for one in early)

    return {
        "training": name,
        "steps": int(found[-1]["step"]),
        "memory after a tenth, MB": round(mean(one["memory"] for one in early), 1),
        "grew by, MB": round(grew("memory"), 1),
        "most, MB": round(max(one["memory"] for one in found), 1),
        "open files grew by": round(grew("files")),
        "tensors grew by": round(grew("tensors")),
        "graphs": int(found[-1]["graphs"]),
        "compiled again": int(found[-1]["graphs"] - found[tenth]["graphs"]),
        "memory along the run, MB": " ".join(
            f"{one['memory']:.0f}" for one in found[:: max(1, len(found) // 10)]
        ),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.longrun", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args(argv)
    if args.steps < SAMPLES:
        parser.error(f"--steps is {args.steps}; expected at least {SAMPLES}")
    there = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = {row["training"]: row for row in there if row["steps"] == args.steps}
    command = f"python -m benchmarks.longrun --steps {args.steps}"
    for name in CASES:
        if name in rows:
            continue
        with get_context("spawn").Pool(1) as pool:
            rows[name] = summary(name, pool.apply(follow, (name, args.steps)))
        print(rows[name], flush=True)
        found = [rows[known] for known in CASES if known in rows]
        record(args.out, QUESTION, found, notes={"batch": BATCH, "points": POINTS, "command": command})
    return 0


if __name__ == "__main__":
    sys.exit(main())
