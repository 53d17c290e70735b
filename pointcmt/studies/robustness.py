"""Accuracy of trained students on test shapes that are corrupted more and more."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pointcmt.data import SEVERITIES, PointDataset, corrupt
from pointcmt.recipes.config import read_json, restore, write_json
from pointcmt.recipes.engine import MachineOptions, OutOfTime, make_accelerator, out_of_time
from pointcmt.recipes.evaluate import described, load_student
from pointcmt.recipes.options import DataOptions, shared_shapes
from pointcmt.recipes.progress import console, say
from pointcmt.recipes.run import described_environment, held, results_beside, run_config_beside
from pointcmt.studies.charts import RobustnessCurve, save_robustness
from pointcmt.tasks.metrics import overall_accuracy


@dataclass
class Robustness:
    """Accuracy of students under point dropout, jitter, rotation and scale; one JSON and one plot."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of train, or the students' files alone; or folders that hold some, such as that of a study
    (pointcmt ablate)."""
    out: Path = Path("robustness.json")
    """The JSON file; the plot lies beside it, as .png. What it holds of these runs is not measured again."""
    kinds: tuple[str, ...] = tuple(SEVERITIES)
    """Corruptions: dropout, jitter, rotation_up, rotation (about any axis), scale."""
    student: str | None = None
    """module:factory of a network of your own, which a file may not name by itself."""
    data: str | None = None
    """Folder of the data set, where it is not the runs' own."""
    test_per_class: int | None = None
    """Test shapes per class; default: as in the runs. Fewer is faster."""
    only: tuple[str, ...] = ()
    """Of folders that hold several runs, those whose name contains one of these."""
    seed: int = 0
    """Of the corruptions: the same for all runs on the same shapes."""
    batch_size: int = 32
    """Shapes at once."""
    machine: MachineOptions = field(default_factory=MachineOptions)


def robustness(options: Robustness) -> dict[str, Any]:
    """Measure what is not in the JSON yet, and write JSON and plot; returns what the JSON holds.

    Raises:
        FileNotFoundError: no finished run of ``pointcmt train`` in a folder.
        ValueError: an unknown corruption, or a JSON file of other settings.
    """
    for kind in options.kinds:
        if kind not in SEVERITIES:
            raise ValueError(f"--kinds {kind}: expected some of {', '.join(SEVERITIES)}")
    if options.out.suffix != ".json":
        raise ValueError(f"--out is {options.out}; expected the name of a .json file")
    with held(options.out):
        return run_robustness(options)


def run_robustness(options: Robustness) -> dict[str, Any]:
    """:func:`robustness` into a file that no other command writes."""
    runs = [describe(file) for file in find_students(options.runs, options.only)]
    settings = {"seed": options.seed, "test_per_class": options.test_per_class}
    content: dict[str, Any] = {
        "settings": settings,
        "severities": {kind: list(SEVERITIES[kind]) for kind in options.kinds},
        "runs": [],
    }
    if options.out.exists():
        before = read_json(options.out)
        if before["settings"] != settings:
            raise ValueError(
                f"{options.out} was made with {before['settings']}, not {settings}: give another --out"
            )
        content["runs"] = before["runs"]
        content["severities"] = before["severities"] | content["severities"]
    known = {(run["run"], run["weights"]): run for run in content["runs"]}
    levels = [(kind, level) for kind in options.kinds for level in SEVERITIES[kind]]
    accelerator = make_accelerator(options.machine)
    bar = Progress(
        TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeRemainingColumn(), console=console, transient=True, disable=not options.machine.progress,
    )  # fmt: skip
    with shared_shapes(), bar:
        task = bar.add_task("evaluations", total=len(runs) * len(levels))
        for number, run in enumerate(runs, 1):
            if (run["run"], run["weights"]) in known:
                entry = known[run["run"], run["weights"]]
            else:
                entry = {key: value for key, value in run.items() if key != "file"} | {"oa": {}}
                content["runs"].append(entry)
            wanted = [kind for kind in options.kinds if kind not in entry["oa"]]
            bar.advance(task, sum(len(SEVERITIES[kind]) for kind in options.kinds if kind not in wanted))
            if not wanted:
                continue
            forward, shapes = student_and_shapes(run["file"], options, accelerator.device)
            entry["shapes"] = len(shapes)
            clean: float | None = None
            for kind in wanted:
                if out_of_time(options.machine):
                    raise OutOfTime(f"{options.out} holds what was measured; the same command goes on")
                values = []
                for place, severity in enumerate(SEVERITIES[kind]):
                    if place == 0 and clean is not None:  # the shapes as they are, whatever the kind
                        values.append(clean)
                    else:
                        points = corrupted(shapes, kind, place, severity, options.seed)
                        values.append(measure(forward, points, shapes.labels, options.batch_size))
                    clean = values[0]
                    bar.advance(task)
                entry["oa"][kind] = values
                write(content, options)
            say(f"[{number}/{len(runs)}] {run['run']}: clean {clean:.2f}")
    write(content, options)
    plot = options.out.with_suffix(".png")
    save_robustness(curves(content), content["severities"], plot)
    say(f"{options.out}, {plot}")
    return content


