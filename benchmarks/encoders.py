"""What are ImageNet's weights worth to a teacher whose images are made of points?

An encoder of photographs, frozen with a projection, frozen with one linear layer, or fine-tuned at a tenth of
the rate, on views like pictures (near is bright; or shaded), beside the same network and the small one of the
study from scratch; at 5, 20 and all labels of each class of ModelNet40, measured on the whole test set.

    python -m benchmarks.encoders --modelnet40 DIR --jobs 2      # goes on where it was stopped

Nothing is chosen by these figures but what a reader makes of them: they are of the test set.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from benchmarks._harness import RESULTS, record, show
from benchmarks.teachers import run
from pointcmt.recipes.engine import MachineOptions, OutOfTime
from pointcmt.recipes.options import DataOptions
from pointcmt.studies.jobs import Job, run_jobs, slots
from pointcmt.studies.tables import mean_sd

QUESTION = "What are ImageNet's weights worth to a teacher whose images are made of points?"
LABELS: tuple[int | None, ...] = (5, 20, None)


def photographs(views: str = "near", **changed: Any) -> dict[str, Any]:
    """Options of train-teacher for the encoder of photographs."""
    return {
        "backbone": "tf_efficientnet_lite0",
        "backbone_options": [],
        "pretrained": True,
        "views": {"size": 64, "channels": [views], "splat": 1.0},
        "loop": {"lr": 2e-3, "epochs": 20},
        **changed,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "small network from scratch, depth": {},
    "EfficientNet from scratch, near": photographs(pretrained=False),
    "ImageNet, frozen, near": photographs(backbone_lr=0.0),
    "ImageNet, linear, near": photographs(backbone_lr=0.0, feature_dim=1280),
    "ImageNet, fine-tuned at a tenth, near": photographs(backbone_lr=0.1),
    "ImageNet, fine-tuned at a tenth, shaded": photographs("shaded", backbone_lr=0.1),
}


def folder_of(work: Path, name: str, labels: int | None, seed: int) -> Path:
    return work / f"{''.join(c if c.isalnum() else '-' for c in name)}-{labels or 'all'}-{seed}"


def rows(work: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """A line for each variant and number of labels that is measured with all seeds."""
    lines = []
    for labels in LABELS:
        for name in VARIANTS:
            files = [folder_of(work, name, labels, seed) / "measured.json" for seed in seeds]
            if not all(file.exists() for file in files):
                continue
            measured = [json.loads(file.read_text()) for file in files]
            lines.append(
                {
                    "labels of a class": labels or "all",
                    "teacher": name,
                    "seeds": len(seeds),
                    "test OA %": mean_sd([one["oa"] for one in measured]),
                    "core minutes": sum(one["cpu_seconds"] for one in measured) / len(measured) / 60,
                    "parameters trained": measured[0]["parameters"],
                }
            )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoders",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--modelnet40", required=True, help="folder of ModelNet40")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--only", default="", help="only teachers whose name contains this")
    parser.add_argument("--labels", type=int, nargs="*", help="only these numbers of labels; 0 for all")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no further training after this")
    parser.add_argument("--work", type=Path, default=Path("runs/encoders"), help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=RESULTS / "explore" / "encoders.json")
    options = parser.parse_args(argv)
    machine = MachineOptions(device="cpu", tensorboard=False, minutes=options.minutes)
    jobs = []
    for labels in LABELS:
        if options.labels is not None and (labels or 0) not in options.labels:
            continue
        data = DataOptions(options.modelnet40, num_points=512, view_points=1024, per_class=labels)
        for seed in options.seeds:
            for name, changed in VARIANTS.items():
                folder = folder_of(options.work, name, labels, seed)
                if options.only in name and not (folder / "measured.json").exists():
                    call = functools.partial(run, folder, data, changed, seed)
                    jobs.append(Job(f"{name}, {labels or 'all'} labels, seed {seed}", call))
    failures = []
    try:
        for outcome in run_jobs(jobs, slots(machine, options.jobs), machine, options.work / "logs"):
            print(f"{outcome.job.name}: {outcome.failure or 'done'}", flush=True)
            failures += [outcome.job.name] if outcome.failure else []
    except OutOfTime as stop:
        print(f"out of time: {stop}")
    lines = rows(options.work, options.seeds)
    if lines:
        record(options.out, QUESTION, lines, notes={"points that views are made of": 1024})
        show(lines)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
