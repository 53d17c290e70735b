"""Pictures of views and clouds, and the look that all charts share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text

from pointcmt.checkpoint import atomic_write

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e8ee"
COLOURS = {"teacher": "#d9822b", "none": "#7b8794", "pointcmt": "#0b7a75", "generator": "#7c5cbf"}
OTHERS = ("#2f6fb0", "#b0413e", "#5a8f29", "#a05a9c")
LABELS = {
    "teacher": "image teacher",
    "none": "plain student",
    "pointcmt": "PointCMT student",
    "soft_labels and unlabelled clouds": "taught student",
}


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
    """Write a PNG atomically. Names in it are text, never mathematics, whatever signs they have."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with atomic_write(path) as temporary, rc_context({"text.parse_math": False}):
        figure.savefig(temporary, dpi=140, format="png")
    return Path(path)


def label_colours(count: int) -> np.ndarray:
    """Colours [count, 3] in [0, 1] for so many labels, neighbours unlike each other."""
    table = np.array(colormaps["tab20"].colors)[[*range(0, 20, 2), *range(1, 20, 2)]]  # type: ignore[attr-defined]
    return table[np.arange(count) % len(table)] * (0.75 ** (np.arange(count) // len(table)))[:, None]


def seen_obliquely(points: np.ndarray, up: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Across, height and depth [N] of points [N, 3] seen obliquely from above."""
    order = {"z": (0, 1, 2), "y": (2, 0, 1), "x": (1, 2, 0)}[up]
    x, y, z = points[:, order[0]], points[:, order[1]], points[:, order[2]]
    turn, tilt = math.radians(35), math.radians(22)
    across = x * math.cos(turn) + y * math.sin(turn)
    away = -x * math.sin(turn) + y * math.cos(turn)
    height = z * math.cos(tilt) + away * math.sin(tilt)
    return across, height, away * math.cos(tilt) - z * math.sin(tilt)


def draw_cloud(axes: Axes, points: np.ndarray, up: str = "z", tint: str | np.ndarray = "#0b7a75") -> None:
    """Draw a cloud [N, 3] seen obliquely from above: near points larger and darker.

    ``tint`` is its colour, or one for each point [N, 3] in [0, 1].
    """
    across, height, depth = seen_obliquely(points, up)
    far_first = np.argsort(-depth)
    span = np.ptp(depth)
    near = 1 - (depth - depth.min()) / (span if span > 0 else 1)
    base = np.array([int(tint[i : i + 2], 16) / 255 for i in (1, 3, 5)]) if isinstance(tint, str) else tint
    fade = (0.55 * (1 - near))[:, None]
    rgb = np.clip(base * (1 - fade) + fade, 0, 1)  # rounding
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


def save_segmentation(
    clouds: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    predicted: Sequence[np.ndarray],
    names: Sequence[str],
    classes: int,
    path: Path,
    up: str = "z",
) -> Path:
    """Clouds [N, 3] with their labels [N] above what was predicted [N], a colour for each of ``classes``;
    points without a label are grey."""
    figure = new_figure(1.75 * len(names) + 0.5, 4.0)
    grid = figure.subplots(2, len(names), squeeze=False)
    colours = np.concatenate([label_colours(classes), [[0.8, 0.8, 0.8]]])
    for column, name in enumerate(names):
        for row, found in enumerate((labels[column], predicted[column])):
            draw_cloud(grid[row, column], clouds[column], up, colours[np.where(found < 0, classes, found)])
        grid[0, column].set_title(name.replace("_", " "), fontsize=9, color=INK)
    for row, text in enumerate(("true", "predicted")):
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


def draw_values(axes: Axes, points: np.ndarray, values: np.ndarray, up: str = "z") -> None:
    """Draw points [N, 3] seen obliquely from above, coloured by values [N] in [−1, 1]."""
    across, height, depth = seen_obliquely(points, up)
    order = np.argsort(-depth)
    size = 14 * math.sqrt(256 / max(len(points), 1))
    axes.scatter(
        across[order], height[order], s=size, c=values[order], cmap="viridis", vmin=-1, vmax=1, linewidths=0
    )
    axes.set_aspect("equal")
    axes.set_axis_off()


def save_similarity(
    centers: np.ndarray,
    chosen: Sequence[int],
    own: np.ndarray,
    others: np.ndarray,
    images: np.ndarray,
    cells: np.ndarray,
    names: Sequence[str],
    path: Path,
    up: str = "z",
) -> Path:
    """How similar one local feature of each shape is to what.

    Args:
        centers: [S, M, 3] of the local features.
        chosen: S, which one of each shape.
        own: [S, M] similarity to the shape's own local features.
        others: [S, M] similarity to those of the next shape, the first's for the last.
        images: [S, V, C, H, W].
        cells: [S, V, h, w] similarity to their cells.
        names: of the shapes.
        path: of the PNG.
        up: the axis that points up.

    Source: Pic@Point (Herzog and Suwelack 2024), figure 4.
    """
    shapes, count = images.shape[:2]
    figure = new_figure(1.6 * (count + 2) + 0.6, 1.6 * shapes + 0.4)
    grid = figure.subplots(shapes, count + 2, squeeze=False)
    for row in range(shapes):
        draw_values(grid[row, 0], centers[row], own[row], up)
        across, height, _ = seen_obliquely(centers[row], up)
        grid[row, 0].scatter(
            across[chosen[row]], height[chosen[row]], s=70, facecolors="none", edgecolors="#b0413e"
        )
        grid[row, 0].set_title(names[row].replace("_", " "), fontsize=8, color=INK)
        for view in range(count):
            axes, image = grid[row, view + 1], images[row, view]
            extent = (0, image.shape[2], image.shape[1], 0)
            ground = image.mean(0) if image.shape[0] == 3 else np.where(image[0] > 0, 1.0, 0.0)
            axes.imshow(ground, cmap="gray_r", extent=extent, interpolation="nearest")
            axes.imshow(cells[row, view], cmap="viridis", vmin=-1, vmax=1, alpha=0.6, extent=extent)
            axes.set_axis_off()
        draw_values(grid[row, -1], centers[(row + 1) % shapes], others[row], up)
    heads = ["the point, and its own shape", *["a picture of it"] * count, "another shape"]
    for axes, text in zip(grid[-1], heads, strict=True):
        axes.text(0.5, -0.12, text, transform=axes.transAxes, ha="center", fontsize=7.5, color=MUTED)
    figure.colorbar(
        ScalarMappable(Normalize(-1, 1), "viridis"), ax=grid, shrink=0.7, label="cosine similarity"
    )
    return save_figure(figure, path)


def save_embedding(
    panels: dict[str, np.ndarray], labels: np.ndarray, names: Sequence[str], path: Path
) -> Path:
    """Features laid out in the plane, [n, 2] in each panel, coloured by labels [n]."""
    figure = new_figure(3.6 * len(panels) + 1.4, 3.4)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    shown = np.unique(labels)
    tints = colormaps["tab20"](np.linspace(0, 1, 20))
    for axes, (title, places) in zip(grid, panels.items(), strict=True):
        for position, label in enumerate(shown):
            mine = places[labels == label]
            axes.scatter(
                mine[:, 0], mine[:, 1], s=12, color=tints[position % 20], linewidths=0, label=names[label]
            )
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        tidy(axes)
    if len(shown) <= 20:
        figure.legend(
            *grid[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False
        )
    return save_figure(figure, path)
