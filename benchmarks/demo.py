"""Is the demo's gain there every time? ``make demo``, again and again with other seeds and other shapes.

    python -m benchmarks.demo --repetitions 10      # goes on where it was stopped

Repetition r has the shapes of data seed r, a teacher of its own and students of four seeds that no other
repetition has. Nothing is chosen between them: all are in the record, ``benchmarks/results/runs-demo.json``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS, record, show
from pointcmt.recipes.engine import MachineOptions, OutOfTime
from pointcmt.studies.ablate import Cost
from pointcmt.studies.demo import Demo, demo, gains
from pointcmt.studies.tables import interval_text, mean_sd, paired_interval

QUESTION = "What do images add on clouds without labels, in `make demo` repeated with other seeds and shapes?"
STEP = 100  # between the first student seeds of two repetitions


def options_of(repetition: int, out: Path, minutes: float) -> Demo:
    """The demo with the seeds of one repetition, which begin with 1: `make demo` itself has those of 0."""
    usual = Demo()
    return replace(
        usual,
        out=out / f"repetition-{repetition}",
        first_seed=STEP * repetition,
        data=replace(usual.data, data_seed=repetition),
        machine=MachineOptions(device="cpu", tensorboard=False, progress=False, minutes=minutes),
    )


def run(repetition: int, out: Path, minutes: float) -> None:
    """One repetition, unless it is there."""
    options = options_of(repetition, out, minutes)
    done = options.out / "measured.json"
    if done.exists():
        return
    with Cost(options.out / "cost.json") as cost:
        demo(options)
        spent = cost.so_far()["cpu_seconds"]
    done.write_text(json.dumps({**measured(options), "core seconds": spent}))


def measured(options: Demo) -> dict[str, Any]:
    """What a finished demo measured."""

    def accuracy(name: str) -> float:
        return json.loads((options.out / name / "results.json").read_text())["last"]["test_oa"]

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return {
        "teacher": accuracy("teacher"),
        "plain": [accuracy(f"plain-{seed}") for seed in seeds],
        "taught": [accuracy(f"taught-{seed}") for seed in seeds],
        "gains": gains(options.out),
        "shapes": json.loads((options.out / f"taught-{seeds[0]}" / "results.json").read_text())["shapes"],
    }


def row(repetition: int, found: dict[str, Any]) -> dict[str, Any]:
    """A line of the record."""
    interval = paired_interval(np.array(found["gains"]))
    return {
        "repetition": repetition,
        "teacher OA %": f"{found['teacher']:.1f}",
        "plain OA %": mean_sd(found["plain"]),
        "taught OA %": mean_sd(found["taught"]),
        "difference": interval_text(interval),
        "core seconds": round(found["core seconds"]),
        "OA by seed": {
            "teacher": [found["teacher"]],
            "plain": found["plain"],
            "taught": found["taught"],
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so many; the command goes on")
    parser.add_argument("--work", type=Path, default=Path("runs/demo-repeated"))
    parser.add_argument("--out", type=Path, default=RESULTS / "runs-demo.json")
    options = parser.parse_args(argv)
    repetitions = range(1, options.repetitions + 1)
    try:
        for repetition in repetitions:
            run(repetition, options.work, options.minutes)
    except OutOfTime as stop:
        print(f"out of time: {stop}")
    files = {r: options.work / f"repetition-{r}" / "measured.json" for r in repetitions}
    found = {r: json.loads(file.read_text()) for r, file in files.items() if file.exists()}
    if not found:
        return 1
    usual = Demo()
    shapes = next(iter(found.values()))["shapes"]
    rows = [row(repetition, values) for repetition, values in found.items()]
    record(
        options.out,
        QUESTION,
        rows,
        notes={
            "command": f"python -m benchmarks.demo --repetitions {options.repetitions}",
            "points": usual.data.num_points,
            "labelled shapes": shapes["train"],
            "held-out shapes": shapes["heldout"],
            "shapes without labels": shapes["unlabelled"],
            "test shapes": shapes["test"],
            "students of each kind": usual.seeds,
        },
    )
    show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
