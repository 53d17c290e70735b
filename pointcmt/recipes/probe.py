"""What frozen features are worth: a linear support vector machine on them, beside random features."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.table import Table
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import SVC

from pointcmt.adapters.registry import Adapter
from pointcmt.recipes.build import StudentOptions
from pointcmt.recipes.config import write_json
from pointcmt.recipes.engine import MachineOptions, make_accelerator, seed_everything
from pointcmt.recipes.networks import clouds_of, frozen_features, load_network
from pointcmt.recipes.options import DataOptions
from pointcmt.recipes.progress import console, say, warn
from pointcmt.tasks.metrics import class_accuracies, overall_accuracy

# a kernel matrix of 12,000 shapes is 1.2 GB in float64
_MOST_FOR_KERNEL = 12_000


@dataclass
class Probe:
    """A linear SVM on the frozen features of a network, beside the same network with random weights."""

    network: Annotated[Path | None, tyro.conf.Positional] = None
    """Run folder or file of pretrain or train, or a state_dict of the network that --student names; none:
    random weights alone."""
    student: StudentOptions = field(default_factory=StudentOptions)
    data: DataOptions = field(default_factory=DataOptions)
    feature: Literal["pooled", "feature"] = "pooled"
    """pooled: the encoder's pooled feature, before any layer of the head, as the field probes it, where the
    adapter says where it is. feature: the shape feature that the last layers read."""
    c: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
    """Values of C, of which cross-validation on the training shapes takes one. They reach far, because
    features that are not scaled differ by powers of ten between networks, random weights among them."""
    folds: int = 5
    """Of the cross-validation; fewer where a class has fewer shapes."""
    fixed_c: float = 0.01
    """The field's fixed C, for the second figure: what others chose on the test set, so that it compares."""
    random: bool = True
    """Also probe random weights."""
    seed: int = 0
    """Of the folds and of the random weights."""
    batch_size: int = 32
    """Shapes at once."""
    json: Path | None = None
    """Also write the result to this file."""
    machine: MachineOptions = field(default_factory=MachineOptions)


def probe(options: Probe) -> dict[str, Any]:
    """Measure, print a table with the protocol, and return it.

    Raises:
        ValueError, FileNotFoundError: with what to do.
    """
    if options.folds < 2 or not options.c or min((*options.c, options.fixed_c)) <= 0:
        raise ValueError(
            f"--folds {options.folds}, --c {options.c}, --fixed-c {options.fixed_c}: expected at least 2 "
            "folds and positive values of C"
        )
    device = make_accelerator(options.machine).device
    train, test = clouds_of(options.data, "train"), clouds_of(options.data, "test")
    rows: dict[str, dict[str, Any]] = {}
    for name, model, adapter in networks(options, train.num_classes):
        features = [
            frozen_features(model, adapter, part, device, options.batch_size, options.feature)
            for part in (train, test)
        ]
        rows[name] = linear_svm(
            features[0],
            train.labels,
            features[1],
            test.labels,
            train.num_classes,
            options.c,
            options.folds,
            options.fixed_c,
            options.seed,
        )
        rows[name]["feature_size"] = features[0].shape[1]
    protocol = {
        "classifier": "SVC, linear, one against one, features not scaled (scikit-learn)",
        "feature": options.feature,
        "points": train.num_points,
        "train": len(train),
        "test": len(test),
        "data": options.data.named(),
        "split": "the data set's own",
        "c": f"cross-validation on the training shapes, of {', '.join(f'{c:g}' for c in options.c)}",
        "seed": options.seed,
    }
    table = Table("features", "size", "OA %, C by CV", "mAcc %", "C", f"OA %, C = {options.fixed_c:g}")
    for name, row in rows.items():
        table.add_row(
            name,
            str(row["feature_size"]),
            f"{row['oa']:.1f}",
            f"{row['macc']:.1f}",
            f"{row['c']:g}",
            f"{row['oa_fixed_c']:.1f}",
        )
    console.print(table)
    for name, row in rows.items():
        if len(options.c) > 1 and row["c"] in (min(options.c), max(options.c)):
            warn(
                f"{name}: cross-validation took C = {row['c']:g}, an end of the values given; features of "
                "another scale may want one beyond: give more with --c"
            )
    say(
        "protocol: "
        + "; ".join(f"{name}: {value}" for name, value in protocol.items())
        + f". C = {options.fixed_c:g} is the field's, chosen there on the test set"
    )
    result = {"rows": rows, "protocol": protocol}
    if options.json is not None:
        write_json(options.json, result)
    return result


def networks(options: Any, num_classes: int) -> list[tuple[str, Any, Adapter]]:
    """Name, network and adapter of each row: the given one, and the same one with random weights."""
    found: list[tuple[str, Any, Adapter]] = []
    student = copy.deepcopy(options.student)
    if options.network is not None:
        model, adapter, student = load_network(options.network, student, num_classes)
        found.append((str(options.network), model, adapter))
    if options.random or options.network is None:
        seed_everything(options.seed)
        model, adapter, _ = load_network(None, student, num_classes)
        found.append(("random weights", model, adapter))
    return found


def linear_svm(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    values: Sequence[float],
    folds: int,
    fixed: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy in % on test features [m, D] of a linear SVM that was fitted to training features [n, D].

    Returns:
        ``oa`` and ``macc`` with the ``c`` that cross-validation on the training features chose and its
        accuracy there ``cv_oa``; ``oa_fixed_c``.

    Raises:
        ValueError: a class has a single training shape.
    """
    counts = np.bincount(train_labels)
    folds = min(folds, int(counts[counts > 0].min()))
    if folds < 2:
        raise ValueError(
            "a class has a single training shape, so that C cannot be chosen by cross-validation: give more "
            "shapes (--per-class)"
        )
    train, test = train.astype(np.float64), test.astype(np.float64)
    kernel = "linear"
    if len(train) <= _MOST_FOR_KERNEL:
        # the same machine, and the products are computed once for all values of C
        train, test, kernel = train @ train.T, test @ train.T, "precomputed"
    search = GridSearchCV(
        SVC(kernel=kernel),
        {"C": list(values)},
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    ).fit(train, train_labels)
    predicted = search.predict(test)
    others = SVC(kernel=kernel, C=fixed).fit(train, train_labels).predict(test)
    return {
        "oa": overall_accuracy(predicted, test_labels),
        "macc": float(np.nanmean(class_accuracies(predicted, test_labels, num_classes))),
        "c": float(search.best_params_["C"]),
        "cv_oa": 100 * float(search.best_score_),
        "folds": folds,
        "oa_fixed_c": overall_accuracy(others, test_labels),
        "fixed_c": fixed,
    }
