"""What does CMIGNet cost beside RANSAC on FPFH, and how much memory does its training take?

Time is that of the processor over all threads (``time.process_time``), in turns, over the same pairs of
1,024 points before the crop (768 after it) of the embedded shapes. Memory is the peak of the resident set of
a child process that trains two steps, less the peak that it had with all code loaded (a step of a tiny
network).

    python -m benchmarks.registration_cost [--only memory]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import RESULTS, interleave, process_memory, record, show
from pointcmt.data import SyntheticShapes
from pointcmt.registration import (
    CMIGNet,
    Pair,
    PairBatch,
    PairBatches,
    PairOptions,
    ShapePairs,
    registration_loss,
)
from pointcmt.registration.align import default_model
from pointcmt.registration.baselines import fgr, ransac

QUESTION = "What does CMIGNet cost beside RANSAC on FPFH, and how much memory does its training take?"
EVERY_POINT, THINNED = 0.03, 0.065
"""Voxels of the baselines: the first leaves all 768 points, the second is twice their typical distance."""


def pairs_of(points: int, per_class: int) -> ShapePairs:
    """Pairs of the protocol ``independent``."""
    shapes = SyntheticShapes("test", points, per_class=per_class, seed=0, dense_points=2 * points)
    return ShapePairs(shapes, PairOptions(pair_points=points))


def networks() -> dict[str, CMIGNet]:
    """What is timed: the paper's network, one of a quarter of its width, and the one that ships."""
    torch.manual_seed(0)
    return {
        "CMIGNet, the paper's width, 256 keypoints, 3 iterations": CMIGNet().eval(),
        "CMIGNet, a quarter of the width, 128 keypoints, 3 iterations": CMIGNet(
            width=0.25, keypoints=128
        ).eval(),
        "the network that ships, on 192 of the points": default_model(),
    }


@torch.no_grad()
def ask(model: CMIGNet, batches: list[PairBatch], points: int | None = None) -> None:
    """A network on one pair after the other."""
    for batch in batches:
        model(batch.source[:, :points], batch.target[:, :points])


def baseline(method: Callable[..., Any], pairs: list[Pair], voxel: float) -> None:
    """A baseline on one pair after the other."""
    for pair in pairs:
        method(pair.source, pair.target, voxel)


def times(count: int, rounds: int) -> list[dict[str, Any]]:
    """Ratios of times to RANSAC's."""
    whole = pairs_of(1024, 1)
    rows = range(0, len(whole), max(1, len(whole) // count))
    batches, pairs = [whole.batch([row]) for row in rows], [whole.pair(row) for row in rows]
    reference = "RANSAC on FPFH, all points"
    candidates: dict[str, Callable[[], object]] = {
        reference: partial(baseline, ransac, pairs, EVERY_POINT),
        "RANSAC on FPFH, thinned": partial(baseline, ransac, pairs, THINNED),
        "FGR on FPFH, all points": partial(baseline, fgr, pairs, EVERY_POINT),
    }
    for name, model in networks().items():
        points = model.config["points"] if "ships" in name else None
        candidates[name] = partial(ask, model, batches, points)
    found = interleave(candidates, rounds, clock=time.process_time)
    return [
        {"one pair": name, "time, RANSAC on all points = 1": timing.over(found[reference]), "seconds": timing}
        for name, timing in found.items()
    ]


def train(model: CMIGNet, pairs: ShapePairs, batch_size: int, steps: int) -> None:
    """Some steps, with Adam."""
    optimizer = torch.optim.Adam(model.train().parameters())
    for batch, _ in zip(PairBatches(pairs, batch_size).epoch(), range(steps), strict=False):
        truth = batch.rotation, batch.translation
        losses = registration_loss(model(*batch[:2], None, truth), *batch[:2], truth)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()


def measure(pipe: Connection, width: float, batch_size: int, threads: int) -> None:
    """A child process: what training adds to it in MB."""
    torch.set_num_threads(threads)
    train(CMIGNet(width=0.06, keypoints=16, size=16), pairs_of(64, 1), 2, 1)  # loads all code
    pairs = pairs_of(1024, 1)
    before = process_memory("VmHWM") / 2**20
    train(CMIGNet(width=width), pairs, batch_size, 2)
    pipe.send((before, process_memory("VmHWM") / 2**20))


def memory(width: float, batch_size: int) -> dict[str, Any]:
    """One line of the second table."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(
        target=measure, args=(theirs, width, batch_size, torch.get_num_threads())
    )
    process.start()
    theirs.close()
    try:
        before, after = ours.recv()
    finally:
        process.join(5)
        process.terminate()
    return {
        "training, batch": batch_size,
        "width": width,
        "training adds, MB": round(after - before),
        "whole process, MB": round(after),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=("time", "memory"), help="measure this and leave the other record")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.only != "memory":
        rows = times(options.pairs, options.rounds)
        show(rows)
        notes = {
            "pairs": options.pairs,
            "threads": options.threads,
            "points": 768,
            "voxels": [EVERY_POINT, THINNED],
        }
        record(options.out / "registration-cost-cpu.json", QUESTION, rows, notes=notes)
    if options.only == "time":
        return 0
    rows = [memory(1.0, 8), memory(0.25, 8)]
    show(rows)
    record(
        options.out / "registration-memory-cpu.json",
        QUESTION,
        rows,
        notes={"points": 768, "optimizer": "Adam"},
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
