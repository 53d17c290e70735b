"""``pointcmt check-data``: reads a whole data set and says what would go wrong with it."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.markup import escape
from rich.table import Table

from pointcmt.checkpoint import atomic_write
from pointcmt.data import DataOptions, MultiViewImages, PointDataset
from pointcmt.data.checks import frame_of, guess_up
from pointcmt.data.clouds import read_cloud
from pointcmt.data.dataset import Split
from pointcmt.recipes.progress import console, say, warn
from pointcmt.views import ViewSpec

_FLAT = 1e-3  # least extent over largest, below which a shape is called flat
_BLANK = 0.002  # part of a view's pixels that show something, below which it is nearly blank


@dataclass
class CheckData:
    """Read all of a data set, say what is in it and what would go wrong, and write a page with a picture of
    each class. The exit code is 1 where something would go wrong."""

    path: Annotated[str | None, tyro.conf.Positional] = None
    """The data set: as --data."""
    data: DataOptions = field(default_factory=DataOptions)
    images: Path | None = None
    """Folder of images of the shapes, to be read too."""
    out: Path = Path("data-check")
    """Folder of the page."""


@dataclass
class Findings:
    """What the check says."""

    facts: dict[str, str] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Class → split → number of shapes."""
    notes: list[str] = field(default_factory=list)
    """Worth a look."""
    wrong: list[str] = field(default_factory=list)
    """What would go wrong."""


def check_data(options: CheckData) -> int:
    """Run the command; returns the exit code."""
    if options.path is not None:
        options.data.data = options.path
    findings = Findings()
    parts = _read(options.data, findings)
    for name, part in parts.items():
        for label, count in enumerate(np.bincount(part.labels, minlength=part.num_classes).tolist()):
            findings.classes.setdefault(part.class_names[label], {})[name] = count
    if parts:
        _measure(parts, findings)
        _duplicates(parts, findings)
    if options.images is not None:
        _images(options.images, findings)
    _say(options, findings)
    page = options.out / "index.html"
    with atomic_write(page) as temporary:
        temporary.write_text(_page(options, findings, parts), encoding="utf-8")
    say(f"a picture of each class: {page}")
    return 1 if findings.wrong else 0


def _read(data: DataOptions, findings: Findings) -> dict[str, PointDataset]:
    """Both splits, with all that their reading says."""
    asked = data.skip_broken
    data.skip_broken = True  # so that all broken files are found, and not the first
    try:
        findings.facts["data set"] = data.named()
    except (ValueError, OSError) as error:
        findings.wrong.append(str(error))
        return {}
    parts: dict[str, PointDataset] = {}
    splits: tuple[tuple[Split, int | None], ...] = (("train", data.per_class), ("test", data.test_per_class))
    for split, per_class in splits:
        try:
            with warnings.catch_warnings(), console.status(f"reading {split} shapes"):
                warnings.simplefilter("ignore")  # what is left out is said below
                parts[split] = data.build(split, per_class)
        except (ValueError, OSError) as error:
            findings.wrong.append(f"{split}: {error}")
            continue
        broken = getattr(parts[split], "broken", [])
        (findings.notes if asked else findings.wrong).extend(broken)
    names = [part.class_names for part in parts.values()]
    if len(names) == 2 and names[0] != names[1]:
        findings.wrong.append(f"training shapes are of {names[0]}, test shapes of {names[1]}")
    return parts


def _measure(parts: dict[str, PointDataset], findings: Findings) -> None:
    """Sizes, units, the up axis, flat shapes, blank views."""
    points = np.concatenate([part.points[..., :3] for part in parts.values()])
    labels = np.concatenate([part.labels for part in parts.values()])
    ids = [name for part in parts.values() for name in part.shape_ids]
    first = next(iter(parts.values()))
    own = [part.lengths for part in parts.values() if part.lengths is not None]
    findings.facts["points per shape"] = str(first.num_points) + (
        f", of which its own: {min(int(o.min()) for o in own)} at least (the rest repeats them)"
        if own
        else ""
    )
    extent = points.max(1) - points.min(1)
    least, usual, most = (np.percentile(extent.max(1), q) for q in (0, 50, 100))
    findings.facts["longest side"] = f"{least:.3g} … {usual:.3g} (median) … {most:.3g}"
    frame = frame_of(points)
    findings.facts["frame"] = (
        f"farthest point {frame.radius:.3g} from the origin, centre {frame.offset:.2g} radii off it (medians)"
    )
    if (problem := frame.problem()) is not None:
        findings.wrong.append(problem)
    guess = guess_up(points, labels)
    findings.facts["up"] = f"recorded: {first.up or 'no'}; by the shapes: {guess}"
    if first.up is None:
        findings.notes.append(f"no up axis is recorded; taken by the shapes: {guess}. --data-up says it")
    elif guess.contradicts(first.up):
        findings.wrong.append(
            f"{first.up} is recorded as the axis that points up, and the shapes look as if it were {guess}: "
            f"--data-up {guess.axis} mends it, if so"
        )
    flat = np.flatnonzero(extent.min(1) <= _FLAT * extent.max(1))
    single = np.flatnonzero(extent.max(1) == 0)
    if len(single):
        findings.wrong.append(f"{_some(ids, single)}: all points in one place")
    if len(flat) > len(single):
        findings.notes.append(f"{_some(ids, np.setdiff1d(flat, single))}: flat")
    spec = ViewSpec(up=first.up or guess.axis)
    blank = []
    for part in parts.values():
        for start in range(0, len(part), 64):
            views = spec.project(torch.from_numpy(np.ascontiguousarray(part.view_points[start : start + 64])))
            shown = (views != 0).flatten(2).float().mean(2).median(1).values
            blank += [part.shape_ids[start + int(row)] for row in (shown < _BLANK).nonzero()]
    if blank:
        findings.wrong.append(f"{_some(blank, np.arange(len(blank)))}: nearly blank in most views")
    for name, counts in findings.classes.items():
        for split in parts:
            if not counts.get(split):
                findings.notes.append(f"class {name!r} has no {split} shape")


