"""Train CMIGNet on pairs of clouds made of any data set, and measure it beside what people use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from pointcmt.data import PointDataset
from pointcmt.recipes.config import read_json, restore, write_json
from pointcmt.recipes.engine import (
    LoopOptions,
    MachineOptions,
    count_parameters,
    fit,
    make_accelerator,
    seed_everything,
)
from pointcmt.recipes.options import DataOptions
from pointcmt.recipes.progress import console, say
from pointcmt.recipes.registration_pictures import error_curves, save_curves_of_errors, save_pairs
from pointcmt.recipes.run import RunFolder
from pointcmt.registration import (
    CMIGNet,
    LossWeights,
    Pair,
    PairBatch,
    PairBatches,
    PairOptions,
    ShapePairs,
    category_halves,
    registration_loss,
)
from pointcmt.registration.baselines import run_baseline
from pointcmt.tasks import Figure, Task
from pointcmt.tasks.registration import (
    metrics_table,
    modified_chamfer,
    registration_metrics,
    without_symmetric,
)

BASELINE_VOXEL = 0.05
"""What the baselines thin shapes in the unit sphere to, where they are that dense."""
NO_SYMMETRIC = " (no symmetric classes)"


@dataclass
class NetworkOptions:
    """Which CMIGNet."""

    width: float = 1.0
    """Factor of all layers' channels: 1 is the paper's network, 0.25 one for CPUs."""
    views: int = 6
    """Images of each cloud."""
    view_size: int = 64
    """Height and width of an image in pixels."""
    keypoints: int = 256
    """Points that are matched."""
    iterations: int = 3
    """Matchings one after the other."""
    images: Literal["observed", "canonical", "none"] = "observed"
    """Images of each cloud as it is observed; or of the complete shape in its own pose, which is a prior that
    no real registration has; or none."""
    fusion: bool = True
    """Attention within a cloud, to the other and to the images."""
    mask: bool = True
    """Keypoints by their scores; else by furthest point sampling."""
    weighting: bool = True
    """Weigh correspondences by their credibility."""

    def make(self, points: int) -> CMIGNet:
        """A network for clouds of so many points."""
        return CMIGNet(
            views=self.views,
            keypoints=self.keypoints,
            iterations=self.iterations,
            width=self.width,
            images=self.images,
            fusion=self.fusion,
            mask=self.mask,
            credibility=self.weighting,
            size=self.view_size,
            points=points,
        )


@dataclass
class TrainRegistration:
    """Train CMIGNet to register clouds."""

    out: Path
    """Run folder to write; the network is registration.safetensors in it."""
    data: DataOptions = field(default_factory=DataOptions)
    pairs: PairOptions = field(default_factory=PairOptions)
    unseen: bool = False
    """Train on the first half of the categories, test on the second."""
    network: NetworkOptions = field(default_factory=NetworkOptions)
    losses: LossWeights = field(default_factory=LossWeights)
    baselines: tuple[str, ...] = ("icp", "fgr")
    """What to measure beside it: icp, fgr, ransac, kiss, gicp (extra `registration`)."""
    drawn: int = 32
    """Test pairs that the report's pictures and error curves are of; 0: none."""
    loop: LoopOptions = field(
        default_factory=lambda: LoopOptions(
            epochs=100, batch_size=8, optimizer="adam", lr=1e-3, weight_decay=1e-4, clip=1.0
        )
    )
    machine: MachineOptions = field(default_factory=MachineOptions)
    resume: bool = False
    """Continue the run in --out."""


@dataclass
class Parts:
    """The pairs of a run."""

    train: ShapePairs
    heldout: ShapePairs | None
    test: ShapePairs

    def best(self) -> tuple[str, ShapePairs, str]:
        """Which part chooses the best epoch, and what that means in words."""
        if self.heldout is not None:
            return "heldout", self.heldout, "held-out part of the training shapes"
        return "test", self.test, "test pairs: this selects on the test set and is optimistic"


def make_parts(data: DataOptions, pairs: PairOptions, unseen: bool, seed: int) -> tuple[Parts, str]:
    """The pairs that the options describe, and the data's fingerprint."""
    if data.named() == "synthetic" and data.view_points is None:
        # two clean samples of the whole surface; the shapes' own clouds are scans with noise of their own
        data = dataclasses.replace(data, view_points=2 * pairs.pair_points)
    splits = data.load()
    train, heldout, test = splits.train, splits.heldout, splits.test
    if unseen:
        train, test = category_halves(train)[0], category_halves(test)[1]
        heldout = category_halves(heldout)[0] if heldout is not None else None

    def made(part: PointDataset) -> ShapePairs:
        return ShapePairs(part, pairs, seed)

    return Parts(made(train), None if heldout is None else made(heldout), made(test)), splits.fingerprint()


