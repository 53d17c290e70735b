"""What frozen features are worth with few labels: K-way N-shot classification, beside random features."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.table import Table
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from pointcmt.recipes.build import StudentOptions
from pointcmt.recipes.config import write_json
from pointcmt.recipes.engine import MachineOptions, make_accelerator
from pointcmt.recipes.networks import clouds_of, frozen_features
from pointcmt.recipes.options import DataOptions
from pointcmt.recipes.probe import networks
from pointcmt.recipes.progress import console, say
from pointcmt.tasks.metrics import overall_accuracy


@dataclass
class FewShot:
    """K-way N-shot classification on the frozen features of a network, beside random weights."""

    network: Annotated[Path | None, tyro.conf.Positional] = None
    """Run folder or file of pretrain or train, or a state_dict of the network that --student names; none:
    random weights alone."""
    student: StudentOptions = field(default_factory=StudentOptions)
    data: DataOptions = field(default_factory=DataOptions)
    ways: tuple[int, ...] = (5, 10)
    """Classes of a run."""
    shots: tuple[int, ...] = (10, 20)
    """Labelled shapes of each class."""
    queries: int = 20
    """Shapes of each class that are classified (all that there are, where there are fewer)."""
    runs: int = 10
    """How often classes and shapes are drawn."""
    protocol: Literal["standard", "crosspoint"] = "standard"
    """standard: labelled shapes from the training split, classified ones from the test split. crosspoint:
    both from the training split, as in CrossPoint's code."""
    feature: Literal["pooled", "feature"] = "pooled"
    """pooled: the encoder's pooled feature, before any layer of the head. feature: the shape feature."""
    c: float = 1.0
    """C of the linear SVM, on features standardised by the labelled shapes; CrossPoint's."""
    random: bool = True
    """Also measure random weights."""
    seed: int = 0
    """Of the draws, which are the same for every network, and of the random weights."""
    batch_size: int = 32
    """Shapes at once."""
    json: Path | None = None
    """Also write the result to this file."""
    machine: MachineOptions = field(default_factory=MachineOptions)


def few_shot(options: FewShot) -> dict[str, Any]:
    """Measure, print a table with the protocol, and return it.

    Raises:
        ValueError, FileNotFoundError: with what to do.
    """
    if min((*options.ways, *options.shots, options.queries, options.runs)) < 1 or options.c <= 0:
        raise ValueError("--ways, --shots, --queries, --runs and --c: expected positive numbers")
    if min(options.ways) < 2:
        raise ValueError(f"--ways {min(options.ways)}: telling classes apart needs at least 2")
    device = make_accelerator(options.machine).device
    train = clouds_of(options.data, "train")
    queried = train if options.protocol == "crosspoint" else clouds_of(options.data, "test")
    rows: dict[str, dict[str, Any]] = {}
    for name, model, adapter in networks(options, train.num_classes):
        support = frozen_features(model, adapter, train, device, options.batch_size, options.feature)
        query = support
        if queried is not train:
            query = frozen_features(model, adapter, queried, device, options.batch_size, options.feature)
        rows[name] = {}
        for way in options.ways:
            for shot in options.shots:
                accuracies = [
                    episode(
                        support, train.labels, query, queried.labels, way, shot, options.queries, options.c,
                        seed=(options.seed, run), shared=queried is train,
                    )
                    for run in range(options.runs)
                ]  # fmt: skip
                rows[name][f"{way}-way {shot}-shot"] = {
                    "mean": float(np.mean(accuracies)),
                    "std": float(np.std(accuracies)),
                    "runs": accuracies,
                }
    origin = "the training split" if options.protocol == "crosspoint" else "the test split"
    protocol = {
        "name": options.protocol,
        "labelled": "the training split",
        "classified": f"{options.queries} of each class from {origin}",
        "runs": options.runs,
        "classifier": f"SVC, linear, C = {options.c:g}, features standardised by the labelled shapes",
        "feature": options.feature,
        "points": train.num_points,
        "data": options.data.named(),
        "seed": options.seed,
    }
    columns = list(next(iter(rows.values())))
    table = Table("features", *columns)
    for name, row in rows.items():
        table.add_row(name, *[f"{row[column]['mean']:.1f} ± {row[column]['std']:.1f}" for column in columns])
    console.print(table)
    stated = "; ".join(f"{name}: {value}" for name, value in protocol.items())
    say(f"OA %, mean ± standard deviation over the runs. protocol: {stated}")
    result = {"rows": rows, "protocol": protocol}
    if options.json is not None:
        write_json(options.json, result)
    return result


def episode(
    support: np.ndarray,
    support_labels: np.ndarray,
    query: np.ndarray,
    query_labels: np.ndarray,
    way: int,
    shot: int,
    queries: int,
    c: float,
    seed: tuple[int, ...],
    shared: bool = False,
) -> float:
    """Accuracy in % of one run: ``way`` classes, ``shot`` labelled shapes and ``queries`` others of each.

    Args:
        shared: support and query are one set; no shape is then both labelled and classified.

    Raises:
        ValueError: too few classes with so many shapes.
    """
    drawn = np.random.default_rng([*seed, way, shot])
    least = shot + 1 if shared else shot
    counts = np.bincount(support_labels)
    able = np.flatnonzero(counts >= least)
    able = able[np.isin(able, query_labels)]
    if len(able) < way:
        raise ValueError(
            f"{way}-way {shot}-shot needs {way} classes of at least {least} training shapes, and there are "
            f"{len(able)}: use fewer --ways or --shots, or more shapes (--per-class)"
        )
    fit_rows, test_rows = [], []
    for label in drawn.choice(able, way, replace=False):
        rows = drawn.permutation(np.flatnonzero(support_labels == label))
        fit_rows.append(rows[:shot])
        others = rows[shot:] if shared else drawn.permutation(np.flatnonzero(query_labels == label))
        test_rows.append(others[:queries])
    fit, test = np.concatenate(fit_rows), np.concatenate(test_rows)
    machine = make_pipeline(StandardScaler(), SVC(kernel="linear", C=c))
    machine.fit(support[fit], support_labels[fit])
    return overall_accuracy(machine.predict(query[test]), query_labels[test])
