"""What a run of train-registration leaves for its report: pictures of pairs, and errors to draw curves of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection

from pointcmt.pictures import INK, MUTED, colour, new_figure, save_figure, tidy
from pointcmt.registration import CMIGNet, PairBatch, Registration, ShapePairs
from pointcmt.registration.baselines import run_baseline
from pointcmt.tasks.registration import rotation_errors

NOISES = (0.0, 0.01, 0.02, 0.04, 0.06)
"""Standard deviations of the noise that the report's curve is of; the papers' range."""
SOURCE, TARGET = "#2f6fb0", "#d9822b"


def save_pairs(
    batch: PairBatch, found: Registration, names: Sequence[str], path: Path, shown: int = 60
) -> Path:
    """Pairs, one per row: before; after, with the keypoints; and the correspondences coloured by weight.

    Looked at along the direction in which the target is thinnest.

    Args:
        batch: the pairs; found: what the network said of them.
        names: of the rows.
        path: of the PNG.
        shown: the heaviest correspondences that are drawn of each pair.
    """
    figure = new_figure(9.6, 2.9 * len(names))
    grid = figure.subplots(len(names), 3, squeeze=False)
    errors = rotation_errors(found.rotation, batch.rotation)
    lines = None
    for row, (panels, name) in enumerate(zip(grid, names, strict=True)):
        source, target = batch.source[row].cpu().numpy(), batch.target[row].cpu().numpy()
        moved = source @ found.rotation[row].cpu().numpy().T + found.translation[row].cpu().numpy()
        pairs, weights = found.correspondences[row].cpu().numpy(), found.weights[row].cpu().numpy()
        axes = np.linalg.svd(target - target.mean(0), full_matrices=False)[2][:2]
        for panel, points in zip(panels[:2], (source, moved), strict=True):
            panel.scatter(*(target @ axes.T).T, s=3, c=TARGET, linewidths=0, label="target")
            panel.scatter(*(points @ axes.T).T, s=3, c=SOURCE, linewidths=0, label="source")
        panels[1].scatter(*(moved[pairs[:, 0]] @ axes.T).T, s=14, facecolors="none", edgecolors=INK,
                          linewidths=0.6, label="keypoints")  # fmt: skip
        aside = np.array([1.15 * float(np.ptp(np.concatenate([moved, target]) @ axes[0])), 0.0])
        for points, shift in ((moved, -aside), (target, 0 * aside)):
            panels[2].scatter(*(points @ axes.T + shift).T, s=2, c="#c3cad3", linewidths=0)
        order = np.argsort(weights)[-shown:]
        ends = np.stack([moved[pairs[order, 0]] @ axes.T - aside, target[pairs[order, 1]] @ axes.T], 1)
        lines = LineCollection(ends.tolist(), cmap="viridis", linewidths=0.8)
        lines.set_array(weights[order] / max(float(weights.max()), 1e-12))
        lines.set_clim(0, 1)
        panels[2].add_collection(lines)
        panels[2].autoscale_view()
        for panel in panels:
            panel.set_aspect("equal")
            panel.set_axis_off()
        panels[0].set_title(f"{name}: before", fontsize=9, color=INK)
        panels[1].set_title(f"after, {errors[row]:.1f} degrees off", fontsize=9, color=INK)
        panels[2].set_title(f"{len(order)} correspondences by weight", fontsize=9, color=INK)
    grid[0, 1].legend(fontsize=7, frameon=False, labelcolor=MUTED, loc="upper left")
    if lines is not None:
        figure.colorbar(lines, ax=grid[:, 2].tolist(), shrink=0.5, label="weight, largest = 1")
    return save_figure(figure, path)


@torch.no_grad()
def error_curves(
    model: CMIGNet,
    pairs: ShapePairs,
    baselines: Sequence[str],
    voxel: float,
    images: Any,
    count: int,
) -> dict[str, Any]:
    """Rotation errors in degrees of the network, the baselines and doing nothing, pair by pair.

    Args:
        model: in eval mode.
        pairs: the test pairs; some, evenly, are asked.
        baselines: names.
        voxel: theirs.
        images: (model, pairs, batch) → what the network is given as images.
        count: pairs.

    Returns:
        ``overlap`` [n] of the pairs, ``noise``: the levels, and ``errors``: method → level → [n].
    """
    rows = np.unique(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int))
    device = next(model.parameters()).device
    errors: dict[str, dict[str, list[float]]] = {}
    overlap: list[float] = []
    for level in NOISES:
        some = ShapePairs(pairs.dataset, dataclasses.replace(pairs.options, noise=level), pairs.seed)
        every = [some.pair(int(row)) for row in rows]
        overlap = overlap or [round(pair.overlap, 4) for pair in every]
        truth = np.stack([pair.rotation for pair in every])
        batch = some.batch(rows).to(device)
        found = {"CMIGNet": model(batch.source, batch.target, images(model, some, batch)).rotation}
        for name in ("nothing", *baselines):
            motions = np.stack([run_baseline(name, p.source, p.target, voxel) for p in every])
            found[name] = motions[:, :3, :3]
        for name, rotation in found.items():
            values = rotation_errors(rotation, truth).round(3).tolist()
            errors.setdefault(name, {})[f"{level:g}"] = values
    return {"overlap": overlap, "noise": [f"{level:g}" for level in NOISES], "errors": errors}


def save_curves_of_errors(content: Mapping[str, Any], path: Path) -> Path:
    """Mean rotation error over the overlap (of noiseless pairs, in four groups of equally many) and over the
    noise; ``content`` is that of :func:`error_curves`."""
    figure = new_figure(8.4, 3.1)
    over_overlap, over_noise = figure.subplots(1, 2)
    overlap = np.array(content["overlap"])
    groups = np.array_split(np.argsort(overlap), min(4, len(overlap)))
    for position, (name, by_level) in enumerate(content["errors"].items()):
        tint = colour({"nothing": "none", "CMIGNet": "pointcmt"}.get(name, name), position)
        clean = np.array(by_level[content["noise"][0]])
        over_overlap.plot([overlap[g].mean() for g in groups], [clean[g].mean() for g in groups], "o-",
                          ms=3, color=tint, label=name)  # fmt: skip
        levels = [float(level) for level in content["noise"]]
        over_noise.plot(levels, [np.mean(by_level[level]) for level in content["noise"]], "o-", ms=3,
                        color=tint, label=name)  # fmt: skip
    for axes, words in ((over_overlap, "overlap"), (over_noise, "standard deviation of the noise")):
        tidy(axes)
        axes.set_xlabel(words, fontsize=8, color=MUTED)
        axes.set_ylim(bottom=0)
    over_overlap.set_ylabel("mean rotation error, degrees", fontsize=8, color=MUTED)
    over_noise.legend(fontsize=7, frameon=False)
    return save_figure(figure, path)
