"""Charts of runs and studies: curves, comparison, ablation, robustness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from pointcmt.pictures import (
    COLOURS,
    INK,
    LABELS,
    MUTED,
    OTHERS,
    colour,
    new_figure,
    save_figure,
    tidy,
)


@dataclass
class Curve:
    """One run's metrics over its epochs."""

    name: str
    role: str
    records: list[dict[str, Any]]


def save_curves(curves: Sequence[Curve], path: Path) -> Path:
    """Training loss and test accuracy (or EMD) over the epochs; runs of one role share a colour."""
    accuracy = [c for c in curves if any("test_oa" in r for r in c.records)]
    emd = [c for c in curves if any("test_emd" in r for r in c.records)]
    panels: list[tuple[str, str, list[Curve]]] = []
    if accuracy:
        panels += [
            ("loss", "training loss (cross-entropy)", accuracy),
            ("test_oa", "test overall accuracy (%)", accuracy),
        ]
    if emd:
        panels += [("test_emd", "generator: test EMD", emd)]
    if not panels:
        panels = [("loss", "training loss", list(curves))]
    figure = new_figure(4.2 * len(panels), 3.1)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    roles = list(dict.fromkeys(c.role for c in curves))
    for axes, (key, title, shown) in zip(grid, panels, strict=True):
        labelled: set[str] = set()
        for curve in shown:
            # of a taught student the task's part of the loss, which is what can be compared
            points = [
                (r["epoch"], r["task"] if key == "loss" and "task" in r else r[key])
                for r in curve.records
                if key in r
            ]
            if not points:
                continue
            epochs, values = np.array(points, dtype=float).T
            tint = colour(curve.role, roles.index(curve.role))
            axes.plot(
                epochs,
                values,
                color=tint,
                linewidth=1.8,
                alpha=0.9,
                marker="o" if len(points) < 3 else None,
                label=LABELS.get(curve.role, curve.role) if curve.role not in labelled else None,
            )
            labelled.add(curve.role)
        tidy(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("epoch", fontsize=8, color=MUTED)
        if len(labelled) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return save_figure(figure, path)


@dataclass
class Entry:
    """One line of a comparison: a teacher or a student, over its seeds."""

    name: str
    role: str
    oa: list[float]
    macc: list[float]
    best_oa: list[float] = field(default_factory=list)
    parameters: int | None = None
    milliseconds: float | None = None

    def cells(self) -> list[str]:
        """Name, OA, mAcc, best epoch, parameters, inference time, as the tables show them."""
        return [
            self.name,
            spread(self.oa),
            spread(self.macc),
            spread(self.best_oa) if self.best_oa else "–",
            "–" if self.parameters is None else human(self.parameters),
            "–" if self.milliseconds is None else f"{self.milliseconds:.2f}",
        ]


HEADINGS = ("", "OA %", "mAcc %", "best OA %", "parameters", "ms/cloud")


def spread(values: Sequence[float]) -> str:
    """``mean ± sd`` of several values, or the one."""
    if len(values) > 1:
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    return f"{values[0]:.1f}"


def human(number: int) -> str:
    """1 234 567 as 1.23 M."""
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def save_comparison(entries: Sequence[Entry], path: Path) -> Path:
    """Overall and mean class accuracy of teacher and students as bars; dots are single seeds."""
    figure = new_figure(6.4, 0.62 * len(entries) + 1.0)
    axes_of = figure.subplots(1, 2, sharey=True)
    low = min(min(e.oa + e.macc) for e in entries)
    floor = max(0.0, 10 * math.floor((low - 12) / 10))
    for axes, key, title in zip(
        axes_of, ("oa", "macc"), ("overall accuracy (%)", "mean class accuracy (%)"), strict=True
    ):
        for row, entry in enumerate(entries):
            values = getattr(entry, key)
            mean = float(np.mean(values))
            tint = colour(entry.role, row)
            axes.barh(row, mean - floor, left=floor, color=tint, alpha=0.88, height=0.62)
            if len(values) > 1:
                offsets = np.linspace(-0.16, 0.16, len(values))
                axes.scatter(
                    values, row + offsets, s=11, color="white", edgecolors=INK, linewidths=0.7, zorder=3
                )
            axes.annotate(
                spread(values),
                (max(values), row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
            )
        axes.set_yticks(range(len(entries)), [e.name for e in entries])
        tidy(axes, "x")
        axes.tick_params(axis="y", colors=INK, labelsize=9)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        top = max(max(e.oa + e.macc) for e in entries)
        axes.set_xlim(floor, top + 0.34 * (top - floor))
        axes.set_xticks([tick for tick in axes.get_xticks() if floor <= tick <= 100])
        axes.invert_yaxis() if axes is axes_of[0] else None
    if floor > 0:
        figure.supxlabel(f"bars begin at {floor:.0f} %", fontsize=7.5, color=MUTED, x=0.99, ha="right")
    return save_figure(figure, path)


@dataclass
class Row:
    """One line of an ablation: a student under a method, over its seeds."""

    student: str
    method: str
    teacher: str | None
    oa: dict[str, list[float]]
    """Last-epoch OA by test set (``test`` is the data's own), one per seed."""
    best: list[float]
    """OA on the test shapes at the best epoch, one per seed."""
    difference: dict[str, tuple[float, float] | None]
    """Paired difference to the baseline by test set: mean and half-width of its 95 % interval."""
    paper: float | None = None
    """OA that the paper reports."""
    teacher_oa: float | None = None
    """OA of the teacher on the same test shapes."""
    p: dict[str, float] = field(default_factory=dict)
    """Of the paired t-test of each difference, two-sided; by test set."""


def save_rows(rows: Sequence[Row], path: Path) -> Path:
    """Bar chart of an ablation: one panel per test set; dots are seeds, a diamond is the paper's figure."""
    tests = list(dict.fromkeys(test for row in rows for test in row.oa))
    several = len({row.student for row in rows}) > 1
    names = [
        (f"{row.student}, " if several else "") + row.method + (f" ({row.teacher})" if row.teacher else "")
        for row in rows
    ]
    methods = [m for m in dict.fromkeys(row.method for row in rows) if m != "none"]
    tint = {"none": COLOURS["none"]} | {
        m: (COLOURS["pointcmt"], *OTHERS, COLOURS["teacher"], COLOURS["generator"])[k % 7]
        for k, m in enumerate(methods)
    }
    figure = new_figure(2.2 + 3.4 * len(tests), 0.36 * len(rows) + 1.1)
    grid = figure.subplots(1, len(tests), squeeze=False, sharey=True)[0]
    for axes, test in zip(grid, tests, strict=True):
        shown = [(place, row) for place, row in enumerate(rows) if test in row.oa]
        everything = [value for _, row in shown for value in row.oa[test]]
        # a figure of another setting may lie far off: then it is told, not drawn to scale
        reach = (min(everything) - 5, max(everything) + 5)
        drawn = {
            place: row.paper
            for place, row in shown
            if test == "test" and row.paper is not None and reach[0] <= row.paper <= reach[1]
        }
        everything += drawn.values()
        floor = max(0.0, 5 * math.floor((min(everything) - 5) / 5))
        top = max(everything)
        for place, row in shown:
            values = row.oa[test]
            mean = float(np.mean(values))
            axes.barh(place, mean - floor, left=floor, height=0.66, color=tint[row.method], alpha=0.85)
            if len(values) > 1:
                spots = place + np.linspace(-0.2, 0.2, len(values))
                axes.scatter(values, spots, s=8, color="white", edgecolors=INK, linewidths=0.6, zorder=3)
            if place in drawn and row.paper is not None:
                axes.scatter([row.paper], [place], marker="D", s=22, color=COLOURS["teacher"], zorder=4)
                axes.annotate(
                    f"paper {row.paper:.1f}",
                    (row.paper, place),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    color=MUTED,
                )
            interval = row.difference.get(test)
            text = f"{mean:.1f}" + (f"  ({interval[0]:+.1f} ± {interval[1]:.1f})" if interval else "")
            if test == "test" and row.paper is not None and place not in drawn:
                text += f"   paper: {row.paper:.1f}"
            right = max(values)
            axes.annotate(
                text,
                (right, place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
        axes.set_yticks(range(len(rows)), names)
        tidy(axes, "x")
        axes.tick_params(axis="y", colors=INK, labelsize=8.5)
        axes.set_xlim(floor, top + 0.62 * (top - floor))
        axes.set_xticks([tick for tick in axes.get_xticks() if floor <= tick <= 100])
        axes.set_title(f"{test}: overall accuracy (%)", fontsize=10, color=INK, loc="left")
    grid[0].invert_yaxis()
    return save_figure(figure, path)


@dataclass
class RobustnessCurve:
    """Accuracy of one student under one method, over its seeds, at growing corruption."""

    student: str
    name: str
    method: str
    mean: Mapping[str, Sequence[float]]
    """By corruption: mean OA in % at each severity."""
    sd: Mapping[str, Sequence[float]]
    """Standard deviation over the seeds; zeros for one seed."""


AXES = {
    "dropout": "part of the points lost",
    "jitter": "standard deviation of the noise",
    "rotation_up": "rotation about the vertical, up to (°)",
    "rotation": "rotation about any axis, up to (°)",
    "scale": "stretch of each axis, up to (factor)",
}


def save_robustness(
    curves: Sequence[RobustnessCurve], severities: Mapping[str, Sequence[float]], path: Path
) -> Path:
    """One row of panels per student, one panel per corruption; bands are one standard deviation."""
    students = list(dict.fromkeys(curve.student for curve in curves))
    kinds = list(severities)
    figure = new_figure(2.6 * len(kinds) + 0.6, 2.35 * len(students) + 0.5)
    grid = figure.subplots(len(students), len(kinds), squeeze=False, sharey="row")
    names = list(dict.fromkeys(curve.name for curve in curves))
    others = [name for name in names if name not in COLOURS]
    palette = (COLOURS["pointcmt"], *OTHERS, COLOURS["teacher"], COLOURS["generator"])
    tint = {
        name: COLOURS.get(name, palette[others.index(name) % 7] if name in others else "") for name in names
    }
    for row, student in enumerate(students):
        for column, kind in enumerate(kinds):
            axes = grid[row, column]
            for curve in curves:
                if curve.student != student or kind not in curve.mean:
                    continue
                x, mean = np.asarray(severities[kind]), np.asarray(curve.mean[kind])
                sd = np.asarray(curve.sd[kind])
                axes.plot(x, mean, color=tint[curve.name], linewidth=1.7, marker="o", markersize=2.5,
                          label=LABELS.get(curve.name, curve.name))  # fmt: skip
                axes.fill_between(x, mean - sd, mean + sd, color=tint[curve.name], alpha=0.16, linewidth=0)
            tidy(axes)
            if row == 0:
                axes.set_title(kind.replace("_", " "), fontsize=9.5, color=INK, loc="left")
            if row == len(students) - 1:
                axes.set_xlabel(AXES.get(kind, kind), fontsize=8, color=MUTED)
        grid[row, 0].set_ylabel(f"{student}\nOA (%)", fontsize=8.5, color=INK)
    shown: dict[str, Any] = {}  # by label, of all students: not each has every method
    for axes in grid.flat:
        shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    handles, labels = list(shown.values()), list(shown)
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False, fontsize=8.5,
        labelcolor=INK,
    )  # fmt: skip
    return save_figure(figure, path)
