"""Clouds without labels beside labelled ones: in a loop of one's own and in ``pointcmt train``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pointcmt.cli import main
from pointcmt.data import PointDataset, SyntheticShapes
from pointcmt.methods import PointCMT
from pointcmt.objectives import ClassifierEnhancement, FeatureEnhancement, Objective, SoftLabels
from pointcmt.recipes import train as stage3
from pointcmt.recipes.batches import Batches, WithUnlabelled
from pointcmt.recipes.networks import clouds_of
from pointcmt.recipes.options import DataOptions
from pointcmt.training import CrossModalTraining
from tests.toys import CLASSES, Generator, Student, Teacher


class ByLabel(Objective):
    default_name = "by_label"
    needs_labels = True

    def forward(self, student, teacher):
        return F.cross_entropy(student.classify(teacher.feature), student.labels)


@pytest.fixture
def networks() -> tuple[Teacher, Student]:
    torch.manual_seed(5)
    teacher, student = Teacher(), Student(norm=False)
    teacher(torch.rand(32, 2, 3, 4, 4))
    return teacher, student


def pass_of(student: Student, count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(count, 12, 3, generator=generator)
    views = torch.rand(count, 2, 3, 4, 4, generator=generator)
    return student(points), points, views


def test_a_name_does_not_say_which_list_an_objective_is_in(networks):
    teacher, student = networks
    with CrossModalTraining(teacher, student, objectives=[SoftLabels(name="unlabelled_x")]) as cmt:
        _, _, views = pass_of(student)
        assert float(cmt.loss(views=views)) == cmt.losses["unlabelled_x"] > 0
    with pytest.raises(ValueError, match="named unlabelled_soft_labels, as soft_labels in unlabelled"):
        PointCMT(
            teacher, student,
            objectives=[SoftLabels(name="unlabelled_soft_labels")], unlabelled=[SoftLabels()],
        )  # fmt: skip


def test_each_list_is_of_its_own_clouds(networks):
    teacher, student = networks
    labels = torch.tensor([1, 0])
    context = PointCMT(
        teacher, student, generator=Generator(), objectives=[SoftLabels(2.0), ByLabel(1.0)],
        unlabelled=[SoftLabels(0.5), FeatureEnhancement(1.0), ClassifierEnhancement(1.0)],
    )  # fmt: skip
    with context as cmt:
        logits, _, views = pass_of(student)
        loss = cmt.loss(views=views, labels=labels)
        said = teacher.eval()(views)
        soft = SoftLabels()
        expected = {
            "soft_labels": soft.forward(_state(logits[:2]), _said(said, slice(0, 2))),
            "by_label": F.cross_entropy(student.head(said.feature[:2]), labels),
            "unlabelled_soft_labels": soft.forward(_state(logits[2:]), _said(said, slice(2, 6))),
        }
        for name, value in expected.items():
            assert cmt.losses[name] == pytest.approx(value.item(), rel=1e-5), name
        weights = {"soft_labels": 2.0, "unlabelled_soft_labels": 0.5}
        total = sum(weights.get(name, 1.0) * value for name, value in cmt.losses.items())
        assert loss.item() == pytest.approx(total, rel=1e-5)
        assert set(cmt.losses) == {
            *expected, "unlabelled_feature_enhancement", "unlabelled_classifier_enhancement",
        }  # fmt: skip
        # a pass of labelled clouds alone, and one of none
        for given, names in ((torch.arange(CLASSES), {"soft_labels", "by_label"}), (labels[:0], None)):
            _, _, views = pass_of(student, 5)
            cmt.loss(views=views, labels=given)
            names = names or {name for name in cmt.weights if name.startswith("unlabelled_")}
            assert set(cmt.losses) == names


def _state(logits):
    from pointcmt.types import StudentState

    return StudentState(logits, logits, None)


def _said(output, rows):
    return output.map(lambda value: value[rows])


def test_what_needs_labels_is_kept_from_clouds_without(networks):
    teacher, student = networks
    with pytest.raises(ValueError, match="by_label needs labels, and stands in unlabelled"):
        PointCMT(teacher, student, objectives=[SoftLabels()], unlabelled=[ByLabel(1.0)])
    one = SoftLabels()
    with pytest.raises(ValueError, match="make two of it"):
        PointCMT(teacher, student, objectives=[one], unlabelled=[one])
    with pytest.raises(ValueError, match="expected copies=1"):
        CrossModalTraining(teacher, student, objectives=[], unlabelled=[one], copies=2)
    with PointCMT(teacher, student, objectives=[ByLabel(1.0)]) as cmt:
        _, _, views = pass_of(student)
        with pytest.raises(ValueError, match=r"by_label needs the shapes' labels.*labels=<int64"):
            cmt.loss(views=views)
    with PointCMT(teacher, student, objectives=[], unlabelled=[SoftLabels()]) as cmt:
        for labels, words in (
            (None, "was given no labels"),
            (torch.zeros(7, dtype=torch.int64), "labels are of 7 shapes"),
            (torch.zeros(2), "expected int64"),
        ):
            _, _, views = pass_of(student)
            with pytest.raises(ValueError, match=words):
                cmt.loss(views=views, labels=labels)


def test_the_loop_of_three_lines_trains(networks):
    teacher, student = networks
    generator = torch.Generator().manual_seed(3)
    points, views = torch.randn(6, 12, 3, generator=generator), torch.rand(6, 2, 3, 4, 4, generator=generator)
    labels, apart = torch.tensor([0, 1]), {}
    for weight in (0.0, 10.0):
        torch.manual_seed(6)
        student = Student(norm=False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
        with PointCMT(teacher, student, objectives=[], unlabelled=[SoftLabels(weight)]) as cmt:
            for _ in range(40):
                loss = F.cross_entropy(student(points)[: len(labels)], labels)
                loss = loss + cmt.loss(views=views, labels=labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            said, ours = teacher(views), student(points)
        apart[weight] = SoftLabels().forward(_state(ours[2:]), _said(said, slice(2, 6))).item()
    assert apart[10.0] < 0.5 * apart[0.0]


def test_steps_draw_every_cloud_before_any_comes_again():
    def dataset(count: int) -> PointDataset:
        points = np.arange(count, dtype=np.float32)[:, None, None] * np.ones((1, 4, 3), np.float32)
        return PointDataset(points, np.zeros(count), ["a"], [str(row) for row in range(count)])

    def batches(rank: int = 0, world: int = 1) -> WithUnlabelled:
        labelled = Batches(dataset(8), 4, torch.device("cpu"), 0, rank, world)
        return WithUnlabelled(labelled, dataset(10), 0.5)

    mixed = batches()
    drawn = [mixed.rows_of_step(step).tolist() for step in range(10)]
    for start in (0, 5):  # two clouds a step: five steps are a pass
        assert sorted(row for rows in drawn[start : start + 5] for row in rows) == list(range(10))
    assert drawn[:5] != drawn[5:]
    for epoch in (0, 3):
        for number, batch in enumerate(mixed.epoch(epoch)):
            assert batch.inputs.shape == (6, 4, 3) and batch.labels.shape == (4,)
            rows = mixed.rows_of_step(2 * epoch + number)
            assert batch.index[4:].tolist() == (rows + 8).tolist()
            assert batch.inputs[4:, 0, 0].long().equal(rows)
    halves = [list(batches(rank, 2).epoch(1)) for rank in (0, 1)]
    for whole, first, second in zip(mixed.epoch(1), *halves, strict=True):
        assert sorted([*first.index.tolist(), *second.index.tolist()]) == sorted(whole.index.tolist())
    with pytest.raises(ValueError, match="leaves no cloud"):
        WithUnlabelled(Batches(dataset(8), 4, torch.device("cpu"), 0), dataset(10), 0.01)


def test_the_rest_of_the_training_set_has_no_labels():
    few = DataOptions(per_class=4, holdout=0.25, num_points=16, test_per_class=1).load()
    splits = DataOptions(
        per_class=9, labels_per_class=4, holdout=0.25, num_points=16, test_per_class=1
    ).load()
    assert splits.fingerprint() == few.fingerprint()  # a teacher of the same labels sees the same shapes
    rest = splits.unlabelled
    assert rest is not None and len(rest) == 16 * 5 and not rest.labels.any() and rest.num_classes == 1
    assert splits.heldout is not None
    known = {name for part in splits.parts().values() for name in part.shape_ids}
    assert not known & set(rest.shape_ids) and "unlabelled" not in splits.parts()
    every = SyntheticShapes("train", 16, per_class=9)
    row = every.shape_ids.index(rest.shape_ids[7])
    assert np.array_equal(every.points[row], rest.points[7])
    # what reads labels sees those alone; pre-training sees every cloud
    options = DataOptions(per_class=9, labels_per_class=4, num_points=16)
    assert len(clouds_of(options, "train")) == 16 * 4
    assert len(clouds_of(options, "train", labelled=False)) == 16 * 9
    with pytest.raises(ValueError, match="leaves no training shape without"):
        DataOptions(per_class=4, labels_per_class=4, num_points=16).load()


CPU = ["--device", "cpu", "--no-tensorboard", "--no-progress"]
DATA = ["--test-per-class", "2", "--num-points", "64", "--holdout", "0.25"]
FEW = ["--per-class", "9", "--labels-per-class", "4", *DATA]
SMALL = ["--student", "pointnet2", "--width", "0.125", "--epochs", "2", "--batch-size", "16"]
SOFT = [
    "--fe-weight", "0", "--ce-weight", "0", "--objectives", "soft_labels=1,temperature=2",
    "--unlabelled-objectives", "soft_labels=1", "classifier_enhancement=0.01", "--unlabelled-ratio", "0.5",
    "--unlabelled-ramp", "0.5",
]  # fmt: skip


def run(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    assert main([*words, "--debug"]) == 0, words


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled") / "teacher"
    run(
        "train-teacher", "--out", folder, *FEW, *CPU, "--size", 16, "--epochs", 1, "--feature-dim", 32,
        "--backbone-options", "width=0.25", "layers=(1,1)", "stem_stride=2",
    )  # fmt: skip
    return folder


def test_fe_on_clouds_without_labels(teacher_run, tmp_path, capsys):
    """The generator learns from the labelled shapes alone, and FE is then of the others too."""
    few = [*FEW, *CPU, "--teacher", str(teacher_run)]
    run("train-generator", *few, "--out", tmp_path / "g", "--epochs", 1, "--generator-points", 32)
    assert json.loads((tmp_path / "g/results.json").read_text())["shapes"]["train"] == 48
    words = ["train", *few, *SMALL, "--fe-weight", "0", "--ce-weight", "0.01", "--epochs", "1"]
    words += ["--unlabelled-objectives", "feature_enhancement=3", "projected_l2=1", "cross_nt_xent=0.1"]
    assert main([*words, "--out", str(tmp_path / "x")]) == 1
    assert "FE needs --generator" in capsys.readouterr().err
    run(*words, "--out", tmp_path / "s", "--generator", tmp_path / "g")
    [line] = (tmp_path / "s/metrics.jsonl").read_text().splitlines()
    names = {f"unlabelled_{name}" for name in ("feature_enhancement", "projected_l2", "cross_nt_xent")}
    assert names | {"classifier_enhancement"} <= json.loads(line).keys()
    assert main([*words, "--out", str(tmp_path / "y"), "--unlabelled-objectives", "image_labels=1"]) == 1
    assert "image_labels needs labels, which clouds without labels have none of" in capsys.readouterr().err


def test_a_run_that_is_killed_and_resumed_is_the_same(teacher_run, tmp_path, monkeypatch):
    command = ["train", *FEW, *CPU, *SMALL, *SOFT, "--teacher", str(teacher_run)]
    run(*command, "--out", tmp_path / "whole")
    original, left = stage3.taught_step, {"steps": 4}  # three steps an epoch: in the second

    def stumbling(*arguments):
        step = original(*arguments)

        def stumble(*inputs):
            left["steps"] -= 1
            if left["steps"] < 0:
                raise KeyboardInterrupt
            return step(*inputs)

        return stumble

    monkeypatch.setattr(stage3, "taught_step", stumbling)
    assert main([*command, "--out", str(tmp_path / "again")]) == 130
    monkeypatch.undo()
    run(*command, "--out", tmp_path / "again", "--resume")
    whole, again = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "again"))
    assert whole["last"] == again["last"] and whole["best"] == again["best"]
    a, b = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert whole["shapes"] == {"train": 48, "heldout": 16, "test": 32, "unlabelled": 80}
    assert whole["method"] == "soft_labels and unlabelled clouds"
    assert whole["labels_that_only_the_teacher_saw"] == 0
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert {"unlabelled_soft_labels", "unlabelled_classifier_enhancement", "guard"} <= lines[-1].keys()
    # other clouds are another run
    other = [word if word != "9" else "8" for word in command]
    assert main([*other, "--out", str(tmp_path / "again"), "--resume"]) == 1
    # without them it is another network
    without = [word if word != "0.5" else "0" for word in command]
    run(*without, "--out", tmp_path / "without")
    c = load_file(tmp_path / "without/student.safetensors")
    assert not torch.equal(a["fc1.weight"], c["fc1.weight"])
    assert "unlabelled" not in json.loads((tmp_path / "without/results.json").read_text())["shapes"]


def test_a_folder_of_loose_files_serves(teacher_run, tmp_path, capsys):
    loose, labelled = tmp_path / "scans", ["--per-class", "4", *DATA]
    (loose / "monday").mkdir(parents=True)
    test = DataOptions(per_class=4, holdout=0.25, num_points=64, test_per_class=2).load().test
    rng = np.random.default_rng(0)
    for number in range(6):
        np.save(loose / "monday" / f"{number}.npy", rng.normal(size=(100, 3)).astype(np.float32))
    command = ["train", *labelled, *CPU, *SMALL, *SOFT, "--teacher", str(teacher_run)]
    run(*command, "--out", tmp_path / "r", "--unlabelled", loose)
    assert json.loads((tmp_path / "r/results.json").read_text())["shapes"]["unlabelled"] == 6
    # nothing of the test set is learned from, though somebody put it there
    made = stage3.loose_clouds(loose, 64, normalize=False)
    kept, known = stage3.apart_from(made, [stage3.loose_clouds(loose / "monday", 64, normalize=False)])
    assert known == 0 and len(kept) == 6  # drawn by their paths, so another root is another draw
    kept, known = stage3.apart_from(test, [test])
    assert known == len(test) and len(kept) == 0
    for wrong, words in (
        (["--unlabelled", str(tmp_path / "nowhere")], "nowhere"),
        (["--unlabelled", str(loose), "--unlabelled-ratio", "0"], "--unlabelled-ratio is 0"),
        (["--unlabelled", str(loose), "--draws", "2"], "--draws"),
        (["--unlabelled", str(loose), "--labels-per-class", "2"], "both say where"),
        (["--unlabelled-objectives", "soft_labels=1,heat=3"], "does not take heat"),
    ):
        assert main([*command, "--out", str(tmp_path / "x"), *wrong]) == 1
        assert words in capsys.readouterr().err
