"""The three stages, evaluation and demo, through the command line, at the smallest size that is one."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pointcmt.checkpoint import read_about, read_config
from pointcmt.cli import main
from pointcmt.data import FeatureCache, SyntheticShapes
from pointcmt.recipes import build
from pointcmt.recipes import train as stage3
from pointcmt.recipes.evaluate import Evaluate, evaluate, load_student
from pointcmt.recipes.features import Draws
from pointcmt.recipes.options import DataOptions, views_of_teacher
from pointcmt.recipes.run import read_metrics
from pointcmt.recipes.train import who_is_right
from pointcmt.students import registry
from pointcmt.students.registry import register_student
from pointcmt.tasks.metrics import class_accuracies, overall_accuracy, scores
from pointcmt.teacher import ImageTeacher
from pointcmt.training import CrossModalTraining

CPU = ["--device", "cpu", "--no-tensorboard", "--no-progress"]
DATA = ["--per-class", "4", "--test-per-class", "2", "--num-points", "64", "--holdout", "0.25"]
SMALL = ["--student", "pointnet2", "--width", "0.125", "--epochs", "2", "--batch-size", "16"]


def run(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    assert main([*words, "--debug"]) == 0, words


def read(folder: Path, name: str = "results.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """Run folders of a teacher, a generator, a plain and a PointCMT student, made by the commands."""
    root = tmp_path_factory.mktemp("stages")
    run(
        "train-teacher",
        "--out",
        root / "teacher",
        *DATA,
        *CPU,
        "--size",
        16,
        "--epochs",
        2,
        "--accumulate",
        1,
        "--feature-dim",
        32,
        "--backbone-options",
        "layers=(1,1)",
        "stem_stride=2",
        "--view-dropout",
        0.5,
        "--average",
        0.9,
    )
    run(
        "train-generator",
        "--out",
        root / "generator",
        "--teacher",
        root / "teacher",
        *DATA,
        *CPU,
        "--epochs",
        2,
        "--generator-points",
        48,
    )
    run("train", "--out", root / "plain", "--method", "none", *DATA, *CPU, *SMALL, "--feature-dim", 32)
    run("train", "--out", root / "pointcmt", *taught(root), *DATA, *CPU, *SMALL, "--guard", "none")
    return root


def taught(root: Path) -> list:
    return ["--teacher", root / "teacher", "--generator", root / "generator"]


def test_run_folders_hold_what_they_should(stages):
    common = {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "results.json",
        "state.pt",
        "last.safetensors",
        "best.safetensors",
    }
    own = {
        "teacher": {"teacher.safetensors", "views.png", "shapes.json"},
        "generator": {"generator.safetensors", "generated.png"},
        "plain": {"student.safetensors", "shapes.json"},
        "pointcmt": {"student.safetensors", "shapes.json"},
    }
    for name, files in own.items():
        there = {file.name for file in (stages / name).iterdir() if not file.is_dir()}
        assert there == common | files
        assert [r["epoch"] for r in read_metrics(stages / name)] == [1, 2]
    record = read_metrics(stages / "pointcmt")[-1]
    assert {"loss", "task", "feature_enhancement", "classifier_enhancement", "heldout_oa", "test_oa"} <= set(
        record
    )
    results = read(stages / "pointcmt")
    assert results["last"]["epoch"] == 2 and results["method"] == "pointcmt"
    assert results["best"]["chosen_by"] == "accuracy on the held-out part of the training set"
    assert results["shapes"] == {"train": 48, "heldout": 16, "test": 32}
    assert results["teacher_check"]["heldout"] == 16
    assert read(stages / "pointcmt", "config.json")["inputs"].keys() == {"data", "teacher", "generator"}


def test_both_students_are_the_same_network(stages):
    plain, pointcmt = (read(stages / name)["parameters"] for name in ("plain", "pointcmt"))
    assert plain == pointcmt
    a, b = (load_file(stages / name / "student.safetensors") for name in ("plain", "pointcmt"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    assert not torch.equal(a["fc1.weight"], b["fc1.weight"])  # but another training


def test_the_numbers_are_those_of_the_checkpoint(stages):
    """Accuracy in results.json, counted again by hand from the saved student."""
    model, adapter, config = load_student(stages / "pointcmt")
    test = SyntheticShapes("test", 64, per_class=2)
    assert config["classes"] == test.class_names
    with torch.no_grad():
        predicted = adapter.logits(model(torch.from_numpy(test.points))).argmax(1).numpy()
    right = predicted == test.labels
    assert read(stages / "pointcmt")["last"]["test_oa"] == pytest.approx(100 * right.mean())
    per_class = [right[test.labels == label].mean() for label in range(16)]
    assert read(stages / "pointcmt")["last"]["test_macc"] == pytest.approx(100 * np.mean(per_class))


def test_evaluate_agrees_and_votes(stages, tmp_path):
    for name in ("teacher", "pointcmt"):
        run("evaluate", stages / name, "--device", "cpu", "--json", tmp_path / f"{name}.json")
        measured = json.loads((tmp_path / f"{name}.json").read_text())
        assert measured["oa"] == pytest.approx(read(stages / name)["last"]["test_oa"])
        assert measured["shapes"] == 32 and len(measured["classes"]) == 16
    run("evaluate", stages / "plain", "--votes", 3, "--checkpoint", "best", "--json", tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text())["votes"] == 3


def test_held_out_shapes_are_never_trained_on(stages):
    shapes = read(stages / "teacher", "shapes.json")
    assert shapes == read(stages / "pointcmt", "shapes.json")
    assert not set(shapes["train"]) & set(shapes["heldout"]) and len(shapes["heldout"]) == 16


def test_a_student_that_is_interrupted_and_resumed_is_the_same(stages, tmp_path, monkeypatch):
    steps = {"left": 4}  # three steps an epoch: in the second epoch
    original = stage3.taught_step

    def stumbling(*arguments):
        step = original(*arguments)

        def stumble(*inputs):
            steps["left"] -= 1
            if steps["left"] < 0:
                raise KeyboardInterrupt
            return step(*inputs)

        return stumble

    monkeypatch.setattr(stage3, "taught_step", stumbling)
    command = [
        "train",
        "--out",
        str(tmp_path / "r"),
        *map(str, taught(stages)),
        *DATA,
        *CPU,
        *SMALL,
        "--guard",
        "none",
    ]
    assert main(command) == 130
    monkeypatch.undo()
    assert not (tmp_path / "r/results.json").exists()
    assert main(command) == 1  # not without --resume
    run(*command, "--resume")
    whole, resumed = read(stages / "pointcmt"), read(tmp_path / "r")
    assert whole["last"] == resumed["last"] and whole["best"] == resumed["best"]
    a, b = (load_file(f / "student.safetensors") for f in (stages / "pointcmt", tmp_path / "r"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    # a finished run is told, not repeated
    run(*command, "--resume")
    assert main([*command, "--resume", "--lr", "0.5"]) == 1


def test_mistakes_between_stages_are_explained(stages, tmp_path, capsys):
    def fails(*arguments):
        assert main([str(a) for a in arguments]) == 1
        return capsys.readouterr().err

    new = ["train", "--out", tmp_path / "r", *taught(stages), *CPU]
    assert "feature" in fails(*new, *DATA, *SMALL, "--feature-dim", 48)
    shutil.rmtree(tmp_path / "r")
    # features of other shapes under the name of these
    broken = tmp_path / "features"
    shutil.copytree(stages / "teacher/features", broken)
    [test, train] = [next(broken.glob(f"{part}-*")) for part in ("test", "train")]
    shutil.copy(test, train)
    again = ["cache-features", "--teacher", stages / "teacher", "--out", broken, *DATA, "--device", "cpu"]
    with pytest.warns(UserWarning, match="stale"):
        assert main([str(a) for a in again]) == 0
    right = next((stages / "teacher/features").glob(train.name))
    assert load_file(train)["feature"].equal(load_file(right)["feature"]), "what is stale is made anew"
    assert "--objectives warmth" in fails(*new, *DATA, *SMALL, "--objectives", "warmth=1")
    (tmp_path / "lone").mkdir()
    shutil.copy(stages / "teacher/teacher.safetensors", tmp_path / "lone")
    run("cache-features", "--teacher", tmp_path / "lone", *DATA)  # the file alone is enough


def test_features_that_are_there_are_opened_once_and_what_a_kill_left_beside_them_goes(
    stages, tmp_path, monkeypatch
):
    """Killed between the name of the finished file and the end of the folder of its pieces."""
    there = shutil.copytree(stages / "teacher/features", tmp_path / "features")
    whole = sorted(path.name for path in there.iterdir())
    for file in list(there.iterdir()):
        (there / f"{file.name}.partial").mkdir()
        (there / f".{file.name}.lock").touch()
    opened = []
    real = FeatureCache.open.__func__  # type: ignore[attr-defined]
    counted = classmethod(lambda cls, path, **more: opened.append(path) or real(cls, path, **more))
    monkeypatch.setattr(FeatureCache, "open", counted)
    run("cache-features", "--teacher", stages / "teacher", "--out", there, *DATA, "--device", "cpu")
    assert sorted(path.name for path in there.iterdir()) == whole
    assert sorted(path.name for path in opened) == whole


def test_a_checkpoint_alone_is_enough(stages, tmp_path):
    """Without its run folder: for every recipe that takes a teacher, and for what judges a student."""
    lone = tmp_path / "files"
    lone.mkdir()
    for name in ("teacher", "generator"):
        shutil.copy(stages / name / f"{name}.safetensors", lone)
    shutil.copy(stages / "pointcmt/student.safetensors", lone / "mine.safetensors")
    teacher = lone / "teacher.safetensors"
    run("cache-features", "--teacher", teacher, *DATA)
    run("train-generator", "--out", tmp_path / "g", "--teacher", teacher, *DATA, *CPU, "--epochs", 1)
    command = ["--teacher", teacher, "--generator", lone / "generator.safetensors", *DATA, *CPU, *SMALL]
    run("train", "--out", tmp_path / "s", *command, "--guard", "none")
    whole, again = read(stages / "pointcmt"), read(tmp_path / "s")
    assert again["last"] == whole["last"] and again["teacher_check"] == whole["teacher_check"]
    for name, file in (("teacher", teacher), ("pointcmt", lone / "mine.safetensors")):
        run("evaluate", file, "--device", "cpu", "--json", tmp_path / "e.json")
        assert json.loads((tmp_path / "e.json").read_text())["oa"] == read(stages / name)["last"]["test_oa"]
    curves = tmp_path / "curves.json"
    run("robustness", lone / "mine.safetensors", "--out", curves, "--kinds", "jitter", "--no-progress")
    [entry] = json.loads(curves.read_text())["runs"]
    assert entry["oa"]["jitter"][0] == whole["last"]["test_oa"]
    assert (entry["run"], entry["method"], entry["teacher"]) == ("mine", "pointcmt", "teacher")
    # which shapes it was trained on is in the file too: they are not taken for held out
    run("train", "--out", tmp_path / "x", *command, "--guard", "none", "--epochs", 1, "--holdout", 0.5)
    assert "was trained on" in read(tmp_path / "x")["teacher_check"]["verdict"]
    with pytest.raises(ValueError, match="holds a generator: only teachers and students"):
        evaluate(Evaluate(lone / "generator.safetensors"))


def test_a_teacher_is_called_weaker_where_it_is_no_chance():
    student = np.arange(16) < 11
    found = who_is_right(np.arange(16) < 9, student)  # two shapes of sixteen: a coin would do that
    assert not found["weaker"] and "may hurt" not in found["verdict"] and "within chance" in found["verdict"]
    assert (found["teacher_oa"], found["student_oa"]) == (56.25, 68.75)
    found = who_is_right(np.arange(16) < 3, student)
    assert (
        found["weaker"]
        and "beyond chance" in found["verdict"]
        and "Train a better teacher" in found["verdict"]
    )
    assert not who_is_right(student, np.arange(16) < 3)["weaker"]


def test_a_file_of_an_older_version_still_loads(stages, tmp_path, capsys):
    """It had no more than the configuration; the run folder said the rest."""
    for name, kind in (("teacher", "teacher"), ("pointcmt", "student")):
        shutil.copytree(stages / name, tmp_path / name)
        file = tmp_path / name / f"{kind}.safetensors"
        metadata = {"kind": kind, "config": json.dumps(read_config(file, kind)), "pointcmt": "0.1"}
        save_file(load_file(file), file, metadata=metadata)
        run("evaluate", tmp_path / name, "--json", tmp_path / "e.json")
        assert json.loads((tmp_path / "e.json").read_text())["oa"] == read(stages / name)["last"]["test_oa"]
    command = ["train", "--teacher", tmp_path / "teacher", *DATA, *CPU, *SMALL, "--fe-weight", 0]
    run(*command, "--out", tmp_path / "s", "--guard", "none")
    assert read(tmp_path / "s")["teacher_check"]["heldout"] == 16
    (tmp_path / "pointcmt/config.json").unlink()
    assert main(["evaluate", str(tmp_path / "pointcmt")]) == 1
    assert "keep config.json of its run beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"student": "os:system", "student_options": ["command=touch MARK"]},
            "code of a module that you",
        ),
        ({"student": "subprocess:call"}, "--student subprocess:call"),
        ({"student": "nobody"}, "the student 'nobody', which is not known here"),
        ({"student_options": ["npoints=(900000000,)"]}, "expected a number below a million"),
        ({"width": 1000.0}, "far larger than the weights in the file"),
        ({"width": "wide"}, "student.width is 'wide'; expected a number"),
    ],
)
def test_a_student_s_file_runs_no_code(options, words, stages, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = stages / "plain/student.safetensors"
    config = read_config(source, "student")
    config["student"] = {**config["student"], **options}
    metadata = {"kind": "student", "config": json.dumps(config), "about": json.dumps(read_about(source))}
    save_file(load_file(source), tmp_path / "s.safetensors", metadata=metadata)
    for command in ("evaluate", "robustness"):
        assert main([command, str(tmp_path / "s.safetensors"), "--no-progress"]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "MARK").exists()


def test_one_file_brings_a_network_and_an_objective(stages, tmp_path, capsys, monkeypatch):
    """Listed, trained with, saved and evaluated without an edit elsewhere."""
    mine = tmp_path / "brought.py"
    mine.write_text(
        "from torch import nn\n"
        "from pointcmt.objectives import Objective\n"
        "from pointcmt.students.registry import register_student\n"
        "@register_student('tiny')\n"
        "class Tiny(nn.Module):\n"
        "    def __init__(self, num_classes, feature_dim=8):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(3, feature_dim), nn.Linear(feature_dim, num_classes)\n"
        "    def forward(self, points):\n"
        "        return self.b(self.a(points).relu().amax(1))\n"
        "class Cosine(Objective):\n"
        "    default_name = 'cosine_distance'\n"
        "    def forward(self, student, teacher):\n"
        "        return 1 - nn.functional.cosine_similarity(student.feature, teacher.feature).mean()\n"
    )
    try:
        assert main(["doctor", "--import", str(mine)]) in (0, 1)
        printed = capsys.readouterr().out
        assert "tiny" in printed and "cosine_distance" in printed and "pointnet2" in printed
        run(
            "train", "--import", mine, "--out", tmp_path / "r", "--student", "tiny", "--teacher",
            stages / "teacher", "--fe-weight", 0, "--ce-weight", 0, "--objectives", "cosine_distance=2",
            *DATA, *CPU, "--epochs", 1,
        )  # fmt: skip
        results = read(tmp_path / "r")
        assert results["student"] == "tiny" and results["method"] == "cosine_distance"
        assert 0 < read_metrics(tmp_path / "r")[0]["cosine_distance"] < 2
        run("evaluate", tmp_path / "r", f"--import={mine}", "--json", tmp_path / "e.json")
        assert json.loads((tmp_path / "e.json").read_text())["oa"] == results["last"]["test_oa"]
        with pytest.raises(ValueError, match="there is a student 'tiny' already"):
            register_student("tiny")(nn.Linear)
        assert main(["evaluate", str(tmp_path / "r"), "--import", str(tmp_path / "nothing.py")]) == 1
        assert "cannot import" in capsys.readouterr().err
    finally:
        monkeypatch.setattr(build, "IMPORTED", [])
        registry._registered.pop("tiny", None)
        sys.modules.pop("brought", None)
    gc.collect()
    assert main(["evaluate", str(tmp_path / "r")]) == 1
    assert "the student 'tiny', which is not known here" in capsys.readouterr().err


@pytest.mark.parametrize("given", [True, False])
def test_a_network_that_takes_channels_first(given, tmp_path, monkeypatch, capsys):
    """Case 4: (log-probabilities, None) is trained by the command; Case 5: its layout is tried or given."""
    (tmp_path / "channels_first.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, channels=3):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv1d(channels, 8, 1), nn.Linear(8, num_classes)\n"
        "    def forward(self, points):\n"
        "        return nn.functional.log_softmax(self.b(self.a(points).relu().amax(2)), -1), None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "IMPORTED", [])
    command = ["train", "--out", tmp_path / "r", "--method", "none", "--student", "channels_first:Net", *CPU]
    run(*command, *DATA, "--epochs", 1, *(["--layout", "B3N"] if given else []))
    run("evaluate", tmp_path / "r", "--json", tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["oa"] == read(tmp_path / "r")["last"]["test_oa"]
    command = [str(word) for word in [*command, *DATA, "--resume"]]
    command[2] = str(tmp_path / "six")
    assert main([*command, "--student-options", "channels=6"]) == 1
    said = capsys.readouterr().err
    assert (
        "in no known layout. BN3: " in said and "B3N: " in said and "pos_x: " in said and "--layout" in said
    )
    assert main([*command, "--layout", "3BN"]) == 1
    assert "--layout 3BN: expected one of BN3, B3N, pos_x" in capsys.readouterr().err


def test_no_step_waits_for_the_device_to_read_a_loss(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(
        CrossModalTraining, "losses", property(lambda _: pytest.fail("reading .losses waits for the device"))
    )
    run("train", "--out", tmp_path / "r", *taught(stages), *DATA, *CPU, *SMALL, "--epochs", 1)
    assert read_metrics(tmp_path / "r")[0]["feature_enhancement"] > 0


def test_a_teacher_that_saw_the_held_out_shapes_is_not_compared(stages, tmp_path, capsys):
    run(
        "train",
        "--out",
        tmp_path / "r",
        *taught(stages),
        *CPU,
        *SMALL,
        *DATA,
        "--holdout",
        0.5,
        "--fe-weight",
        0,
        "--objectives",
        "soft_labels=1",
        "--epochs",
        1,
    )
    assert read(tmp_path / "r")["teacher_check"]["heldout"] is None
    assert "the teacher was trained on" in capsys.readouterr().out
    assert read(tmp_path / "r")["method"] == "ce+soft_labels"


def test_without_a_held_out_part_the_best_epoch_is_called_what_it_is(tmp_path):
    run(
        "train",
        "--out",
        tmp_path / "r",
        "--method",
        "none",
        *CPU,
        *SMALL,
        *DATA,
        "--holdout",
        0,
        "--epochs",
        1,
    )
    assert "selects on the test set" in read(tmp_path / "r")["best"]["chosen_by"]


def test_a_network_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "network_of_ones_own.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, hidden=8):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(3, hidden), nn.Linear(hidden, num_classes)\n"
        "    def forward(self, points):\n"
        "        return self.b(self.a(points).relu().amax(1))\n"
    )
    monkeypatch.chdir(tmp_path)
    run(
        "train",
        "--out",
        tmp_path / "r",
        "--method",
        "none",
        "--student",
        "network_of_ones_own:Net",
        "--student-options",
        "hidden=12",
        *CPU,
        *DATA,
        "--epochs",
        1,
    )
    assert read(tmp_path / "r")["adapter"] == "generic"
    assert load_file(tmp_path / "r/student.safetensors")["a.weight"].shape == (12, 3)
    assert main(["evaluate", str(tmp_path / "r")]) == 0  # the user's own process named that module
    monkeypatch.setattr(build, "IMPORTED", [])
    assert main(["evaluate", str(tmp_path / "r")]) == 1
    assert "--student network_of_ones_own:Net" in capsys.readouterr().err
    run("evaluate", tmp_path / "r", "--student", "network_of_ones_own:Net")


def test_the_guard_silences_a_teacher_that_knows_no_more(stages, tmp_path, monkeypatch):
    """The teacher's accuracy is made to be what the student's is not: below, then above."""
    for accuracy, expected in ((0.0, 0.0), (1.0, 1.0)):
        folder = tmp_path / str(accuracy)
        monkeypatch.setattr(stage3, "teacher_accuracy", lambda *_, value=accuracy: value)
        command = ["train", "--out", folder, *taught(stages), *DATA, *CPU, *SMALL, "--epochs", 3]
        run(*command)
        factors = [record["guard"] for record in read_metrics(folder)]
        assert factors == [1.0, expected, expected]
        assert ("feature_enhancement" in read_metrics(folder)[2]) == bool(expected)


def test_with_draws_the_teacher_sees_what_the_student_sees(stages, tmp_path, monkeypatch):
    """Features of a batch are those of views of its very points; the copies are one for all runs."""
    seen = []
    take = Draws.take

    def watched(self, points, index):
        made = take(self, points, index)
        seen.append((self, points, index, *made))
        return made

    monkeypatch.setattr(Draws, "take", watched)
    command = ["train", *taught(stages), *DATA, *CPU, *SMALL, "--guard", "none", "--draws", 3]
    run(*command, "--out", tmp_path / "a")
    first = len(seen)
    run(*command, "--out", tmp_path / "b", "--seed", 5)
    teacher = ImageTeacher.load(stages / "teacher/teacher.safetensors").eval()
    spec = views_of_teacher(stages / "teacher/teacher.safetensors")
    assert first == len(seen) - first > 0 and torch.equal(seen[0][0].factors, seen[-1][0].factors)
    assert len({tuple(draws.factors[:, 0].flatten().tolist()) for draws, *_ in seen}) == 1
    for draws, points, index, changed, feature in seen[:2]:
        assert not torch.equal(points, changed)
        for row in range(len(index)):
            # the copy is the one that carries the points to the changed ones, in any order
            moved = points[row] * draws.factors[:, index[row]] + draws.shifts[:, index[row]]
            off = torch.cdist(
                moved, changed[row].expand_as(moved), compute_mode="donot_use_mm_for_euclid_dist"
            )
            [copy] = (off.amin(2).amax(1) < 1e-4).nonzero().flatten().tolist()
            assert torch.equal(feature[row], draws.features[copy, index[row]])
    # the data has as many view points as the clouds have, so that the views can be made again
    draws, points, index, changed, feature = seen[0]
    whole = (
        DataOptions(per_class=4, test_per_class=2, num_points=64, holdout=0.25)
        .load()
        .train.view_points[index.numpy()]
    )
    copies = (draws.features[:, index] == feature).all(-1).float().argmax(0)
    views = spec.project(torch.from_numpy(whole) * draws.factors[copies, index] + draws.shifts[copies, index])
    torch.testing.assert_close(teacher.encode(views).detach(), feature, atol=1e-5, rtol=1e-4)
    assert main([*map(str, command), "--out", str(tmp_path / "c"), "--images", str(tmp_path)]) == 1
    assert main([*map(str, command[:-1]), "-1", "--out", str(tmp_path / "d")]) == 1


def test_weights_over_the_run():
    assert [stage3.factor("constant", done, 0.5) for done in (0, 0.49, 0.5, 1)] == [1, 1, 0, 0]
    assert [stage3.factor("linear", done) for done in (0, 0.25, 1)] == [1, 0.75, 0]
    assert stage3.factor("cosine", 0.25, 0.5) == pytest.approx(0.5)


def test_accuracies_against_counting():
    rng = np.random.default_rng(5)
    logits, labels = rng.normal(size=(200, 5)), rng.integers(0, 4, 200)  # the last class has no shape
    predicted = logits.argmax(1)
    right = [(predicted == labels)[labels == k] for k in range(4)]
    assert overall_accuracy(predicted, labels) == pytest.approx(100 * np.concatenate(right).mean())
    np.testing.assert_allclose(
        class_accuracies(predicted, labels, 5), [*(100 * r.mean() for r in right), np.nan]
    )
    assert scores(logits, labels, "x")["x_macc"] == pytest.approx(100 * np.mean([r.mean() for r in right]))


@pytest.mark.slow
def test_the_demo_ends_with_table_and_report(tmp_path, capsys):
    run(
        "demo",
        "--out",
        tmp_path,
        "--seeds",
        2,
        "--first-seed",
        7,
        *DATA,
        "--per-class",
        8,
        "--labels-per-class",
        4,
        "--view-points",
        64,
        "--size",
        16,
        "--teacher-epochs",
        1,
        "--epochs",
        1,
        "--width",
        0.125,
        "--feature-dim",
        32,
        *CPU,
    )
    printed = capsys.readouterr().out
    gained = [
        read(tmp_path / f"taught-{seed}")["last"]["test_oa"]
        - read(tmp_path / f"plain-{seed}")["last"]["test_oa"]
        for seed in (7, 8)
    ]
    half = 12.706 * abs(gained[0] - gained[1]) / 2  # Student's t of one degree of freedom
    assert f"taught minus plain, last epoch: {np.mean(gained):+.1f} ± {half:.1f} points" in printed
    for words in ("image teacher", "plain student", "taught student", "report: "):
        assert words in printed
    assert (tmp_path / "report.html").stat().st_size > 50_000
    for name in ("plain-7", "taught-8"):
        assert read(tmp_path / name)["milliseconds_per_cloud"] > 0
    # the teacher learns from the labels that the students have, and from no others
    for name in ("teacher", "plain-7", "taught-7"):
        assert read(tmp_path / name)["shapes"]["train"] == 48
    assert read(tmp_path / "taught-7")["shapes"]["unlabelled"] == 16 * 4
    assert read(tmp_path / "taught-7")["teacher_check"]["heldout"] == 16


@pytest.mark.slow
def test_all_stages_on_real_modelnet40(modelnet40_root, tmp_path):
    data = [
        "--data",
        modelnet40_root,
        "--num-points",
        128,
        "--view-points",
        512,
        "--per-class",
        3,
        "--test-per-class",
        1,
        "--holdout",
        0.3,
    ]
    run(
        "train-teacher",
        "--out",
        tmp_path / "teacher",
        *data,
        *CPU,
        "--size",
        24,
        "--epochs",
        1,
        "--accumulate",
        1,
        "--feature-dim",
        32,
        "--backbone-options",
        "layers=(1,1)",
        "stem_stride=2",
    )
    run(
        "train-generator",
        "--out",
        tmp_path / "generator",
        "--teacher",
        tmp_path / "teacher",
        *data,
        *CPU,
        "--epochs",
        1,
    )
    student = ["--student", "pointnet2", "--width", "0.125", "--epochs", 1, "--feature-dim", 32]
    run("train", "--out", tmp_path / "plain", "--method", "none", *data, *CPU, *student)
    run("train", "--out", tmp_path / "pointcmt", *taught(tmp_path), *data, *CPU, *student)
    run("report", tmp_path)
    results = read(tmp_path / "pointcmt")
    assert results["shapes"] == {"train": 80, "heldout": 40, "test": 40} and len(results["classes"]) == 40
    assert 0 <= results["last"]["test_oa"] <= 100 and (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_two_processes_train_one_student(stages, tmp_path):
    """Gradients and metrics are joined: both processes end with one model, whose accuracy is that on all
    shapes."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    arguments = ["train", "--out", tmp_path / "r", *taught(stages), *DATA, *CPU, *SMALL, "--guard", "none"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "--module", "pointcmt", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "r", "environment.json")["processes"] == 2
    assert [r["epoch"] for r in read_metrics(tmp_path / "r")] == [1, 2]
    run("evaluate", tmp_path / "r", "--json", tmp_path / "e.json", "--device", "cpu")
    assert json.loads((tmp_path / "e.json").read_text())["oa"] == read(tmp_path / "r")["last"]["test_oa"]
    # one process sees the same shapes in each step: losses differ by batch statistics and dropout only
    one, two = (read_metrics(f)[0]["classifier_enhancement"] for f in (stages / "pointcmt", tmp_path / "r"))
    assert two == pytest.approx(one / 2, rel=0.5)


def test_synthetic_shapes_that_are_held_out_are_so_from_more_shapes_too():
    """A teacher of more shapes of a class has not seen what a student of few is measured on."""
    few, many = (DataOptions(per_class=count, test_per_class=1, num_points=16).load() for count in (10, 40))
    assert few.heldout is not None and many.heldout is not None
    assert set(few.heldout.shape_ids) <= set(many.heldout.shape_ids)
    assert not set(few.heldout.shape_ids) & set(many.train.shape_ids)
    assert len(few.heldout) == 16 and len(many.heldout) == 64 and len(few.train) == 144
    assert set(few.train.labels) == set(few.heldout.labels) == set(range(16))
