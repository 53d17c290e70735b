"""Does image supervision help networks for parts and scenes? ``python -m benchmarks.segmentation``

Cells of data × method × labels × seed: a network is pre-trained without labels (or not), then fine-tuned
with all labels or with about a tenth of them. Every finished cell is a record in
``benchmarks/results/segmentation``; begun again, the command goes on with the first cell that has none.
``--table`` writes the table of docs/segmentation.md from the records. All cells run in one process, on one
thread where OMP_NUM_THREADS=1 says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS, ROOT, put_between
from pointcmt.recipes.build import StudentOptions
from pointcmt.recipes.config import write_json
from pointcmt.recipes.engine import LoopOptions, MachineOptions
from pointcmt.recipes.options import DataOptions, ViewOptions, shared_shapes
from pointcmt.recipes.pretrain import ContrastOptions, EncoderOptions, Pretrain, pretrain
from pointcmt.recipes.progress import say
from pointcmt.recipes.run import described_environment
from pointcmt.recipes.segment import AugmentOptions, Segment, segment
from pointcmt.studies.tables import interval_text, markdown, mean_sd, paired_interval

RECORDS = RESULTS / "segmentation"
PAGE = ROOT / "docs" / "segmentation.md"
METHODS = ("scratch", "crosspoint", "mm-point", "pic-at-point", "dense")
WORDS = {
    "scratch": "from scratch",
    "crosspoint": "CrossPoint",
    "mm-point": "MM-Point",
    "pic-at-point": "Pic@Point",
    "dense": "dense distillation",
}


@dataclass(frozen=True)
class Setting:
    """A data set and how it is trained on.

    Attributes:
        folder: below ``--data``.
        words: for the table.
        student: the network.
        batch_size: of all labels.
        few: clouds of each class that make about a tenth of the labels.
        steps: of fine-tuning, the same with all labels and with few.
        pretrain_epochs: without labels.
        figure: what is compared.
    """

    folder: str
    words: str
    student: str
    batch_size: int
    few: int
    steps: int
    pretrain_epochs: int
    figure: str
    clouds: int
    """To train on."""
    classes: int
    views: int | None
    """Of a shape in a step of pre-training; None: as the method has it."""


SETTINGS = {
    "tables": Setting(
        "mosd_rgbd_segmentation",
        "tables seen by a depth camera (45 frames to train, real pictures), mIoU",
        "pointnet2_scene",
        9,
        5,
        100,
        20,
        "miou",
        45,
        1,
        1,
    ),
    "parts": Setting(
        "labeled_psb_parts",
        "labelled Princeton parts (285 shapes to train, pictures of their points), instance mIoU",
        "pointnet2_part",
        19,
        2,
        150,
        4,
        "instance_miou",
        285,
        19,
        None,
    ),
}
POINTS, WIDTH, SIZE = 256, 0.25, 96


def cells(seeds: int, names: list[str]) -> Iterator[tuple[str, int, str, str]]:
    """Data, seed, labels and method: whole comparisons of a set, one after the other."""
    for name in names:
        for seed in range(seeds):
            for labels in ("few", "all"):
                for method in METHODS:
                    yield name, seed, labels, method


def path_of(name: str, method: str, labels: str, seed: int) -> Path:
    return RECORDS / f"{name}-{method}-{labels}-{seed}.json"


def data_of(root: Path, setting: Setting) -> DataOptions:
    # the part labels' shapes stand on different axes; one is named, for the pictures' cameras
    return DataOptions(
        data=str(root / setting.folder), num_points=POINTS, holdout=0.0, data_up="y", normalize=None
    )


def pretrained(root: Path, work: Path, setting: Setting, name: str, method: str, seed: int) -> dict[str, Any]:
    """The folder of a pre-trained network and what it cost, made where it is not there."""
    out = work / f"pre-{name}-{method}-{seed}"
    cost = out / "cost.json"
    if cost.is_file():
        return {"folder": out, **json.loads(cost.read_text())}
    began = time.process_time()
    pretrain(
        Pretrain(
            out=out,
            student=StudentOptions(student=setting.student, width=WIDTH),
            contrast=ContrastOptions(
                method=method,  # type: ignore[arg-type]
                local_points=128,
                head_width=128,
                views_per_step=setting.views,
                image_levels=0,
                train_images="no",
            ),
            images=EncoderOptions(
                backbone="tf_efficientnet_lite0", pretrained=True, backbone_options=("output_stride=16",)
            ),
            data=data_of(root, setting),
            views=ViewOptions(rig="simpleview", size=SIZE, splat=1.5),
            watch_shapes=16,
            loop=LoopOptions(
                epochs=setting.pretrain_epochs,
                batch_size=setting.batch_size,
                optimizer="adam",
                lr=1e-3,
                weight_decay=1e-6,
                seed=seed,
                eval_every=setting.pretrain_epochs,
            ),
            machine=MachineOptions(device="cpu", tensorboard=False, progress=False),
            resume=True,
        )
    )
    spent = {"core_minutes": round((time.process_time() - began) / 60, 3)}
    write_json(cost, spent)
    return {"folder": out, **spent}


def run_cell(root: Path, work: Path, name: str, method: str, labels: str, seed: int) -> None:
    setting = SETTINGS[name]
    before = None if method == "scratch" else pretrained(root, work, setting, name, method, seed)
    began = time.process_time()
    data = data_of(root, setting)
    batch, clouds = setting.batch_size, setting.clouds
    if labels == "few":
        data.per_class, data.data_seed = setting.few, seed
        clouds = setting.few * setting.classes
        batch = min(batch, clouds)
    epochs = max(1, setting.steps // (clouds // batch))
    results = segment(
        Segment(
            out=work / f"{name}-{method}-{labels}-{seed}",
            student=StudentOptions(student=setting.student, width=WIDTH),
            data=data,
            inputs=("points",),
            init=None if before is None else before["folder"],
            augment=AugmentOptions(augment_rotate=False),
            loop=LoopOptions(
                epochs=epochs, batch_size=batch, weight_decay=1e-4, seed=seed, eval_every=epochs
            ),
            machine=MachineOptions(device="cpu", tensorboard=False, progress=False),
            resume=True,
        )
    )
    write_json(
        path_of(name, method, labels, seed),
        {
            "data": name,
            "method": method,
            "labels": labels,
            "seed": seed,
            "figure": setting.figure,
            "value": results["test"][setting.figure],
            "test": results["test"],
            "clouds": results["clouds"],
            "epochs": epochs,
            "student": setting.student,
            "width": WIDTH,
            "parameters": results["parameters"],
            "points": POINTS,
            "core_minutes": round((time.process_time() - began) / 60, 3),
            "core_minutes_pretraining": None if before is None else before["core_minutes"],
            "environment": described_environment("cpu"),
        },
    )
    say(f"{name} {method} {labels} {seed}: {results['test'][setting.figure]:.2f}")


# ---- the table


def records() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]


def table(found: list[dict[str, Any]]) -> str:
    """All cells as a table for each data set: means over seeds, and paired differences to scratch."""
    parts = []
    for name, setting in SETTINGS.items():
        mine = [record for record in found if record["data"] == name]
        if not mine:
            continue
        values = {(r["method"], r["labels"], r["seed"]): r["value"] for r in mine}
        lines = []
        for method in METHODS:
            line = [WORDS[method]]
            for labels in ("all", "few"):
                own = {s: v for (m, k, s), v in values.items() if (m, k) == (method, labels)}
                line.append(mean_sd(list(own.values())) if own else "–")
                pairs = [
                    own[s] - values["scratch", labels, s] for s in own if ("scratch", labels, s) in values
                ]
                if method == "scratch" or not pairs:
                    line.append("")
                elif len(pairs) == 1:
                    line.append(f"{pairs[0]:+.2f}, one seed")
                else:
                    line.append(interval_text(paired_interval(np.array(pairs))))
            lines.append(line)
        cells_of = [(r["method"], r["labels"]) for r in mine]
        seeds = max(map(cells_of.count, cells_of))
        done = f"{len(mine)} of {2 * 3 * len(METHODS)} cells, {seeds} seed(s) at most"
        clouds = {r["labels"]: r["clouds"]["train"] for r in mine}
        headings = [
            "",
            f"all labels ({clouds.get('all', '–')})",
            "difference",
            f"few ({clouds.get('few', '–')})",
            "difference ",
        ]
        first = mine[0]
        cost = sum(r["core_minutes"] for r in mine)
        before = {(r["method"], r["seed"]): r["core_minutes_pretraining"] or 0 for r in mine}
        machine = first["environment"]
        parts.append(
            f"**{setting.words[0].upper()}{setting.words[1:]}**: {first['student']} at width "
            f"{first['width']} "
            f"({first['parameters']} parameters), {first['points']} points without colours, {setting.steps} "
            f"steps "
            f"of fine-tuning whatever the labels, last epoch; {done}.\n\n"
            + markdown(headings, lines).rstrip()
            + f"\n\nCost: {cost:.1f} core-minutes of fine-tuning and {sum(before.values()):.1f} of "
            f"pre-training ({machine['processor']}, {machine['threads']} thread(s); torch "
            f"{machine['versions']['torch']})."
        )
    return "\n\n".join(parts) if parts else "There are no records yet."


def write_table() -> None:
    put_between(PAGE, "study", table(records()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with mosd_rgbd_segmentation and labeled_psb_parts")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "segmentation", help="folder of the runs"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(SETTINGS), nargs="*", default=sorted(SETTINGS, reverse=True))
    parser.add_argument("--table", action="store_true", help="only write the table of docs/segmentation.md")
    given = parser.parse_args()
    if given.table:
        write_table()
        return 0
    if given.data is None:
        parser.error("give --data FOLDER")
    RECORDS.mkdir(parents=True, exist_ok=True)
    with shared_shapes():
        for name, seed, labels, method in cells(given.seeds, given.only):
            if not path_of(name, method, labels, seed).exists():
                run_cell(given.data, given.work, name, method, labels, seed)
    write_table()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
