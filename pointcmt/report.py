"""Pictures of runs, and one HTML page that holds them all: views, clouds, curves, comparison."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pointcmt.checkpoint import atomic_write

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e8ee"
COLOURS = {"teacher": "#d9822b", "none": "#7b8794", "pointcmt": "#0b7a75", "generator": "#7c5cbf"}
OTHERS = ("#2f6fb0", "#b0413e", "#5a8f29", "#a05a9c")
LABELS = {"teacher": "image teacher", "none": "plain student", "pointcmt": "PointCMT student"}


def colour(role: str, position: int = 0) -> str:
    """Colour of a role or method, the same in every picture."""
    return COLOURS.get(role, OTHERS[position % len(OTHERS)])


def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot: no window, no global state, safe beside a user's own plots."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, grid: str = "y") -> None:
    """The look that all plots share."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    return Path(path)


def draw_cloud(axes: Axes, points: np.ndarray, up: str = "z", tint: str = "#0b7a75") -> None:
    """Draw a cloud [N, 3] seen obliquely from above: near points larger and darker."""
    order = {"z": (0, 1, 2), "y": (2, 0, 1), "x": (1, 2, 0)}[up]
    x, y, z = points[:, order[0]], points[:, order[1]], points[:, order[2]]
    turn, tilt = math.radians(35), math.radians(22)
    across = x * math.cos(turn) + y * math.sin(turn)
    away = -x * math.sin(turn) + y * math.cos(turn)
    height = z * math.cos(tilt) + away * math.sin(tilt)
    depth = away * math.cos(tilt) - z * math.sin(tilt)
    far_first = np.argsort(-depth)
    span = np.ptp(depth)
    near = 1 - (depth - depth.min()) / (span if span > 0 else 1)
    base = np.array([int(tint[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    fade = (0.55 * (1 - near))[:, None]
    rgb = base * (1 - fade) + fade
    # the fewer the points, the larger
    size = 3.2 * math.sqrt(1024 / max(len(points), 1)) * (0.5 + near)
    axes.scatter(
        across[far_first],
        height[far_first],
        s=size[far_first],
        c=rgb[far_first],
        linewidths=0,
        rasterized=True,
    )
    axes.set_aspect("equal")
    axes.set_axis_off()
    reach = 0.98 * max(np.abs(across).max(initial=1e-6), np.abs(height).max(initial=1e-6)) * 1.08
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)


def save_clouds(
    real: np.ndarray, generated: np.ndarray, names: Sequence[str], path: Path, up: str = "z"
) -> Path:
    """Real clouds [S, N, 3] above the clouds [S, M, 3] that were generated from their images."""
    figure = new_figure(1.75 * len(names) + 0.5, 4.0)
    grid = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        draw_cloud(grid[0, column], real[column], up, INK)
        draw_cloud(grid[1, column], generated[column], up, COLOURS["generator"])
        grid[0, column].set_title(name.replace("_", " "), fontsize=9, color=INK)
    for row, text in enumerate(("real", "generated")):
        grid[row, 0].text(
            -0.04, 0.5, text, transform=grid[row, 0].transAxes, rotation=90, ha="right", va="center",
            fontsize=9, color=MUTED,
        )  # fmt: skip
    return save_figure(figure, path)


def save_views(views: np.ndarray, names: Sequence[str], path: Path) -> Path:
    """A sheet of views [S, V, C, H, W], one shape per row; the first channel, or three as colours.

    A single channel is depth with 0 for the background: near is dark.
    """
    shapes, count = views.shape[:2]
    figure = new_figure(1.15 * count + 0.5, 1.15 * shapes + 0.1)
    grid = figure.subplots(shapes, count, squeeze=False)
    for row in range(shapes):
        for column in range(count):
            axes = grid[row, column]
            image = views[row, column]
            if image.shape[0] == 3:
                low, high = image.min(), image.max()
                axes.imshow(np.moveaxis((image - low) / max(high - low, 1e-6), 0, -1))
            else:
                drawn = np.where(image[0] > 0, image[0], np.nan)
                axes.imshow(drawn, cmap="cividis", interpolation="nearest")
            axes.set_facecolor("#f5f7fa")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        grid[row, 0].set_ylabel(names[row].replace("_", " "), fontsize=8, color=INK)
    return save_figure(figure, path)


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


@dataclass
class Section:
    """A part of the page: prose, a table, pictures."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] | None = None
    """First row: headings."""
    images: Sequence[tuple[Path, str]] = ()
    """PNG files and their captions."""


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f7fa; color: #1f2933;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; letter-spacing: -0.01em; }
.lead { color: #6b7785; margin: 0 0 28px; }
section { background: white; border: 1px solid #e3e8ee; border-radius: 10px; padding: 22px 26px;
  margin: 0 0 20px; }
h2 { font-size: 18px; margin: 0 0 10px; }
p { margin: 0 0 12px; max-width: 74ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px;
  font-variant-numeric: tabular-nums; }
th { text-align: right; color: #6b7785; font-weight: 500; padding: 6px 12px;
  border-bottom: 2px solid #e3e8ee; white-space: nowrap; }
td { text-align: right; padding: 7px 12px; border-bottom: 1px solid #eef1f5;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
figure { margin: 14px 0 4px; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { color: #6b7785; font-size: 13.5px; margin-top: 6px; }
"""


def write_page(title: str, lead: str, sections: Sequence[Section], path: Path) -> Path:
    """One HTML file without anything outside it: pictures are embedded."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>",
    ]
    for section in sections:
        parts.append(f"<section><h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in section.text.split("\n\n") if text]
        if section.table:
            head, *rows = section.table
            parts.append("<div class='scroll'><table><thead><tr>")
            parts += [f"<th>{html.escape(cell)}</th>" for cell in head]
            parts.append("</tr></thead><tbody>")
            for row in rows:
                parts.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
            parts.append("</tbody></table></div>")
        for image, caption in section.images:
            data = base64.b64encode(Path(image).read_bytes()).decode()
            parts.append(
                f"<figure><img alt='{html.escape(caption, quote=True)}' src='data:image/png;base64,{data}'>"
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        parts.append("</section>")
    parts.append("</main></body></html>\n")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(parts), encoding="utf-8")
    return Path(path)


# what a report is made from: the run folders below one folder


@dataclass
class Run:
    """A finished run folder, as a report reads it."""

    path: Path
    command: str
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    environment: Mapping[str, Any]
    records: list[dict[str, Any]]

    @property
    def role(self) -> str:
        """``teacher``, ``generator``, or the student's method."""
        return {"train-teacher": "teacher", "train-generator": "generator"}.get(
            self.command, str(self.results.get("method", "none"))
        )


def find_runs(folder: Path) -> list[Run]:
    """The finished runs in ``folder`` or below it, teacher first, then generator, then students.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(folder)
    runs = []
    for config in sorted(folder.rglob("config.json")):
        place = config.parent
        if not (place / "results.json").exists():
            continue
        described = json.loads(config.read_text())
        if described.get("command") not in ("train-teacher", "train-generator", "train"):
            continue
        metrics = place / "metrics.jsonl"
        runs.append(
            Run(
                place,
                described["command"],
                described["config"],
                json.loads((place / "results.json").read_text()),
                json.loads((place / "environment.json").read_text()),
                [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else [],
            )
        )
    if not runs:
        raise FileNotFoundError(
            f"no finished run in {folder} or below it; make one with pointcmt train-teacher, "
            f"train-generator or train"
        )
    order = {"train-teacher": 0, "train-generator": 1, "train": 2}
    return sorted(runs, key=lambda run: (order[run.command], run.role != "none", run.role, str(run.path)))


def compare(runs: Sequence[Run]) -> list[Entry]:
    """Teacher and students as lines of a comparison; seeds of one student and method together."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.role == "generator":
            continue
        key = (run.role, str(run.results.get("student", "")))
        groups.setdefault(key, []).append(run)
    several = len({student for role, student in groups if role != "teacher"}) > 1
    entries = []
    for (role, student), group in groups.items():
        name = LABELS.get(role, role)
        if role != "teacher" and several:
            name = (
                f"{student}, {'plain' if role == 'none' else LABELS.get(role, role).removesuffix(' student')}"
            )
        times = [r.results["milliseconds_per_cloud"] for r in group if "milliseconds_per_cloud" in r.results]
        entries.append(
            Entry(
                name,
                role,
                [run.results["last"]["test_oa"] for run in group],
                [run.results["last"]["test_macc"] for run in group],
                [run.results["best"]["test_oa"] for run in group],
                group[0].results.get("parameters"),
                float(np.median(times)) if times else None,
            )
        )
    return entries


def write_report(folder: Path, title: str = "PointCMT: images teach a point-cloud network") -> Path:
    """Pictures and one page of all finished runs in ``folder``: ``report.html`` and PNG files in ``report/``.

    Raises:
        FileNotFoundError: no finished run.
    """
    folder = Path(folder)
    runs = find_runs(folder)
    pictures = folder / "report"
    pictures.mkdir(exist_ok=True)
    sections = []
    entries = compare(runs)
    students = [run for run in runs if run.command == "train"]
    if entries:
        seeds = max(len(entry.oa) for entry in entries)
        text = (
            "Accuracy on the test shapes after the last epoch, in one pass. Best OA is that of the epoch "
            "chosen by " + (students or runs)[0].results["best"]["chosen_by"] + "."
        )
        if seeds > 1:
            text += f" Students over {seeds} seeds: mean ± standard deviation."
        if any(e.milliseconds for e in entries):
            text += (
                " Inference time is that of the student alone, on the machine below: a student that was "
                "trained with "
                "PointCMT is the same network."
            )
        sections.append(
            Section(
                "Comparison",
                text,
                [HEADINGS, *[entry.cells() for entry in entries]],
                [(save_comparison(entries, pictures / "comparison.png"), "OA and mAcc on the test shapes")],
            )
        )
    curves = [Curve(run.path.name, run.role, run.records) for run in runs if run.records]
    if curves:
        sections.append(
            Section(
                "Training",
                images=[
                    (save_curves(curves, pictures / "curves.png"), "Losses and test metrics over the epochs")
                ],
            )
        )
    for run in runs:
        for file, heading, caption in (
            ("views.png", "What the teacher sees", "One shape per row, one camera per column"),
            (
                "generated.png",
                "What the generator makes",
                "Test shapes, and the clouds made from their images",
            ),
        ):
            if (run.path / file).exists():
                sections.append(Section(heading, images=[(run.path / file, caption)]))
    guards = [run.results["teacher_check"]["verdict"] for run in students if "teacher_check" in run.results]
    if guards:
        sections.append(Section("Is the teacher worth listening to?", "\n\n".join(dict.fromkeys(guards))))
    one = runs[-1].environment
    rows = [["", ""]]
    rows += [
        [name, str(one.get(name))] for name in ("processor", "threads", "gpu", "device", "python", "commit")
    ]
    rows += [[name, str(version)] for name, version in one.get("versions", {}).items()]
    rows += [
        ["compiled kernels", ", ".join(k for k, there in one.get("kernels", {}).items() if there) or "none"]
    ]
    rows += [[f"{run.path.name}: training time", f"{run.results.get('seconds', 0):.0f} s"] for run in runs]
    sections.append(Section("Machine and versions", table=rows))
    return write_page(title, f"{len(runs)} runs in {folder.resolve().name}", sections, folder / "report.html")
