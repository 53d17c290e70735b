"""Study of registration: CMIGNet, what its parts add, and what people use, on pairs made of ModelNet40.

    python -m benchmarks.registration --data DIR [--runs runs/registration] [--minutes 30] [--only TEXT]

goes through the cells of ``benchmarks/configs/registration.yaml`` in their order and writes a record for each
into ``benchmarks/results/registration/records``. A cell whose record is there is skipped and one that was
stopped goes on from its last epoch, so the command can be killed and started again at any time; to the same
records but for the time taken. :mod:`benchmarks.registration_page` turns records into the section of
docs/registration.md.

A cell is a network (trained on the first half of the categories) or a baseline, under one protocol, measured
on the same test pairs: ``same`` (test shapes of the training categories), ``unseen`` (of the others),
``noise`` (those again with noise), and ``noise 0.04`` and so on where the cell asks for a curve.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.spatial.transform import Rotation

from benchmarks._harness import RESULTS, ROOT, commit, machine
from pointcmt.checkpoint import atomic_write
from pointcmt.data import PointDataset
from pointcmt.recipes.engine import LoopOptions, MachineOptions, count_parameters
from pointcmt.recipes.options import DataOptions
from pointcmt.recipes.train_registration import (
    NetworkOptions,
    TrainRegistration,
    baseline_voxel,
    train_registration,
)
from pointcmt.registration import (
    CMIGNet,
    LossWeights,
    Pair,
    PairOptions,
    ShapePairs,
    category_halves,
)
from pointcmt.registration.baselines import BASELINES, icp, run_baseline
from pointcmt.tasks.registration import (
    registration_metrics,
    rotation_errors,
    translation_errors,
    without_symmetric,
)

CONFIG = ROOT / "benchmarks" / "configs" / "registration.yaml"
OUT = RESULTS / "registration"
VOXELS = (0.05, 0.07, 0.1, 0.14, 0.2)
"""What a baseline's voxel is chosen from, in the units of the unit sphere."""
TRIED = 40
"""Training pairs on which it is chosen."""


@dataclass(frozen=True)
class Cell:
    """One network or baseline under one protocol.

    Attributes:
        method: a name of the study's networks, a baseline, or ``mean motion``.
        protocol: of the pairs.
        seed: of the training; 0 for baselines.
        curve: also measure every noise of the study.
        variants: ask the trained network in other ways too (keypoints, iterations, another object's images).
        pair_points: of a shape, where they are not the study's.
    """

    method: str
    protocol: str
    seed: int = 0
    curve: bool = False
    variants: bool = False
    pair_points: int | None = None

    @property
    def name(self) -> str:
        """Of its record."""
        points = "" if self.pair_points is None else f"{self.pair_points}"
        return f"{self.protocol}{points}-{self.method.replace(' ', '_')}-{self.seed}"


@dataclass
class Study:
    """The configuration file."""

    about: str
    pair_points: int
    test_pairs: int
    noise: float
    curve: Sequence[float]
    keypoints: Sequence[int]
    network: Mapping[str, Any]
    losses: Mapping[str, Any]
    loop: Mapping[str, Any]
    networks: Mapping[str, Mapping[str, Mapping[str, Any]]]
    plan: Sequence[Mapping[str, Any]]
    per_class: int | None = None

    @classmethod
    def read(cls, path: Path = CONFIG) -> Study:
        """A study from its file.

        Raises:
            ValueError: a method that is neither a network nor a baseline.
        """
        study = cls(**yaml.safe_load(path.read_text()))
        for cell in study.cells():
            if cell.method not in (*study.networks, *BASELINES, "mean motion"):
                raise ValueError(
                    f"{path}: method {cell.method!r} is none of the networks ({', '.join(study.networks)}) "
                    f"nor of the baselines ({', '.join(BASELINES)}, mean motion)"
                )
        return study

    def cells(self) -> list[Cell]:
        """All cells, in order, each once."""
        every = [
            Cell(
                method,
                protocol,
                seed,
                part.get("curve", False),
                part.get("variants", False),
                part.get("pair_points"),
            )
            for part in self.plan
            for seed in part.get("seeds", [0])
            for protocol in part["protocols"]
            for method in part["methods"]
        ]
        return list(dict.fromkeys(every))

    def training(self, cell: Cell, data: DataOptions, out: Path) -> TrainRegistration:
        """The options that a cell's network is trained with."""
        changes = self.networks[cell.method]
        pairs = {"protocol": cell.protocol, "pair_points": self.pair_points, **changes.get("pairs", {})}
        return TrainRegistration(
            out=out,
            data=data,
            pairs=PairOptions(**pairs),
            unseen=True,
            network=NetworkOptions(**{**self.network, **changes.get("network", {})}),
            losses=LossWeights(**{**self.losses, **changes.get("losses", {})}),
            baselines=(),
            drawn=0,
            loop=LoopOptions(**{**self.loop, "seed": cell.seed}),
            machine=MachineOptions(device="cpu", tensorboard=False),
            resume=True,
        )


