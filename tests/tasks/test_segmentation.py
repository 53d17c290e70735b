"""Figures of segmentation, by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from torch import nn

from pointcmt.tasks.segmentation import (
    Measure,
    part_figures,
    parts_by_category,
    restricted,
    scene_figures,
    segmentation,
    segmentation_loss,
    shape_ious,
)
from pointcmt.types import Batch

NAMES, CLASSES = ["cup/base", "cup/top", "fork/end"], ["cup", "fork"]
PARTS = parts_by_category(NAMES, CLASSES)


def test_instance_and_class_miou_by_hand():
    predicted = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 1]])
    labels = np.array([[0, 0, 0, 1], [0, 0, 0, 0], [2, 2, 2, 2], [1, 1, 1, 1]])
    category = np.array([0, 0, 1, 0])
    ious = shape_ious(predicted, labels, category, PARTS)
    # base 2/3, top 1/2; base 1 and top absent on both sides: 1; one part; base 0/3, top 1/4
    np.testing.assert_allclose(ious, [(2 / 3 + 1 / 2) / 2, 1, 1, (0 + 1 / 4) / 2])
    figures = part_figures(ious, category, CLASSES)
    cup = (7 / 12 + 1 + 1 / 8) / 3
    assert figures["instance_miou"] == pytest.approx(100 * (7 / 12 + 1 + 1 + 1 / 8) / 4)
    assert figures["class_miou"] == pytest.approx(100 * (cup + 1) / 2)
    assert figures["iou/cup"] == pytest.approx(100 * cup)


def test_points_without_a_label_do_not_count():
    labels = np.array([[0, 0, -1, 1]])
    ious = shape_ious(np.array([[0, 0, 1, 1]]), labels, np.array([0]), PARTS)
    np.testing.assert_allclose(ious, [1.0])
    scores = torch.randn(2, 5, 3)
    known = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 2, 2, 2]])
    some = known.clone()
    some[1] = -1
    expected = nn.functional.cross_entropy(scores[:1].flatten(0, 1), known[:1].flatten(), label_smoothing=0.2)
    assert segmentation_loss(scores, some, 0.2) == pytest.approx(float(expected))
    assert segmentation_loss(scores, torch.full((2, 5), -7)) == 0


def test_scenes_are_as_scikit_learn_has_them():
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, 4, 500), generator.integers(0, 4, 500)
    predicted[labels == 3] = 3
    measure = Measure(["a", "b", "c", "d"], None)
    for rows in np.array_split(np.arange(500), 5):
        scores = nn.functional.one_hot(torch.from_numpy(predicted[rows]), 4).float()[None]
        measure.add(scores, torch.from_numpy(labels[rows])[None])
    figures = measure.figures()
    assert figures["oa"] == pytest.approx(100 * accuracy_score(labels, predicted))
    assert figures["macc"] == pytest.approx(100 * recall_score(labels, predicted, average="macro"))
    assert figures["miou"] == pytest.approx(100 * jaccard_score(labels, predicted, average="macro"))
    each = jaccard_score(labels, predicted, average=None)
    assert [figures[f"iou/{name}"] for name in "abcd"] == pytest.approx(list(100 * each))


def test_a_class_that_never_occurs():
    confusion = np.array([[6, 2, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    figures = scene_figures(confusion, list("abcd"))
    assert figures["miou"] == pytest.approx(100 * (6 / 8 + 2 / 4) / 2), (
        "neither there nor predicted: left out"
    )
    assert figures["macc"] == pytest.approx(100 * (6 / 8 + 1) / 2)
    confusion[0] = [6, 1, 1, 0]
    figures = scene_figures(confusion, list("abcd"))
    assert figures["iou/c"] == 0 and figures["miou"] == pytest.approx(100 * (6 / 8 + 2 / 3 + 0) / 3)
    with pytest.raises(ValueError, match="no point has a label"):
        scene_figures(np.zeros((2, 2)), ["a", "b"])


def test_only_parts_of_the_category_compete_or_all():
    scores = torch.tensor([[[0.0, 1.0, 5.0]], [[9.0, 0.0, 1.0]]])
    category = torch.tensor([0, 1])
    assert restricted(scores, category, PARTS).argmax(-1).flatten().tolist() == [1, 2]
    found = {}
    for argmax in ("category", "all"):
        measure = Measure(NAMES, CLASSES, argmax)
        measure.add(scores, torch.tensor([[1], [2]]), category, torch.tensor([0, 1]))
        measure.add(scores[:1], torch.tensor([[1]]), category[:1], torch.tensor([0]))  # again, counted once
        found[argmax] = measure.figures()["instance_miou"]
    assert found == {"category": 100.0, "all": pytest.approx(100 * (1 / 2 + 0) / 2)}


def test_padding_does_not_count():
    measure = Measure(["a", "b"], None)
    scores = nn.functional.one_hot(torch.tensor([[0, 0, 0, 0]]), 2).float()
    measure.add(scores, torch.tensor([[0, 0, 1, 1]]), lengths=torch.tensor([3]))
    assert measure.figures()["oa"] == pytest.approx(100 * 2 / 3)
    task = segmentation(lambda model, batch: scores, {}, "test", "", part_names=["a", "b"])
    labels = torch.tensor([[0, 0, 1, 1]])
    padded = Batch(points=torch.zeros(1, 4, 3), point_labels=labels, lengths=torch.tensor([3]))
    expected = segmentation_loss(scores[:, :3], labels[:, :3])
    assert task.step(nn.Identity(), padded, 0.0)["loss"] == pytest.approx(float(expected))


def test_names_that_are_no_parts():
    with pytest.raises(ValueError, match="expected names category/part"):
        parts_by_category(["cup/base", "plate"], ["cup"])
    with pytest.raises(ValueError, match="expected"):
        parts_by_category(["cup/base"], ["cup", "fork"])


def test_the_task_learns_and_says_so():
    torch.manual_seed(0)
    points = torch.randn(6, 40, 3)
    batch = Batch(points=points, point_labels=(points[..., 0] > 0).long(), index=torch.arange(6))
    model = nn.Linear(3, 2)
    seen = []

    def prepare(batch: Batch) -> Batch:
        seen.append(len(batch))
        return batch

    task = segmentation(
        lambda net, given: net(given.inputs()), {"test": lambda: [batch]}, "test", "by chance",
        part_names=["left", "right"], prepare=prepare,
    )  # fmt: skip
    before = task.evaluate(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(30):
        optimizer.zero_grad()
        task.step(model, batch, 0.0)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        after = task.evaluate(model)
    assert set(after) == {"test_miou", "test_macc", "test_oa"} and seen == [6] * 30
    assert after["test_miou"] > max(90, before["test_miou"])
    assert task.watch.name == "test_miou" == task.headline[0]