def write(content: dict[str, Any], options: Robustness) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, content | {"environment": described_environment(options.machine.device)})


def find_students(folders: Sequence[Path], only: Sequence[str] = ()) -> list[Path]:
    """The files of students: those given, and those in the folders or below them."""
    found = []
    for folder in folders:
        own = folder if folder.is_file() else folder / "student.safetensors"
        below = sorted(folder.rglob("student.safetensors"))
        kept = (
            [own] if own.exists() else [p for p in below if not only or any(o in p.parent.name for o in only)]
        )
        if not kept:
            raise FileNotFoundError(
                f"no finished student in {folder} or below it"
                + (f" whose name contains {' or '.join(only)}" if only else "")
                + "; make one with pointcmt train or pointcmt ablate"
            )
        found += kept
    return list(dict.fromkeys(found))


def describe(file: Path) -> dict[str, Any]:
    """Names of a run, for the JSON and the legend; of a study's cell, those of the study."""
    results, folder = results_beside(file), file.resolve().parent
    teacher = ((run_config_beside(file) or {}).get("config") or {}).get("teacher", results.get("teacher"))
    named: dict[str, Any] = {
        "student": results.get("student", file.stem),
        "method": results.get("method", "none"),
        "teacher": None if teacher is None else Path(teacher).stem,
        "seed": results.get("seed", 0),
    }
    record = folder.parents[1] / "records" / f"{folder.name}.json" if len(folder.parents) > 1 else folder
    if record.is_file():
        named |= {key: read_json(record)[key] for key in named}
    return {
        "file": file,
        "run": folder.name if file.name == "student.safetensors" else file.stem,
        "weights": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        **named,
    }


def student_and_shapes(file: Path, options: Robustness, device: torch.device) -> tuple[Any, PointDataset]:
    """The student as points [B, N, 3] → logits on the device, and its test shapes."""
    model, adapter, _ = load_student(file, options.student)
    model.to(device)
    _, _, config = described(file)
    data: DataOptions = restore(DataOptions(), config["data"], f"{file}: data")
    if options.data is not None:
        data.data = options.data
    if options.test_per_class is not None:
        data.test_per_class = options.test_per_class
    data.view_points = None
    shapes = data.part("test")
    assert shapes is not None

    def forward(points: Tensor) -> Tensor:
        return adapter.logits(model(adapter.arrange(points.to(device)))).float().cpu()

    return forward, shapes


def corrupted(shapes: PointDataset, kind: str, place: int, severity: float, seed: int) -> Tensor:
    """All shapes [n, N, 3] at one severity, drawn on the CPU: the same on every device."""
    drawn = int(np.random.SeedSequence([seed, list(SEVERITIES).index(kind), place]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(drawn)
    points = torch.from_numpy(shapes.points)
    return corrupt(points, kind, severity, generator, up=shapes.up or "z")  # type: ignore[arg-type]


@torch.no_grad()
def measure(forward: Any, points: Tensor, labels: np.ndarray, batch_size: int) -> float:
    """OA in %."""
    predicted = torch.cat([forward(part).argmax(1) for part in points.split(batch_size)])
    return overall_accuracy(predicted.numpy(), labels)


def curves(content: dict[str, Any]) -> list[RobustnessCurve]:
    """Runs of one student, method and teacher as one curve: mean and standard deviation over the seeds."""
    groups: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {}
    for run in content["runs"]:
        groups.setdefault((run["student"], run["method"], run["teacher"]), []).append(run)
    several = len({teacher for *_, teacher in groups if teacher is not None}) > 1
    made = []
    for (student, method, teacher), runs in groups.items():
        mean, sd = {}, {}
        for kind in content["severities"]:
            values = np.array([run["oa"][kind] for run in runs if kind in run["oa"]])
            if len(values):
                mean[kind] = values.mean(0).tolist()
                sd[kind] = (values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])).tolist()
        name = f"{method} ({teacher})" if several and teacher is not None else method
        made.append(RobustnessCurve(student, name, method, mean, sd))
    return made