@dataclass
class Shapes:
    """The data, and the pairs that are made of it."""

    study: Study
    options: DataOptions

    @cached_property
    def splits(self) -> Any:
        return self.options.load()

    @cached_property
    def halves(self) -> dict[str, PointDataset]:
        """Test shapes of the training categories and of the others."""
        return dict(zip(("same", "unseen"), category_halves(self.splits.test), strict=True))

    def test(self, name: str, protocol: str, points: int | None = None) -> tuple[ShapePairs, np.ndarray]:
        """The pairs of a test set, and which of them are measured: evenly over the categories."""
        word, _, level = name.partition(" ")
        noise = {"same": 0.0, "unseen": 0.0, "noise": self.study.noise}[word]
        options = PairOptions(
            protocol=protocol,  # type: ignore[arg-type]
            pair_points=points or self.study.pair_points,
            noise=float(level) if level else noise,
        )
        pairs = ShapePairs(self.halves["same" if word == "same" else "unseen"], options, seed=1)
        count = min(self.study.test_pairs, len(pairs))
        return pairs, np.unique(np.linspace(0, len(pairs) - 1, count).astype(int))

    def training(self, protocol: str, points: int | None = None) -> list[Pair]:
        """A few training pairs, to choose a baseline's voxel on."""
        options = PairOptions(
            protocol=protocol,  # type: ignore[arg-type]
            pair_points=points or self.study.pair_points,
        )
        pairs = ShapePairs(category_halves(self.splits.train)[0], options, seed=1)
        return [pairs.pair(int(row)) for row in np.linspace(0, len(pairs) - 1, TRIED)]


