"""``pointcmt report``: the runs below a folder as pictures and one HTML page that holds them all."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pointcmt.checkpoint import atomic_write
from pointcmt.pictures import LABELS
from pointcmt.recipes.config import read_json
from pointcmt.recipes.progress import say
from pointcmt.recipes.run import read_metrics
from pointcmt.studies.charts import HEADINGS, Curve, Entry, save_comparison, save_curves
from pointcmt.studies.registration_report import ablation_rows, find_registration_runs, method_rows


@dataclass
class Report:
    """Write report.html and its pictures of all finished runs in a folder and below it."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a folder of run folders."""
    title: str = "PointCMT: images teach a point-cloud network"
    """Heading of the page."""


def report(options: Report) -> None:
    """Run the command."""
    say(f"report: {write_report(options.folder, options.title)}")


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

ORDER = {"train-teacher": 0, "train-generator": 1, "pretrain": 2, "train": 3, "segment": 4}
"""The commands whose runs are shown, in their order."""


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
        described = read_json(config)
        if described.get("command") not in ORDER:
            continue
        runs.append(
            Run(
                place,
                described["command"],
                described["config"],
                read_json(place / "results.json"),
                read_json(place / "environment.json"),
                read_metrics(place),
            )
        )
    if not runs:
        raise FileNotFoundError(
            f"no finished run in {folder} or below it; make one with pointcmt train-teacher, "
            "train-generator, pretrain, train, segment or train-registration"
        )
    return sorted(runs, key=lambda run: (ORDER[run.command], run.role != "none", run.role, str(run.path)))


def compare(runs: Sequence[Run]) -> list[Entry]:
    """Teacher and students as lines of a comparison; seeds of one student and method together."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.role == "generator" or run.command in ("pretrain", "segment"):
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


def segmented(runs: Sequence[Run]) -> list[Section]:
    """Figures and pictures of runs of segment; none where there is no such run."""
    if not runs:
        return []
    figures = {
        "instance_miou": "instance mIoU %", "class_miou": "class mIoU %", "miou": "mIoU %", "macc": "mAcc %",
        "oa": "OA %",
    }  # fmt: skip
    shown = [name for name in figures if any(name in run.results["test"] for run in runs)]
    rows = [["run", "network", "starts from", *(figures[name] for name in shown)]]
    classes = [["run and class", "IoU %"]]
    for run in runs:
        test = run.results["test"]
        values = [f"{test[name]:.2f}" if name in test else "" for name in shown]
        rows.append([run.path.name, run.results["student"], run.results["init"] or "scratch", *values])
        for name, value in test.items():
            if name.startswith("iou/"):
                classes.append([f"{run.path.name}: {name.removeprefix('iou/')}", f"{value:.1f}"])
    argmax = {run.results["test"]["argmax"] for run in runs if "argmax" in run.results["test"]}
    text = "Test clouds after the last epoch; of rooms every point of the file."
    if argmax:
        text += f" Parts: the highest score among {' or '.join(sorted(argmax))} (argmax)."
    pictures = [
        (run.path / "segmentation.png", f"{run.path.name}: labels above, predictions below")
        for run in runs
        if (run.path / "segmentation.png").exists()
    ]
    return [
        Section("Parts and scenes", text, rows, pictures),
        Section("Parts and scenes, class by class", table=classes),
    ]


def registration_sections(folder: Path) -> list[Section]:
    """What the page says of runs of train-registration: figures, ablation, pairs before and after."""
    runs = find_registration_runs(folder)
    sections = []
    if rows := ablation_rows(runs):
        text = f"{len(runs)} networks, each measured on its own test pairs after the last epoch."
        sections.append(Section("Registration: what was changed", text, rows))
    captions = {
        "errors.png": "Mean rotation error over the overlap of the clouds, and over noise",
        "pairs.png": "Test pairs before and after, with keypoints, and the correspondences by weight",
    }
    for run in runs:
        text = f"{run.results['protocol']}. Mean overlap {run.results['overlap']:.2f}."
        images = [(run.path / file, words) for file, words in captions.items() if (run.path / file).exists()]
        sections.append(Section(f"Registration: {run.path.name}", text, method_rows(run), images))
    return sections


def write_report(folder: Path, title: str = "PointCMT: images teach a point-cloud network") -> Path:
    """Pictures and one page of all finished runs in ``folder``: ``report.html`` and PNG files in ``report/``.

    Raises:
        FileNotFoundError: no finished run.
    """
    folder = Path(folder)
    registration = registration_sections(folder)
    try:
        runs = find_runs(folder)
    except FileNotFoundError:
        if not registration:
            raise
        lead = f"Registration, in {folder.resolve().name}"
        return write_page(title, lead, registration, folder / "report.html")
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
    sections += segmented([run for run in runs if run.command == "segment"])
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
            (
                "similarity.png",
                "What pre-training finds similar",
                "One local feature of each shape, compared with the others of the shape, with the cells of "
                "its pictures, and with the local features of another shape",
            ),
            (
                "features.png",
                "Features before and after pre-training",
                "t-SNE of the pooled features of the shapes that were watched; colours are classes, which "
                "pre-training did not look at",
            ),
        ):
            if (run.path / file).exists():
                sections.append(Section(heading, images=[(run.path / file, caption)]))
    guards = [run.results["teacher_check"]["verdict"] for run in students if "teacher_check" in run.results]
    if guards:
        sections.append(Section("Is the teacher worth listening to?", "\n\n".join(dict.fromkeys(guards))))
    sections += registration
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
