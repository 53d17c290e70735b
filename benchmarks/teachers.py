"""What makes a good teacher of images that are made of points?

One recipe, and each of its settings changed by itself: rig, number and size of views, what a view shows,
backbone, schedule, augmentation, averaged weights. All are trained on the same few labelled shapes of
ModelNet40, with several seeds, and measured on the whole test set.

    python -m benchmarks.teachers --modelnet40 DIR --jobs 2      # goes on where it was stopped
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS, record, show
from pointcmt.recipes.config import override
from pointcmt.recipes.engine import LoopOptions, MachineOptions, OutOfTime
from pointcmt.recipes.options import DataOptions, ViewOptions
from pointcmt.recipes.train_teacher import TrainTeacher, train_teacher
from pointcmt.studies.ablate import Cost
from pointcmt.studies.jobs import Job, run_jobs, slots

QUESTION = "What makes a good teacher of images that are made of points?"
BASE = "the study's recipe"
BACKBONE = {"width": "0.5", "layers": "(1,1,1)", "stem_kernel": "4", "stem_stride": "4"}


def backbone(**changed: str) -> dict[str, Any]:
    return {"backbone_options": [f"{name}={value}" for name, value in (BACKBONE | changed).items()]}


def views(**changed: Any) -> dict[str, Any]:
    return {"views": changed}


def loop(**changed: Any) -> dict[str, Any]:
    return {"loop": changed}


# what is changed -> to what -> options of train-teacher
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "–": {BASE: {}},
    "size of a view": {
        "16": views(size=16) | backbone(stem_kernel="2", stem_stride="2"),
        "64, stem of stride 8": views(size=64) | backbone(stem_kernel="8", stem_stride="8"),
        "64": views(size=64),
    },
    "cameras": {"12 in a ring": views(rig="ring12"), "20 of a dodecahedron": views(rig="dodecahedron20")},
    "a view shows": {
        "depth and density": views(channels=["depth", "density"]),
        "depth and normals": views(channels=["depth", "normal"]),
        "depth of points 1 pixel wide": views(splat=1.0),
    },
    "pooling of views": {"mean": {"view_pool": "mean"}},
    "views left out of a step": {"half": {"view_dropout": 0.5}},
    "augmentation": {
        "none": {"augment_scale": 1.0, "augment_shift": 0.0},
        "stronger: 1.5, 0.2": {"augment_scale": 1.5, "augment_shift": 0.2},
    },
    "averaged weights": {"decay 0.99": loop(average=0.99)},
    "label smoothing": {"none": {"label_smoothing": 0.0}},
    "dropout": {"0.5": {"dropout": 0.5}},
    "backbone": {"twice as wide": backbone(width="1.0"), "twice as deep": backbone(layers="(2,2,2)")},
    "epochs": {"20": loop(epochs=20), "80": loop(epochs=80)},
    "optimiser": {"Adam, 1e-3": loop(optimizer="adam", lr=1e-3, weight_decay=1e-4)},
    "together": {
        "depth and normals, 80 epochs": views(channels=["depth", "normal"]) | loop(epochs=80),
    },
}


def plan(out: Path, data: DataOptions, changed: dict[str, Any], seed: int) -> TrainTeacher:
    """The base recipe, which is that of the teacher `few` in configs/cpu.yaml, with some of it changed."""
    base = TrainTeacher(
        out,
        data=data,
        views=ViewOptions(size=32),
        backbone_options=tuple(backbone()["backbone_options"]),
        feature_dim=128,
        loop=LoopOptions(
            epochs=40, optimizer="adamw", lr=4e-3, weight_decay=0.05, warmup=1, eval_every=1000, seed=seed
        ),
        machine=MachineOptions(device="cpu", tensorboard=False),
        resume=True,
    )
    return override(base, copy.deepcopy(changed), "the variant")


def run(out: Path, data: DataOptions, changed: dict[str, Any], seed: int) -> None:
    """Train one teacher; ``measured.json`` in its folder says how good it is and what it took."""
    with Cost(out / "cost.json") as cost:
        results = train_teacher(plan(out, data, changed, seed))
        measured = {"oa": results["last"]["test_oa"], "parameters": results["parameters"], **cost.so_far()}
        (out / "measured.json").write_text(json.dumps(measured))


def rows(out: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """A line for each variant that is measured with all seeds."""
    lines, base = [], None
    for what, variants in VARIANTS.items():
        for name in variants:
            files = [folder_of(out, what, name, seed) / "measured.json" for seed in seeds]
            if not all(file.exists() for file in files):
                continue
            measured = [json.loads(file.read_text()) for file in files]
            oa = np.array([m["oa"] for m in measured])
            seconds = float(np.mean([m["cpu_seconds"] for m in measured]))
            base = (oa, seconds) if name == BASE else base
            line = {
                "changed": what,
                "to": name,
                "seeds": len(seeds),
                "test OA %": f"{oa.mean():.1f} ± {oa.std(ddof=1):.1f}" if len(oa) > 1 else f"{oa.mean():.1f}",
                "difference": None if base is None or name == BASE else float((oa - base[0]).mean()),
                "cost, times the recipe's": None if base is None else seconds / base[1],
                "parameters": measured[0]["parameters"],
            }
            lines.append(line)
    return lines


def folder_of(out: Path, what: str, name: str, seed: int) -> Path:
    letters = "".join(c if c.isalnum() else "-" for c in f"{what}-{name}".replace("–", "base"))
    return out / f"{letters}-{seed}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--modelnet40", required=True, help="folder of ModelNet40")
    parser.add_argument("--per-class", type=int, default=20, help="labelled shapes of each class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--only", default="", help="only where what is changed contains this; and the base")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no further training after this")
    parser.add_argument("--work", type=Path, default=Path("runs/teachers"), help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=RESULTS / "explore" / "teachers.json")
    options = parser.parse_args(argv)

    data = DataOptions(options.modelnet40, num_points=512, view_points=1024, per_class=options.per_class)
    machine = MachineOptions(device="cpu", tensorboard=False, minutes=options.minutes)
    jobs = [
        Job(f"{what}: {name}, seed {seed}", functools.partial(run, folder, data, changed, seed))
        for seed in options.seeds
        for what, variants in VARIANTS.items()
        for name, changed in variants.items()
        if name == BASE or options.only in what
        if not ((folder := folder_of(options.work, what, name, seed)) / "measured.json").exists()
    ]
    failures = []
    try:
        for outcome in run_jobs(jobs, slots(machine, options.jobs), machine, options.work / "logs"):
            print(f"{outcome.job.name}: {outcome.failure or 'done'}", flush=True)
            failures += [outcome.job.name] if outcome.failure else []
    except OutOfTime as stop:
        print(f"out of time: {stop}")
    lines = rows(options.work, options.seeds)
    record(
        options.out,
        QUESTION,
        lines,
        notes={
            "labelled shapes of each class": options.per_class,
            "held out of these": data.holdout,
            "points that views are made of": 1024,
            "seeds": options.seeds,
            "recipe": "teacher `few` of configs/cpu.yaml",
        },
    )
    show(lines)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