def canonical_images(model: CMIGNet, pairs: ShapePairs, batch: PairBatch) -> Tensor | None:
    """Images of the complete shapes in their own pose, where the network takes such; else None."""
    if model.images != "canonical":
        return None
    assert model.views is not None
    return model.views.render(pairs.complete(batch.index.tolist()).to(batch.source))


@torch.no_grad()
def predict_poses(model: CMIGNet, pairs: ShapePairs, batch_size: int, device: Any) -> dict[str, np.ndarray]:
    """Estimated and true poses of all pairs: rotation, translation, true_rotation, true_translation."""
    found: dict[str, list[np.ndarray]] = {}
    for batch in PairBatches(pairs, batch_size, device).epoch():
        guess = model(batch.source, batch.target, canonical_images(model, pairs, batch))
        values = (guess.rotation, guess.translation, batch.rotation, batch.translation)
        names = ("rotation", "translation", "true_rotation", "true_translation")
        for name, value in zip(names, values, strict=True):
            found.setdefault(name, []).append(value.float().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def baseline_voxel(pairs: Sequence[Pair]) -> float:
    """The voxel of the baselines: features need neighbours, so not below twice the points' distance."""
    spacing = np.median([np.median(cKDTree(p.source).query(p.source, 2)[0][:, 1]) for p in pairs[:16]])
    return max(BASELINE_VOXEL, 2 * float(spacing))


def compare(
    model: CMIGNet | None, pairs: ShapePairs, baselines: Sequence[str], batch_size: int, device: Any
) -> dict[str, dict[str, float]]:
    """Figures of the network and the baselines on all pairs, and on those of classes with a defined pose.

    Returns:
        method → figures; a second row ``… (no symmetric classes)`` where the set has symmetric classes.
    """
    every = [pairs.pair(index) for index in range(len(pairs))]
    truth = (np.stack([p.rotation for p in every]), np.stack([p.translation for p in every]))
    voxel = baseline_voxel(every)
    poses: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if model is not None:
        found = predict_poses(model, pairs, batch_size, device)
        poses["CMIGNet"] = found["rotation"], found["translation"]
    for name in ("nothing", *baselines):
        motions = np.stack([run_baseline(name, p.source, p.target, voxel) for p in every])
        poses[name] = motions[:, :3, :3], motions[:, :3, 3]
    complete = pairs.complete(range(len(pairs))).numpy()
    defined = without_symmetric(pairs.labels, pairs.dataset.class_names)
    rows = {}
    for name, (rotation, translation) in poses.items():
        chamfer = np.array(
            [
                modified_chamfer(p.source, p.target, complete[i], rotation[i], translation[i], p.rotation,
                                 p.translation)
                for i, p in enumerate(every)
            ]
        )  # fmt: skip
        for suffix, keep in (("", np.ones(len(every), bool)), (NO_SYMMETRIC, defined)):
            if suffix and (keep.all() or not keep.any()):
                continue
            rows[name + suffix] = registration_metrics(
                rotation[keep], translation[keep], truth[0][keep], truth[1][keep], chamfer=chamfer[keep]
            )
    return rows


def mean_overlap(pairs: ShapePairs) -> float:
    """Mean overlap of the pairs."""
    return float(np.mean([pairs.pair(index).overlap for index in range(len(pairs))]))


def show_comparison(rows: dict[str, dict[str, float]], pairs: ShapePairs, what: str) -> None:
    """Print the protocol and the figures: of all classes, and without symmetric ones where there are any."""
    protocol = f"mean overlap {mean_overlap(pairs):.3f}; {pairs.options.describe()}"
    for suffix in ("", NO_SYMMETRIC):
        chosen = {
            name.removesuffix(suffix): row
            for name, row in rows.items()
            if name.endswith(NO_SYMMETRIC) == bool(suffix)
        }
        if chosen:
            console.print(metrics_table(chosen, f"{what}, {len(pairs)} pairs{suffix}, {protocol}"))


def train_registration(options: TrainRegistration) -> dict[str, Any]:
    """Train a network into a run folder and return its results."""
    accelerator = make_accelerator(options.machine)
    parts, fingerprint = make_parts(options.data, options.pairs, options.unseen, options.data.data_seed)
    run = RunFolder.start(
        accelerator,
        options.out,
        options,
        command="train-registration",
        inputs={"data": fingerprint},
        resume=options.resume,
    )
    if (done := run.finished()) is not None:
        say(f"{run.path} is finished", accelerator.is_main_process)
        return done
    seed_everything(options.loop.seed)
    network = options.network.make(parts.train.kept)
    chooser, chosen, words = parts.best()

    def step(model: nn.Module, batch: Any, done: float) -> dict[str, Tensor]:
        truth = batch.rotation, batch.translation
        images = canonical_images(network, parts.train, batch)
        found = model(batch.source, batch.target, images, truth)
        return registration_loss(found, batch.source, batch.target, truth, options.losses)

    def evaluate(model: Any) -> dict[str, float]:
        # every process measures all pairs: they are few, and the figures are then equal
        poses = predict_poses(model, chosen, options.loop.batch_size, accelerator.device)
        figures = registration_metrics(
            poses["rotation"], poses["translation"], poses["true_rotation"], poses["true_translation"]
        )
        return {f"{chooser}_{name}": value for name, value in figures.items()}

    task = Task(
        step,
        evaluate,
        Figure(f"{chooser}_rotation_error", "lowest", f"mean rotation error on the {words}"),
        (f"{chooser}_rotation_error", f"{chooser}_translation_error"),
    )
    batches: Any = PairBatches(
        parts.train,
        options.loop.batch_size,
        accelerator.device,
        options.loop.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    outcome = fit(network, task, batches, save_registration, options.loop, options.machine, accelerator, run)
    results: dict[str, Any] = {
        **outcome,
        "protocol": options.pairs.describe(),
        "unseen": options.unseen,
        "parameters": count_parameters(network),
        "overlap": mean_overlap(parts.test),
        "pairs": {"train": len(parts.train), "test": len(parts.test)},
    }
    if accelerator.is_main_process:
        save_registration(network, run.path / "registration.safetensors")
        results["test"] = compare(
            network, parts.test, options.baselines, options.loop.batch_size, accelerator.device
        )
        show_comparison(results["test"], parts.test, "unseen categories" if options.unseen else "test shapes")
        if options.drawn:
            draw_for_report(network, parts.test, options, run.path)
    return run.finish(results)


@torch.no_grad()
def draw_for_report(network: CMIGNet, pairs: ShapePairs, options: TrainRegistration, folder: Path) -> None:
    """Write what ``pointcmt report`` shows of a run: pairs.png, curves.json and errors.png."""
    rows = np.unique(np.linspace(0, len(pairs) - 1, min(4, len(pairs))).astype(int))
    batch = pairs.batch(rows).to(next(network.parameters()).device)
    found = network.eval()(batch.source, batch.target, canonical_images(network, pairs, batch))
    names = [pairs.dataset.class_names[label] for label in batch.labels.tolist()]
    save_pairs(batch, found, names, folder / "pairs.png")
    voxel = baseline_voxel([pairs.pair(int(row)) for row in rows])
    curves = error_curves(network, pairs, options.baselines, voxel, canonical_images, options.drawn)
    write_json(folder / "curves.json", curves)
    save_curves_of_errors(curves, folder / "errors.png")


def evaluate_run(
    folder: Path,
    machine: MachineOptions,
    split: str,
    checkpoint: str,
    batch_size: int,
    quiet: bool,
) -> dict[str, Any]:
    """Figures of a finished run's network beside its baselines, as ``train_registration`` printed them.

    Args:
        folder: the run folder.
        machine: where to run.
        split: test, heldout or train.
        checkpoint: final or best.
        batch_size: pairs at once.
        quiet: print nothing.

    Raises:
        ValueError: the run has no such part.
    """
    config = read_json(folder / "config.json")["config"]
    options = PairOptions(**config["pairs"])
    data: DataOptions = restore(DataOptions(), config["data"], f"{folder}: data")
    parts, _ = make_parts(data, options, config["unseen"], data.data_seed)
    pairs = {"test": parts.test, "heldout": parts.heldout, "train": parts.train}[split]
    if pairs is None:
        raise ValueError(f"--split {split}: the run has no such shapes (it was trained with --holdout 0)")
    device = make_accelerator(machine).device
    name = "best" if checkpoint == "best" else "registration"
    model = CMIGNet.load(folder / f"{name}.safetensors").to(device)
    rows = compare(model, pairs, config["baselines"], batch_size, device)
    if not quiet:
        show_comparison(rows, pairs, f"{split} shapes" + (", unseen categories" if config["unseen"] else ""))
    return {"split": split, "protocol": options.describe(), "overlap": mean_overlap(pairs), "methods": rows}


def save_registration(model: Any, path: Path) -> None:
    model.save(path)
