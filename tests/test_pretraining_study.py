"""benchmarks.pretraining: its plan, what it runs and keeps, and what its page says of the records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import pretraining
from benchmarks._harness import RESULTS
from pointcmt.adapters import register_adapter, unregister_adapter
from pointcmt.recipes.engine import MachineOptions
from pointcmt.studies.tables import paired_interval
from tests.pretraining_toys import adapter

CONFIG = Path(pretraining.__file__).parent / "configs" / "pretraining.yaml"
SMALL = {
    "about": "Mini\nA study of nothing.",
    "data": {"num_points": 32, "per_class": 3, "test_per_class": 2},
    "students": {"toy": {"student": "tests.pretraining_toys:made", "adapter": "toy"}},
    "pretrain": {
        "views": {"rig": "simpleview", "size": 16},
        "images": {"backbone": "simpleview_resnet", "backbone_options": ["layers=(1,1)", "stem_stride=2"]},
        "loop": {"epochs": 1, "batch_size": 16},
    },
    "methods": {"none": None, "CrossPoint": {"contrast": {"method": "crosspoint"}}},
    "measures": {
        "probe": {"kind": "probe", "c": [1.0], "folds": 2},
        "3-way": {"kind": "few-shot", "ways": [3], "shots": [1], "queries": 2, "runs": 2},
        "labels": {"kind": "train", "data": {"per_class": 2}, "loop": {"epochs": 1}},
    },
    "train": {"loop": {"lr": 1e-3}},
    "compare": [["CrossPoint", "none"]],
    "seeds": [0, 1],
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def test_the_plan_in_the_repository_is_one():
    plan = pretraining.read_plan(CONFIG)
    pieces = list(plan.pieces())
    assert plan.baseline == "none" and plan.seeds == [0, 1, 2]
    assert len(set(pieces)) == len(pieces)
    assert pretraining.Piece("pointnet2", "none", 0, pretraining.PRETRAIN) not in pieces
    assert pieces[0].seed == 0 and pieces[-1].seed == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": {"a": {"contrast": {"method": "crosspoint"}}}}, "exactly one that is null"),
        ({"measures": {"a": {"kind": "guess"}}}, "expected one of probe, few-shot, train"),
        ({"compare": [["none", "MM"]]}, "are not two of the methods none, CrossPoint"),
        (
            {"compare": [], "methods": {"none": None, "a": {"contrast": {"methods": 1}}}},
            "there is no option 'methods'",
        ),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        pretraining.read_plan(written(tmp_path, **changes))


def test_pieces_are_done_once_and_what_there_is_must_stay_as_it_was(tmp_path):
    register_adapter(adapter())
    try:
        plan, out = pretraining.read_plan(written(tmp_path)), tmp_path / "out"
        pieces = [piece for piece in plan.pieces() if piece.seed == 0]
        machine = MachineOptions(device="cpu", progress=False, tensorboard=False)
        pretraining.run(plan, pieces, out, machine)
    finally:
        unregister_adapter("toy")
    records = {p.stem: json.loads(p.read_text()) for p in (out / "records/toy/CrossPoint/0").iterdir()}
    assert records.keys() == {"pretrain", "probe", "3-way", "labels"}
    assert records["labels"]["initialised"] == 8 and 0 <= records["labels"]["value"] <= 100
    assert records["probe"]["protocol"]["train"] == 48 and records["pretrain"]["steps"] == 2
    scratch = json.loads((out / "records/toy/none/0/labels.json").read_text())
    assert scratch["initialised"] == 0 and not (out / "records/toy/none/0/pretrain.json").exists()
    assert not list(out.rglob("state.pt"))
    pretraining.run(plan, pieces, out, machine)  # nothing is left to do: without the adapter it would fail
    kept = json.loads((out / "plan.json").read_text())
    del kept["data"]["normals"], kept["students"]["toy"]["layout"]  # of a version that did not have them
    pretraining.write_json(out / "plan.json", kept)
    pretraining.run(plan, pieces, out, machine)
    other = pretraining.read_plan(written(tmp_path, train={"loop": {"lr": 1e-2}}))
    with pytest.raises(ValueError, match="a configuration with other train"):
        pretraining.run(other, pieces, out, machine)


def test_the_page_says_what_the_records_say(tmp_path):
    plan = pretraining.read_plan(written(tmp_path))
    pretraining.write_json(tmp_path / "plan.json", pretraining.resolved(plan))
    draw = np.random.default_rng(0)
    values = {"none": 50 + draw.normal(size=3), "CrossPoint": 53 + draw.normal(size=3)}
    environment = {"cores": 2, "processor": "A Processor"}

    def write(method: str, seed: int, measure: str, **more: object) -> None:
        path = tmp_path / "records/toy" / method / str(seed) / f"{measure}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"student": "toy", "method": method, "seed": seed, "measure": measure, **more}
        path.write_text(json.dumps({**record, "cpu_seconds": 120.0, "environment": environment}))

    for seed in range(3):
        write("CrossPoint", seed, "pretrain", steps=7)
        for method, found in values.items():
            write(method, seed, "probe", value=found[seed])
    page = pretraining.section(tmp_path)
    mean, half = paired_interval(values["CrossPoint"] - values["none"])
    none = values["none"]
    assert f"| none | – | {none.mean():.2f} ± {none.std(ddof=1):.2f} |" in page
    assert f"{mean:+.2f} ± {half:.2f}" in page and "| CrossPoint | 2.0 |" in page
    assert "9 records, 18 core-minutes" in page and "pre-training of 7 steps" in page
    which = "excludes" if abs(mean) > half else "includes"
    assert f"probe: CrossPoint, {mean:+.2f} ± {half:.2f} over `none`; the interval {which} zero." in page
    assert "as few as 3 of 2 seeds" not in page and "is not finished" not in page
    assert "labels" not in page.split("### toy")[1]  # no record, no column


def test_a_study_that_is_not_finished_says_so(tmp_path):
    plan = pretraining.read_plan(written(tmp_path))
    pretraining.write_json(tmp_path / "plan.json", pretraining.resolved(plan))
    for method, measure in (("none", "probe"), ("CrossPoint", "probe"), ("CrossPoint", "pretrain")):
        path = tmp_path / "records/toy" / method / "0" / f"{measure}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "student": "toy",
            "method": method,
            "seed": 0,
            "measure": measure,
            "value": 50.0,
            "steps": 7,
        }
        record |= {"cpu_seconds": 60.0, "environment": {"cores": 2, "processor": "A Processor"}}
        path.write_text(json.dumps(record))
    page = pretraining.section(tmp_path)
    assert "as few as 1 of 2 seeds" in page and "±" not in page.split("OA in %")[0]


def test_records_in_the_repository_are_of_the_plan():
    folder = RESULTS / "pretraining"
    if not (folder / "plan.json").exists():
        pytest.skip("no records of pre-training are kept yet")
    plan = pretraining.read_plan(CONFIG)
    kept = json.loads((folder / "plan.json").read_text())
    described = pretraining.resolved(plan)
    assert all(kept[name] == described[name] for name in ("data", "pretrain", "train"))
    known = {piece.path for piece in plan.pieces()}
    assert {p.relative_to(folder / "records") for p in (folder / "records").rglob("*.json")} <= known