def _duplicates(parts: dict[str, PointDataset], findings: Findings) -> None:
    """Shapes of the test split whose points, in any order, are those of a training shape."""
    seen: dict[str, dict[bytes, str]] = defaultdict(dict)
    for name, part in parts.items():
        paths = getattr(part, "paths", None)
        for row, shape in enumerate(part.shape_ids):
            # of files the points as they are there: two copies give other points by chance
            points = part.points[row, :, :3] if paths is None else read_cloud(paths[row]).points
            points = np.ascontiguousarray(points[np.lexsort(points.T)], dtype=np.float32) + 0.0
            seen[name].setdefault(hashlib.sha256(points.tobytes()).digest(), shape)
    if {"train", "test"} <= seen.keys():
        both = [
            f"{seen['train'][key]} = {seen['test'][key]}"
            for key in seen["train"].keys() & seen["test"].keys()
        ]
        if both:
            findings.wrong.append(
                f"{len(both)} test shapes are training shapes too, so test accuracy is too good: "
                + ", ".join(sorted(both)[:5])
                + (" …" if len(both) > 5 else "")
            )


def _images(root: Path, findings: Findings) -> None:
    """Reads every image."""
    for split in ("train", "test"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong with all is said below
                views = MultiViewImages(root, split)
            if (problem := views.problem()) is not None:
                findings.wrong.append(f"{split} images: {problem}")
        except (ValueError, OSError) as error:
            findings.wrong.append(str(error))
            continue
        findings.facts[f"{split} images"] = f"{len(views)} shapes of {views.num_views} views"
        blank = []
        for row in range(len(views)):
            try:
                pixels = views[row][0]
            except (ValueError, OSError) as error:
                findings.wrong.append(str(error))
                continue
            shown = (pixels - pixels[..., :1, :1]).abs().amax(2).flatten(1) > 2 / 255
            if float(shown.float().mean(1).max()) < _BLANK:
                blank.append(views.shape_ids[row])
        if blank:
            findings.wrong.append(
                f"images of {_some(blank, np.arange(len(blank)))}: nearly blank in every view"
            )


def _some(names: list[str], rows: np.ndarray) -> str:
    shown = ", ".join(names[row] for row in rows[:4].tolist())
    return f"{len(rows)} shape{'s' if len(rows) > 1 else ''} ({shown}{' …' if len(rows) > 4 else ''})"


def _say(options: CheckData, findings: Findings) -> None:
    table = Table("class", "train", "test")
    for name, counts in findings.classes.items():
        table.add_row(escape(name), *(str(counts.get(split, 0)) for split in ("train", "test")))
    if findings.classes:
        console.print(table)
    for name, text in findings.facts.items():
        say(f"{name}: {text}")
    for text in findings.notes:
        say(f"note: {text}")
    for text in findings.wrong:
        warn(text)
    say("something would go wrong" if findings.wrong else "nothing wrong was found")


def _page(options: CheckData, findings: Findings, parts: dict[str, PointDataset]) -> str:
    def lines(title: str, texts: list[str]) -> str:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
        return f"<h2>{title}</h2><ul>{items}</ul>" if texts else ""

    rows = []
    for name, counts in findings.classes.items():
        picture = _picture(parts, name)
        rows.append(
            f"<tr><td>{html.escape(name)}</td>"
            + "".join(f"<td>{counts.get(split, 0)}</td>" for split in ("train", "test"))
            + (f"<td><img src='data:image/png;base64,{picture}'></td></tr>" if picture else "<td></td></tr>")
        )
    facts = [f"{name}: {text}" for name, text in findings.facts.items()]
    return (
        "<!doctype html><meta charset=utf-8><title>data check</title>"
        "<style>body{font-family:sans-serif;margin:2em}td,th{padding:.3em 1em;text-align:left}</style>"
        f"<h1>{html.escape(options.data.data)}</h1>"
        + lines("What would go wrong", findings.wrong)
        + lines("Worth a look", findings.notes)
        + lines("Facts", facts)
        + "<table><tr><th>class<th>train<th>test<th>its first shape: along two sides, and from above</tr>"
        + "".join(rows)
        + "</table>"
    )


def _picture(parts: dict[str, PointDataset], name: str) -> str | None:
    """The first shape of a class from three sides, its up axis upwards: a PNG in base 64."""
    from PIL import Image

    for part in parts.values():
        found = np.flatnonzero(part.labels == part.class_names.index(name))
        if len(found) == 0:
            continue
        cloud: Any = part.points[found[0], :, :3]
        up = "xyz".index(part.up or "z")
        across, along = (up + 1) % 3, (up + 2) % 3
        cloud = cloud - (cloud.min(0) + cloud.max(0)) / 2
        cloud = cloud / max(float(np.abs(cloud).max()), 1e-12)
        panels = np.full((96, 3 * 96), 255, np.uint8)
        for place, (right, upward) in enumerate(((across, up), (along, up), (across, along))):
            column = (48 + 44 * cloud[:, right]).astype(int) + 96 * place
            panels[(48 - 44 * cloud[:, upward]).astype(int), column] = 0
        buffer = io.BytesIO()
        Image.fromarray(panels).save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()
    return None