def mean_motion(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The control that knows the protocol and sees nothing: its mean rotation, 22.5 degrees about each axis,
    with the clouds' centres brought together."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("zyx", [22.5] * 3, degrees=True).as_matrix()
    motion[:3, 3] = target.mean(0) - motion[:3, :3] @ source.mean(0)
    return motion


def ask(method: str, voxel: float, pair: Pair) -> np.ndarray:
    """The motion [4, 4] that a method without weights finds."""
    if method == "mean motion":
        return mean_motion(pair.source, pair.target)
    return run_baseline(method, pair.source, pair.target, voxel)


def best_voxel(method: str, pairs: Sequence[Pair]) -> float:
    """The voxel of least mean rotation error over training pairs."""
    if method in ("nothing", "mean motion"):
        return 0.0
    truth = np.stack([pair.rotation for pair in pairs])
    errors = {}
    for voxel in VOXELS:
        found = np.stack([ask(method, voxel, pair) for pair in pairs])
        errors[voxel] = float(rotation_errors(found[:, :3, :3], truth).mean())
    return min(errors, key=lambda voxel: errors[voxel])


def network_motions(
    model: CMIGNet, pairs: ShapePairs, rows: np.ndarray, images: str = "own", batch_size: int = 16
) -> np.ndarray:
    """The motions [n, 4, 4] that a network finds.

    Args:
        model: in eval mode.
        pairs: all of them.
        rows: those asked for.
        images: ``own``; ``other``: those of the pair that lies half the rows away, of another category as a
            rule; ``none``: empty ones.
        batch_size: pairs at once.
    """
    found = []
    shifted = np.roll(rows, len(rows) // 2)
    for start in range(0, len(rows), batch_size):
        batch = pairs.batch(rows[start : start + batch_size])
        given: Any = None
        if model.images == "canonical":
            assert model.views is not None
            given = model.views.render(pairs.complete(batch.index.tolist()))
        elif images != "own":
            assert model.views is not None
            other = pairs.batch(shifted[start : start + batch_size])
            given = tuple(model.views.render(cloud) for cloud in (other.source, other.target))
            if images == "none":
                given = tuple(torch.zeros_like(image) for image in given)
        with torch.no_grad():
            guess = model(batch.source, batch.target, given)
        motion = np.tile(np.eye(4), (len(batch.source), 1, 1))
        motion[:, :3, :3], motion[:, :3, 3] = guess.rotation.numpy(), guess.translation.numpy()
        found.append(motion)
    return np.concatenate(found)


def measured(motions: np.ndarray, pairs: ShapePairs, rows: np.ndarray, refine: bool = True) -> dict[str, Any]:
    """What a record says of one test set: figures over all pairs, without symmetric classes, after
    point-to-plane ICP, and each pair's errors."""
    every = [pairs.pair(int(row)) for row in rows]
    truth = np.stack([p.rotation for p in every]), np.stack([p.translation for p in every])
    keep = without_symmetric(pairs.labels[rows], pairs.dataset.class_names)
    answer = {
        "pairs": len(rows),
        "overlap": float(np.mean([p.overlap for p in every])),
        "figures": registration_metrics(motions[:, :3, :3], motions[:, :3, 3], *truth),
        "defined": registration_metrics(
            motions[keep, :3, :3], motions[keep, :3, 3], truth[0][keep], truth[1][keep]
        ),
        "rotation_errors": rotation_errors(motions[:, :3, :3], truth[0]).round(3).tolist(),
        "translation_errors": translation_errors(motions[:, :3, 3], truth[1]).round(4).tolist(),
    }
    if refine:
        voxel = baseline_voxel(every) / 2
        after = np.stack(
            [icp(p.source, p.target, voxel, motion) for p, motion in zip(every, motions, strict=True)]
        )
        answer["refined_errors"] = rotation_errors(after[:, :3, :3], truth[0]).round(3).tolist()
    return answer


def variants(model: CMIGNet, study: Study, shapes: Shapes, protocol: str) -> dict[str, Any]:
    """The same weights asked in other ways, on the unseen categories."""
    pairs, rows = shapes.test("unseen", protocol)
    answer: dict[str, Any] = {}

    def say(name: str, images: str = "own") -> None:
        answer[name] = measured(network_motions(model, pairs, rows, images), pairs, rows, refine=False)

    own = model.keypoints, model.matching, model.significance
    for count in study.keypoints:
        model.keypoints = count
        say(f"K {count}, by score")
        model.significance = None
        say(f"K {count}, furthest points")
        model.significance = own[2]
    model.keypoints = own[0]
    for count in range(1, len(own[1])):
        model.matching = own[1][:count]
        say(f"iterations {count}")
    model.matching = own[1]
    if model.images == "observed" and model.fusion is not None:
        say("another object's images", "other")
        say("empty images", "none")
    return answer


def run_cell(cell: Cell, study: Study, shapes: Shapes, runs: Path) -> dict[str, Any]:
    """Train where it is a network, measure, and return the record."""
    tests = ["same", "unseen", "noise"]
    if cell.curve:
        tests += [f"noise {level:g}" for level in study.curve]
    about: dict[str, Any] = {"method": cell.method, "protocol": cell.protocol, "seed": cell.seed}
    if cell.pair_points is not None:
        about["pair_points"] = cell.pair_points
    record: dict[str, Any] = {**about, "tests": {}}
    began = time.process_time()
    model = None
    if cell.method in study.networks:
        options = study.training(cell, shapes.options, runs / cell.name)
        results = train_registration(options)
        model = CMIGNet.load(options.out / "registration.safetensors")
        record["training"] = {
            "parameters": count_parameters(model),
            "seconds": results["seconds"],
            "last": results["last"],
            "pairs": results["pairs"]["train"],
        }
    else:
        record["voxel"] = best_voxel(cell.method, shapes.training(cell.protocol, cell.pair_points))
    for name in tests:
        pairs, rows = shapes.test(name, cell.protocol, cell.pair_points)
        if model is not None:
            motions = network_motions(model, pairs, rows)
        else:
            motions = np.stack([ask(cell.method, record["voxel"], pairs.pair(int(row))) for row in rows])
        record["tests"][name] = measured(motions, pairs, rows)
        record["protocol_in_words"] = record.get("protocol_in_words") or pairs.options.describe()
    if model is not None and cell.variants:
        record["asked_otherwise"] = variants(model, study, shapes, cell.protocol)
    record["cpu_seconds"] = time.process_time() - began
    record["commit"], record["machine"] = commit(), machine()
    return record


def write(path: Path, content: Any) -> None:
    """JSON on one line, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def missing(study: Study, out: Path, only: str = "") -> Iterator[tuple[Cell, Path]]:
    """Cells without a record, and where it goes."""
    for cell in study.cells():
        path = out / "records" / f"{cell.name}.json"
        if only in cell.name and not path.exists():
            yield cell, path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that have no record yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registration", description=__doc__)
    parser.add_argument("--data", default=os.environ.get("POINTCMT_MODELNET40"), help="ModelNet40's folder")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "registration", help="of the networks")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no cell after so many; 0: all")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    options = parser.parse_args(argv)
    if not options.data:
        parser.error("--data, or the variable POINTCMT_MODELNET40, must name the folder of ModelNet40")
    study = Study.read(options.config)
    shapes = Shapes(study, DataOptions(data=options.data, per_class=study.per_class, holdout=0.02))
    began = time.monotonic()
    for cell, path in missing(study, options.out, options.only):
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            break
        print(f"== {cell.name}", flush=True)
        write(path, run_cell(cell, study, shapes, options.runs))
        gc.collect()
    print(
        f"{options.out}: {len(list(missing(study, options.out)))} of {len(study.cells())} cells are missing"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
