"""Robustness curves: what is measured, that it is not measured twice, what is drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pointcmt.cli import main
from pointcmt.data import SEVERITIES, SyntheticShapes
from pointcmt.recipes.evaluate import load_student
from pointcmt.studies import robustness as recipe

TRAIN = [
    "train", "--method", "none", "--device", "cpu", "--no-tensorboard", "--no-progress", "--per-class", "3",
    "--test-per-class", "3", "--num-points", "64", "--holdout", "0", "--student", "pointnet2", "--width",
    "0.125", "--feature-dim", "16", "--epochs", "2", "--batch-size", "16", "--lr", "0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        assert main([*TRAIN, "--out", str(root / f"plain-{seed}"), "--seed", str(seed)]) == 0
    return root


def test_accuracy_at_each_severity_and_nothing_twice(runs, tmp_path, monkeypatch):
    out = tmp_path / "curves.json"
    command = ["robustness", str(runs), "--out", str(out), "--device", "cpu", "--no-progress", "--debug"]
    assert main([*command, "--kinds", "dropout", "rotation"]) == 0
    made = json.loads(out.read_text())
    assert [run["run"] for run in made["runs"]] == ["plain-0", "plain-1"]
    assert str(runs) not in out.read_text() and made["runs"][0]["shapes"] == 48
    for seed, run in enumerate(made["runs"]):
        results = json.loads((runs / f"plain-{seed}/results.json").read_text())
        assert run["oa"]["dropout"][0] == run["oa"]["rotation"][0] == results["last"]["test_oa"]
        assert [len(values) for values in run["oa"].values()] == [6, 6]
    # one value by hand: half turns lost to nothing but the corruption itself
    model, adapter, _ = load_student(runs / "plain-1")
    test = SyntheticShapes("test", 64, per_class=3)
    points = recipe.corrupted(test, "rotation", 5, 180.0, 0)
    with torch.no_grad():
        right = adapter.logits(model(points)).argmax(1).numpy() == test.labels
    assert made["runs"][1]["oa"]["rotation"][5] == pytest.approx(100 * right.mean())
    picture = imread(out.with_suffix(".png"))[..., :3]
    assert 0.002 < float((picture.min(-1) < 0.9).mean()) < 0.9

    # more kinds: those that are there stay
    asked = []
    original = recipe.corrupted
    monkeypatch.setattr(recipe, "corrupted", lambda *a: asked.append(a[1]) or original(*a))
    assert main([*command, "--kinds", "dropout", "scale"]) == 0
    again = json.loads(out.read_text())
    assert set(asked) == {"scale"} and set(again["severities"]) == {"dropout", "rotation", "scale"}
    assert again["runs"][0]["oa"]["dropout"] == made["runs"][0]["oa"]["dropout"]
    assert main([*command, "--seed", "1"]) == 1  # other draws: not in one file


def test_seeds_of_a_method_are_one_curve():
    def run(method, teacher, seed, values):
        return {
            "student": "net",
            "method": method,
            "teacher": teacher,
            "seed": seed,
            "oa": {"jitter": values},
        }

    content = {
        "severities": {"jitter": [0.0, 0.1]},
        "runs": [run("none", None, 0, [80.0, 60.0]), run("none", None, 1, [84.0, 50.0]),
                 run("FE", "few", 0, [85.0, 70.0]), run("FE", "all", 0, [86.0, 71.0])],
    }  # fmt: skip
    plain, few, _ = recipe.curves(content)
    assert (plain.name, plain.mean["jitter"]) == ("none", [82.0, 55.0])
    np.testing.assert_allclose(plain.sd["jitter"], [8**0.5, 50**0.5])
    assert few.name == "FE (few)" and few.sd["jitter"] == [0.0, 0.0]


def test_corruption_is_the_same_for_every_run_and_differs_by_kind_and_seed():
    shapes = SyntheticShapes("test", 32, per_class=1)
    one = recipe.corrupted(shapes, "jitter", 2, 0.02, 0)
    assert torch.equal(one, recipe.corrupted(shapes, "jitter", 2, 0.02, 0))
    assert not torch.equal(one, recipe.corrupted(shapes, "jitter", 2, 0.02, 1))
    assert torch.equal(recipe.corrupted(shapes, "scale", 0, SEVERITIES["scale"][0], 0),
                       torch.from_numpy(shapes.points))  # fmt: skip


def test_mistakes_are_explained(tmp_path, capsys):
    assert main(["robustness", str(tmp_path), "--kinds", "rain"]) == 1
    assert "--kinds rain: expected some of dropout" in capsys.readouterr().err
    assert main(["robustness", str(tmp_path)]) == 1
    assert "no finished student" in capsys.readouterr().err
    assert main(["robustness", str(tmp_path), "--out", "x.txt"]) == 1
    assert "expected the name of a .json file" in capsys.readouterr().err
